"""Single stages of `nano.gin` by the real command, in processes of their own, and what two runs of one differ in."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pit_jax.core.tree import named_leaves
from pit_jax.stages.artifact import Artifact

BEGIN = [sys.executable, "-m", "pit_jax"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = pathlib.Path(__file__).with_name("nano.gin")
VERBS = {
    "sft_policy": ("sft", "--role=policy"),
    "sft_improver": ("sft", "--role=improver"),
    "reward_bt": ("reward", "--role=bt"),
    "reward_gap": ("reward", "--role=gap"),
    "rl_policy": ("rl", "--role=policy"),
    "rl_improver": ("rl", "--role=improver"),
}
"""Stage -> the verb that runs it alone; in the order of the recipe."""


def command(directory: pathlib.Path, verb: Sequence[str], flags: Sequence[str] = ()) -> list[str]:
    """Return the command that makes or continues a stage, with further gin files and bindings."""
    return [*BEGIN, *verb, f"--gin_file={RECIPE}", f"--gin.MODEL_DIR='{directory}'", *flags]


def start(line: Sequence[str], log: pathlib.Path, *, devices: int, processes: int = 1) -> list[subprocess.Popen[bytes]]:
    """Start a command as so many processes with so many fake devices each; all write to one log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        # On a busy machine fake devices wait for each other for longer than the 40 s after which XLA ends the process.
        "XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for number in range(processes):
        one_of = {} if processes == 1 else _one_of(address, processes, number)
        with log.open("ab") as output:
            started.append(
                subprocess.Popen(
                    line, cwd=ROOT, env=os.environ | settings | one_of, stdout=output, stderr=subprocess.STDOUT
                )
            )
    return started


def _one_of(address: str, processes: int, number: int) -> dict[str, str]:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_ID")
    return dict(zip(names, (address, str(processes), str(number)), strict=True))


def run(line: Sequence[str], log: pathlib.Path, *, devices: int, processes: int = 1) -> None:
    """Run a command to its end, which must be a good one."""
    statuses = [process.wait() for process in start(line, log, devices=devices, processes=processes)]
    if any(statuses):
        raise AssertionError(f"status {statuses}:\n{log.read_text(errors='replace')[-4000:]}")


def without(stage: str, source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Return a copy of a run in which one stage has not begun."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(stage))
    return target


def records(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Return the records of a stage without what depends on the machine."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("timing/")} for line in lines]


def differences(left: pathlib.Path, right: pathlib.Path) -> list[str]:
    """Return what two stages that should be the same differ in: records, results, parameters, all that is saved."""
    met = collections.Counter((record["step"], record["kind"]) for record in records(right))
    found = [f"{kind} record of step {step} is there {n} times" for (step, kind), n in met.items() if n > 1]
    if records(left) != records(right):
        found.append("metrics.jsonl")
    for name in ("result.json", "done.json", "stage.json"):
        if json.loads((left / name).read_text()) != json.loads((right / name).read_text()):
            found.append(name)
    one, two = Artifact(left), Artifact(right)
    for snapshot in (None, *one.manifest["snapshots"]):
        mine, others = (dict(named_leaves(jax.device_get(stage.params(snapshot)))) for stage in (one, two))
        equal = mine.keys() == others.keys() and all(_same_bits(mine[name], others[name]) for name in mine)
        found += [] if equal else [f"parameters of {snapshot or 'the end'}"]
    if _saved(left) != _saved(right):
        found.append("optimiser state, data position or whatever else a restart needs")
    return found


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _saved(stage: pathlib.Path) -> Any:
    """Return digests of all arrays of the newest checkpoint, optimiser state included, and its other data."""
    newest = max(stage.glob("checkpoint_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    return json.loads((newest / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
