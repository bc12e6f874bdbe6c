"""Stands for every program that the launchers call: records its words, and does here what the real one does far away.

Installed under the names of those programs by `tools.py`. Its state lies in the folder $FAKE:

  calls.jsonl        a line a call: {"tool": ..., "words": [...], "cwd": ..., "environment": {...}}
  pit-jax.statuses   exit statuses of the next runs of pit-jax, a line each (0 when there is none); "hang" waits for
                     SIGTERM and ends with 143, "last75" ends with 75 once two hang, "lose" makes the machine vanish
                     and ends with 255
  machine            state of the TPU, there when it exists;   next_states   states it goes through after its creation
  jobset             terminal state of the JobSet;   logs/    of its pods
  workers            number of hosts;   unreachable   there when files cannot be copied to them
  slurm_state        state of the SLURM job (RUNNING when there is none)
"""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

FAKE = pathlib.Path(os.environ["FAKE"])
NAMES = ("SLURM_PROCID", "CUDA_VISIBLE_DEVICES", "JAX_NUM_CPU_DEVICES")


def load_yaml(text):
    sys.path.append(os.environ["FAKE_SITE"])
    import yaml

    return yaml.safe_load(text)


def record(tool, words):
    seen = {name: os.environ[name] for name in NAMES if name in os.environ}
    call = {"tool": tool, "words": words, "cwd": os.getcwd(), "environment": seen}
    with open(FAKE / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\n")


def pop(name, default=""):
    """Return and remove the first line of a file."""
    path = FAKE / name
    with open(FAKE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = path.read_text().split() if path.exists() else []
        path.write_text("\n".join(lines[1:]))
    return lines[0] if lines else default


def value(words, flag, default=None):
    return next((word.partition("=")[2] for word in words if word.startswith(flag + "=")), default)


def pit_jax(words):
    if words == ["--version"]:
        return 0
    status = pop("pit-jax.statuses", "0")
    if status == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with open(FAKE / "hanging", "a") as file:
            file.write(f"{os.getpid()}\n")
        while True:
            time.sleep(0.05)
    if status.startswith("last"):
        while not (FAKE / "hanging").exists() or len((FAKE / "hanging").read_text().split()) < 2:
            time.sleep(0.02)
        return int(status.removeprefix("last"))
    if status == "lose":
        (FAKE / "machine").write_text("SUSPENDED")
        return 255
    print("pit-jax has run")
    return int(status)


def homes():
    workers = FAKE / "workers"
    for index in range(int(workers.read_text()) if workers.exists() else 1):
        home = FAKE / f"host{index}"
        home.mkdir(exist_ok=True)
        yield home


def gcloud(words):
    verb, name = words[3], words[4]
    machine = FAKE / "machine"
    if verb == "describe":
        if not machine.exists():
            print("NOT_FOUND", file=sys.stderr)
            return 1
        print(machine.read_text())
        machine.write_text(pop("next_states", machine.read_text()))
        return 0
    if verb == "create":
        machine.write_text(pop("next_states", "ACTIVE"))
        return 0
    if verb == "delete":
        machine.unlink()
        return 0
    assert machine.exists(), f"{verb} {name}: there is no machine"
    if verb == "scp":
        if (FAKE / "unreachable").exists():
            return 255
        for home in homes():
            (home / words[5].rpartition(":")[2] / pathlib.Path(words[4]).name).write_bytes(
                pathlib.Path(words[4]).read_bytes()
            )
        return 0
    assert verb == "ssh", verb
    command = value(words, "--command")
    # A remote command survives its connection.
    children = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}, start_new_session=True
        )
        for home in homes()
    ]
    return next((status for child in children if (status := child.wait())), 0)


def python3(words):
    if words[:2] == ["-m", "venv"]:
        make(pathlib.Path(words[2]) / "bin", "pip", "uv")
    return 0


def uv(words):
    if words[0] == "venv":
        make(pathlib.Path(words[-1]) / "bin", "python", "pit-jax")
    return 0


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(__file__)


def expand(word):
    """Put variables in their places as Kubernetes does, none of which are set: $$ is $, and $(X) stays."""
    return word.replace("$$", "$")


def run_jobset(command, tries, fatal):
    """Run a command until it ends for good; return the JobSet's state."""
    (FAKE / "logs").mkdir(exist_ok=True)
    for attempt in range(tries + 1):
        done = subprocess.run(command, capture_output=True, text=True)
        (FAKE / "logs" / f"pod-{attempt}").write_text(done.stdout)
        if done.returncode == 0:
            return "Completed"
        if fatal(done.returncode):
            return "Failed"
    return "Failed"


def kubectl(words):
    words = [word for word in words if not word.startswith("--namespace")]
    jobset = FAKE / "jobset"
    if words[:2] == ["get", "jobset"]:
        print(jobset.read_text() if jobset.exists() else "")
        return 0 if jobset.exists() else 1
    if words[:2] == ["get", "pods"]:
        pods = sorted((FAKE / "logs").glob("*")) if (FAKE / "logs").exists() else []
        print(pods[-1].name if pods else "")
    elif words[0] == "logs":
        if (FAKE / "endless").exists():
            (FAKE / "following").write_text("")
            time.sleep(60)
        print((FAKE / "logs" / words[-1]).read_text(), end="")
    elif words[0] == "create":
        text = sys.stdin.read()
        (FAKE / "manifest.yaml").write_text(text)
        spec = load_yaml(text)["spec"]
        job = spec["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        values = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
        command = container["command"] + [expand(word) for word in container["args"]]
        jobset.write_text(run_jobset(command, spec["failurePolicy"]["maxRestarts"], lambda status: status in values))
    elif words[0] == "delete":
        jobset.unlink(missing_ok=True)
    return 0


def xpk(words):
    if words[:2] == ["workload", "create"]:
        again = {int(code) for code in value(words, "--restart-on-exit-codes").split(",")} | {42, *range(127, 256)}
        # As XPK's template has it.
        script = f"({value(words, '--command')}) & PID=$!; wait $PID"
        state = run_jobset(["bash", "-c", script], int(value(words, "--max-restarts")), lambda code: code not in again)
        (FAKE / "jobset").write_text(state)
    return 0


def sky(words):
    task = load_yaml(pathlib.Path(words[-1]).read_text())
    given = [word.partition("=")[2] for word in words if word.startswith("--env=")]
    environment = {**os.environ, **task["envs"], **dict(pair.split("=", 1) for pair in given)}
    folder = value(words, "--workdir")
    for part in ("setup", "run"):
        status = subprocess.run(["bash", "-c", task[part]], cwd=folder, env=environment).returncode
        if status:
            return status
    return 0


def srun(words):
    command = [word for word in words if word not in ("--label", "--kill-on-bad-exit=1")]
    statuses = [subprocess.run(command, env={**os.environ, "SLURM_PROCID": str(task)}).returncode for task in range(2)]
    return max(statuses)


def squeue(words):
    state = FAKE / "slurm_state"
    print(state.read_text() if state.exists() else "RUNNING")
    return 0


def nothing(words):
    return 0


def main():
    tool = pathlib.Path(sys.argv[0]).name
    words = sys.argv[1:]
    record(tool, words)
    tools = {"pit-jax": pit_jax, "gcloud": gcloud, "python3": python3, "uv": uv, "kubectl": kubectl, "xpk": xpk}
    tools |= {"sky": sky, "srun": srun, "squeue": squeue}
    return tools.get(tool, nothing)(words)


if __name__ == "__main__":
    sys.exit(main())
