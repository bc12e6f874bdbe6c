"""Launchers of clusters: words arrive unchanged, stopped runs start again, errors do not, nothing stays behind."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import tarfile

import pytest

from .tools import FLAGS, LAUNCH, Tools, alive, line, wait_for

PLACE = "gs://bucket/a b"
ONE_LINE = tuple(word for word in FLAGS if "\n" not in word)
SETTINGS: dict[str, tuple[str, ...]] = {
    "tpu_vm.sh": ("--name=pit", "--zone=us-east5-a", "--type=v5p-128", "--poll=0"),
    "jobset.sh": ("--name=pit", "--image=image", "--topology=v5p:4x4x4", "--poll=0"),
    "xpk.sh": ("--cluster=c", "--name=pit", "--image=image", "--type=v5p-128", "--poll=0"),
    "slurm.sbatch": (),
    "skypilot.sh": ("--sky=--use-spot",),
}
AGAIN = ("--backoff=0", "--tries=3")


@pytest.fixture
def tools(tmp_path: pathlib.Path) -> Tools:
    return Tools.install(tmp_path / "fakes")


def _slurm(tools: Tools, *words: str, **environment: str) -> int:
    """Run the batch script as SLURM does: a copy of it, from another folder."""
    spool = tools.folder / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(LAUNCH / "slurm.sbatch", spool / "slurm_script")
    found = {"SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_JOB_ID": "17"} | environment
    return tools.run(str(spool / "slurm_script"), "demo", PLACE, *words, **found).returncode


def _launch(tools: Tools, script: str, *words: str) -> int:
    if script == "slurm.sbatch":
        return _slurm(tools, *words)
    return tools.run(script, "demo", PLACE, *SETTINGS[script], *words).returncode


@pytest.mark.parametrize("script", SETTINGS)
def test_words_arrive_unchanged(tools: Tools, script: str) -> None:
    assert _launch(tools, script, *FLAGS) == 0
    runs = tools.words("pit-jax", "pipeline")
    assert runs == [line(PLACE, *FLAGS)] * (2 if script == "slurm.sbatch" else 1)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "jobset.sh", "slurm.sbatch", "skypilot.sh"])
def test_line_breaks_arrive(tools: Tools, script: str) -> None:
    assert _launch(tools, script, "--gin.X='a\nb'\n") == 0
    assert tools.words("pit-jax", "pipeline")[0] == line(PLACE, "--gin.X='a\nb'\n")


def test_xpk_refuses_line_breaks(tools: Tools) -> None:
    done = tools.run("xpk.sh", "demo", PLACE, *SETTINGS["xpk.sh"], "--gin.X='a\nb'")
    assert done.returncode == 2
    assert "line break" in done.stderr


def test_a_folder_with_quotes(tools: Tools) -> None:
    assert tools.run("tpu_vm.sh", "demo", "gs://it's\\", *SETTINGS["tpu_vm.sh"]).returncode == 0
    assert tools.words("pit-jax", "pipeline")[0][2] == "--gin.MODEL_DIR='gs://it\\'s\\\\'"


@pytest.mark.parametrize("script", SETTINGS)
def test_dry_run_runs_nothing(tools: Tools, script: str) -> None:
    if script == "slurm.sbatch":
        done = tools.run(script, "demo", PLACE, *FLAGS, "--dry-run")
    else:
        done = tools.run(script, "demo", PLACE, *SETTINGS[script], *FLAGS, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "recipes/demo.gin" in done.stdout
    assert not (tools.folder / "calls.jsonl").exists()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "jobset.sh", "xpk.sh"])
@pytest.mark.parametrize("status", ["143", "75", "137"])
def test_stopped_and_lost_runs_start_again(tools: Tools, script: str, status: str) -> None:
    tools.write("pit-jax.statuses", status, "143")
    assert _launch(tools, script, *AGAIN) == 0
    assert tools.words("pit-jax", "pipeline") == [line(PLACE)] * 3


@pytest.mark.parametrize("script", [name for name in SETTINGS if name != "skypilot.sh"])
@pytest.mark.parametrize("status", [1, 2])
def test_errors_end_the_run(tools: Tools, script: str, status: int) -> None:
    tools.write("pit-jax.statuses", str(status), *["0"] * 5)
    assert _launch(tools, script, *(AGAIN if script != "slurm.sbatch" else ())) != 0
    assert len(tools.words("pit-jax", "pipeline")) == (2 if script == "slurm.sbatch" else 1)
    assert not tools.words("scontrol")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "jobset.sh", "xpk.sh"])
def test_gives_up_after_so_many_tries(tools: Tools, script: str) -> None:
    tools.write("pit-jax.statuses", *["143"] * 9)
    assert _launch(tools, script, *AGAIN) != 0
    # A JobSet counts restarts, the others attempts.
    assert len(tools.words("pit-jax", "pipeline")) == (3 if script == "tpu_vm.sh" else 4)


def test_slurm_queues_a_stopped_job_again(tools: Tools) -> None:
    tools.write("pit-jax.statuses", "143", "143")
    assert _slurm(tools) == 0
    assert tools.words("scontrol") == [["requeue", "17"]]
    assert [call["environment"]["SLURM_PROCID"] for call in tools.calls("pit-jax")] == ["0", "1"]


def test_slurm_gives_up(tools: Tools) -> None:
    tools.write("pit-jax.statuses", "143", "143")
    assert _slurm(tools, "--tries=3", SLURM_RESTART_COUNT="3") == 143
    assert not tools.words("scontrol")


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_slurm_does_not_raise_a_cancelled_job(tools: Tools, state: str) -> None:
    tools.write("pit-jax.statuses", "143", "143")
    tools.write("slurm_state", state)
    assert _slurm(tools) == 143
    assert not tools.words("scontrol")


def test_tpu_that_cannot_be_installed_on_is_not_used(tools: Tools) -> None:
    tools.write("unreachable", "")
    done = tools.run("tpu_vm.sh", "demo", PLACE, *SETTINGS["tpu_vm.sh"], *AGAIN, "--delete")
    assert done.returncode == 1
    assert not tools.words("pit-jax")
    assert not (tools.folder / "machine").exists()


def test_tpu_makes_waits_installs_on_all_hosts_and_deletes(tools: Tools, tmp_path: pathlib.Path) -> None:
    tools.write("workers", "2")
    tools.write("next_states", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    extra = tmp_path / "mine.gin"
    extra.write_text("include 'recipes/demo.gin'\n")
    settings = (*SETTINGS["tpu_vm.sh"], "--spot", "--slices=2", "--project=p", f"--with={extra}", "--delete")
    done = tools.run("tpu_vm.sh", "mine.gin", PLACE, *settings)
    assert done.returncode == 0, done.stderr
    here = ["--zone=us-east5-a", "--project=p"]
    (made,) = tools.words("gcloud", "compute", "tpus", "queued-resources", "create")
    assert made[4:] == ["pit", *here, "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5",
                        "--node-count=2", "--node-prefix=pit", "--spot"]  # fmt: skip
    runs = tools.calls("pit-jax", "pipeline")
    assert [call["words"] for call in runs] == [line(PLACE, recipe="mine.gin")] * 2
    assert {call["cwd"] for call in runs} == {str(tools.folder / f"host{n}" / "pit_jax" / "work") for n in range(2)}
    for host in ("host0", "host1"):
        assert (tools.folder / host / "pit_jax" / "work" / "mine.gin").read_text() == extra.read_text()
        assert (tools.folder / host / "pit_jax" / "source" / "pit_jax" / "cli" / "main.py").exists()
    assert done.stdout.count("pit-jax has run") == 2
    (gone,) = tools.words("gcloud", "compute", "tpus", "queued-resources", "delete")
    assert gone[4:] == ["pit", *here, "--force", "--quiet"]
    assert not (tools.folder / "machine").exists()


def test_tpu_uses_what_is_there_and_leaves_it(tools: Tools) -> None:
    tools.write("machine", "READY")
    done = tools.run("tpu_vm.sh", "demo", PLACE, *SETTINGS["tpu_vm.sh"], "--vm")
    assert done.returncode == 0
    verbs = [words[3] for words in tools.words("gcloud", "compute", "tpus", "tpu-vm")]
    assert verbs == ["describe", "scp", "ssh", "ssh"]
    assert "gcloud compute tpus tpu-vm delete pit" in done.stderr, "how to delete it is said"


def test_tpu_that_vanished_is_made_anew(tools: Tools) -> None:
    tools.write("pit-jax.statuses", "lose")
    assert _launch(tools, "tpu_vm.sh", *AGAIN) == 0
    verbs = [words[3] for words in tools.words("gcloud")]
    once = ["scp", "ssh", "ssh"]
    assert verbs == ["describe", "create", "describe", *once, "describe", "delete", "create", "describe", *once]


def test_tpu_that_cannot_be_had(tools: Tools) -> None:
    tools.write("next_states", *["FAILED"] * 20)
    done = tools.run("tpu_vm.sh", "demo", PLACE, *SETTINGS["tpu_vm.sh"], "--tries=2", "--delete")
    assert done.returncode == 1
    assert "giving up" in done.stderr
    assert not tools.words("pit-jax")
    assert not (tools.folder / "machine").exists(), "a request that stays in the queue may come true, and cost"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_tpu_stops_the_run_and_deletes_when_interrupted(tools: Tools, sent: signal.Signals) -> None:
    tools.write("pit-jax.statuses", "hang")
    launcher = tools.start("tpu_vm.sh", "demo", PLACE, *SETTINGS["tpu_vm.sh"], "--delete")
    wait_for(lambda: len(tools.hanging()) == 1)
    launcher.send_signal(sent)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + sent
    assert not alive(tools.hanging()[0]), "the run on the host was asked to stop"
    assert not (tools.folder / "machine").exists()


def test_host_stops_what_a_lost_connection_left_behind(tools: Tools) -> None:
    tools.write("pit-jax.statuses", "hang")
    home = tools.folder / "host"
    (home / "pit_jax" / "env" / "bin").mkdir(parents=True)
    words = ("run", "pit", "pit-jax", "pipeline")
    first = tools.start("host.sh", *words)
    wait_for(lambda: len(tools.hanging()) == 1)
    assert tools.run("host.sh", *words).returncode == 0
    assert first.wait(timeout=10) == 143
    assert tools.run("host.sh", "stop", "pit").returncode == 0


def test_jobset_follows_process_0_and_leaves_or_deletes(tools: Tools) -> None:
    tools.write("pit-jax.statuses", "143")
    settings = SETTINGS["jobset.sh"]
    done = tools.run("jobset.sh", "demo", PLACE, *settings, "--namespace=team", "--delete")
    assert done.returncode == 0
    assert "pit-jax has run" in done.stdout
    (pods,) = tools.words("kubectl", "--namespace=team", "get", "pods")[:1]
    assert any("job-completion-index=0" in word and "job-index=0" in word for word in pods)
    assert tools.words("kubectl", "--namespace=team", "delete", "jobset", "pit")
    assert not (tools.folder / "jobset").exists()


def test_jobset_that_runs_is_followed(tools: Tools) -> None:
    (tools.folder / "logs").mkdir()
    tools.write("logs/pod-0", "old log\n")
    tools.write("jobset", "")
    tools.write("endless", "")
    launcher = tools.start("jobset.sh", "demo", PLACE, *SETTINGS["jobset.sh"])
    wait_for(lambda: (tools.folder / "following").exists())
    launcher.send_signal(signal.SIGINT)
    _, said = launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    assert "the job goes on" in said
    assert not tools.words("kubectl", "--namespace=default", "create")
    assert not tools.words("kubectl", "--namespace=default", "delete")


def test_xpk_deletes_when_asked(tools: Tools) -> None:
    assert _launch(tools, "xpk.sh", "--delete", "--zone=z", "--xpk=--priority=high") == 0
    (made,) = tools.words("xpk", "workload", "create")
    assert {"--zone=z", "--priority=high", "--tpu-type=v5p-128", "--num-slices=1"} <= set(made)
    (gone,) = tools.words("xpk", "workload", "delete")
    assert gone[2:] == ["--cluster=c", "--workload=pit", "--zone=z", "--force"]


def test_skypilot_tells_gpu_hosts_of_each_other(tools: Tools) -> None:
    found = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    assert tools.run("skypilot.sh", "demo", PLACE, "--name=mine", **found).returncode == 0
    (made,) = tools.words("sky", "jobs", "launch")
    assert {"--name=mine", "--yes"} <= set(made)
    hosts = ["--coordinator_address=10.0.0.1:8476", "--process_count=2", "--process_id=1"]
    assert tools.words("pit-jax", "pipeline") == [line(PLACE, *hosts)]
    assert tools.run("skypilot.sh", "demo", PLACE, "--extra=tpu", **found).returncode == 0
    assert tools.words("pit-jax", "pipeline")[1] == line(PLACE), "TPU hosts find each other"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("tpu_vm.sh", ("--zone=z", "--type=v5p-8"), "--name"),
        ("tpu_vm.sh", ("--name=n", "--zone=z", "--type=tpu7x-8"), "--version"),
        ("tpu_vm.sh", ("--name=n", "--zone=z", "--type=v5p-8", "--slices=2", "--vm"), "--slices=2"),
        ("tpu_vm.sh", ("--tries=many",), "whole number"),
        ("jobset.sh", ("--name=n", "--image=i", "--topology=v5p"), "4x4x4"),
        ("jobset.sh", ("--name=n", "--image=i", "--topology=h100:8"), "tpu7x"),
        ("jobset.sh", ("--name=n", "--image=i", "--topology=v5p:2x2x1", "--chips=3"), "--chips=3"),
        ("xpk.sh", ("--cluster=c",), "--image"),
    ],
)
def test_wrong_settings_say_what_is_wrong(tools: Tools, script: str, words: tuple[str, ...], said: str) -> None:
    done = tools.run(script, "demo", PLACE, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tools.folder / "calls.jsonl").exists()


@pytest.mark.parametrize("script", SETTINGS)
def test_flags_of_pit_jax_come_after_the_folder(tools: Tools, script: str) -> None:
    done = tools.run(script, "--gin.X=1", "demo", PLACE)
    assert done.returncode == 2
    assert "after MODEL_DIR" in done.stderr


@pytest.mark.parametrize("script", SETTINGS)
def test_usage(tools: Tools, script: str) -> None:
    helped = tools.run(script, "--help")
    assert helped.returncode == 0
    assert "RECIPE MODEL_DIR" in helped.stdout
    assert "#SBATCH" not in helped.stdout and "shellcheck" not in helped.stdout
    wrong = tools.run(script, "demo")
    assert wrong.returncode == 2
    assert "RECIPE MODEL_DIR" in wrong.stderr


def test_what_is_sent_to_hosts_is_the_checkout(tools: Tools) -> None:
    assert _launch(tools, "tpu_vm.sh") == 0
    with tarfile.open(tools.folder / "host0" / "pit_jax.tar.gz") as archive:
        names = archive.getnames()
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "requirements/lock-3.12.txt"} <= set(names)
    assert not any("__pycache__" in name for name in names)
    assert os.path.getsize(tools.folder / "host0" / "pit_jax.tar.gz") < 5e6
