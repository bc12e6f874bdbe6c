"""Run the demo once in peace and once with `kill -9` at random moments, and compare what they leave.

    python tests/stages/kill_demo.py DIRECTORY [--kills 3] [--seed 0] [--shrunk | more flags of `pit-jax pipeline`]

DIRECTORY gets `peace/` and `killed/`. Ends with 0 if both hold the same records, results and report.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = {
    "sft_policy/loop.Loop.steps": 60,
    "sft_improver/loop.Loop.steps": 60,
    "reward_bt/loop.Loop.steps": 60,
    "reward_gap/loop.Loop.steps": 60,
    "loop.Loop.checkpoint_every": 20,
    "loop.Loop.log_every": 7,
    "optim.Optimizer.warmup_steps": 10,
    "rlhf/curriculum.Round.steps": 12,
    "stage1/curriculum.Round.steps": 6,
    "stage2/curriculum.Round.steps": 6,
    "rl.RlTraining.checkpoint_every": 4,
    "rl_policy/rl.Rl.snapshots": "(5, 8)",
    "ORIGINAL": "'rl_policy:5'",
    "evaluate.Evaluate.policy_curve": "{5: 'rl_policy:5', 12: 'rl_policy'}",
    "evaluate.Evaluate.original_steps": 5,
    "evaluate.Evaluate.prompts": 60,
    "synthetic.SyntheticConfig.num_records": 6000,
}
SHRUNK = [f"--gin.{name}={value}" for name, value in STEPS.items()]


def command(directory: pathlib.Path, flags: list[str]) -> list[str]:
    """Return the command that makes or continues the demo in a directory."""
    begin = [sys.executable, "-m", "pit_jax", "pipeline", "--gin_file=recipes/demo.gin"]
    return [*begin, f"--gin.MODEL_DIR='{directory}'", *flags]


def start(directory: pathlib.Path, flags: list[str]) -> subprocess.Popen[bytes]:
    """Start the demo as a group of processes of its own."""
    log = (directory.parent / f"{directory.name}.log").open("ab")
    return subprocess.Popen(
        command(directory, flags), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(directory: pathlib.Path, flags: list[str]) -> float:
    """Let the demo come to its end; return the seconds it took."""
    begin = time.monotonic()
    if status := start(directory, flags).wait():
        log = (directory.parent / f"{directory.name}.log").read_text(errors="replace")
        raise SystemExit(f"the demo ended with status {status}:\n{log[-3000:]}")
    return time.monotonic() - begin


def differences(left: pathlib.Path, right: pathlib.Path) -> list[str]:
    """Return what two runs differ in, fields under timing/ aside: records, results, report, responses."""
    found = []
    for pattern in ("*/metrics.jsonl", "*/result.json", "report/report.json", "*/responses/*.jsonl", "stages.json"):
        names = [sorted(str(path.relative_to(run)) for path in run.glob(pattern)) for run in (left, right)]
        if names[0] != names[1]:
            found.append(f"{pattern}: {names[0]} and {names[1]}")
        if not names[0]:
            found.append(f"{pattern}: there is none")
        both = sorted(set(names[0]) & set(names[1]))
        found += [name for name in both if _content(left / name) != _content(right / name)]
    return found


def _content(path: pathlib.Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("timing/")} for line in lines]


def main(arguments: list[str]) -> int:
    """Do it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrunk", action="store_true", help="a pipeline of few steps")
    options, flags = parser.parse_known_args(arguments)
    flags = [*(SHRUNK if options.shrunk else []), *flags]
    options.directory.mkdir(parents=True, exist_ok=True)
    peace, killed = (options.directory.resolve() / name for name in ("peace", "killed"))
    seconds = finish(peace, flags)
    print(f"in peace: {seconds:.0f} s")
    moments = random.Random(options.seed)
    for number in range(options.kills):
        process = start(killed, flags)
        wait = moments.uniform(0.1, 0.9) * 0.7 * seconds / options.kills
        time.sleep(wait)
        over = process.poll() is not None
        if not over:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        newest = max(killed.glob("*/checkpoint_*"), key=lambda path: path.stat().st_mtime, default=None)
        print(f"kill {number + 1} after {wait:.1f} s{' (it was over)' if over else ''}; newest checkpoint: {newest}")
    finish(killed, flags)
    found = differences(peace, killed)
    print("the same" if not found else f"different: {found}")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
