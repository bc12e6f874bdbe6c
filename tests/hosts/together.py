"""The real command on several processes of this machine, on a recipe small enough for tests."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "decoder_only.DecoderOnlyConfig.width": 16,
    "decoder_only.DecoderOnlyConfig.heads": 2,
    "decoder_only.DecoderOnlyConfig.kv_heads": 2,
    "decoder_only.DecoderOnlyConfig.head_dim": 8,
    "decoder_only.DecoderOnlyConfig.mlp": 32,
    "synthetic.SyntheticConfig.num_records": 1500,
    "loop.Loop.checkpoint_every": 2,
    "loop.Loop.log_every": 1,
    "optim.Optimizer.warmup_steps": 0,
    "supervised.Training.evaluation_records": 16,
    **{
        f"{stage}/{name}": value
        for stage in ("sft_policy", "sft_improver", "reward_bt", "reward_gap")
        for name, value in {
            "loop.Loop.steps": 4,
            "loop.Loop.eval_every": 0,
            "optim.Optimizer.warmup_steps": 0,
            "supervised.Training.batch_size": 8,
        }.items()
    },
    **{f"{stage}/reward.Reward.report_records": 16 for stage in ("reward_bt", "reward_gap")},
    "rlhf/curriculum.Round.steps": 3,
    "stage1/curriculum.Round.steps": 1,
    "stage2/curriculum.Round.steps": 2,
    **{f"{stage}/optim.Optimizer.warmup_steps": 0 for stage in ("rl_policy", "rl_improver")},
    "rl.RlTraining.contexts": 4,
    "rl.RlTraining.rollout_batch": 16,
    "rl.RlTraining.evaluation_prompts": 8,
    "rl.RlTraining.checkpoint_every": 2,
    "rl.RlTraining.log_every": 1,
    "rl_policy/rl.Rl.snapshots": (2,),
    "ORIGINAL": "rl_policy:2",
    "evaluate.Evaluate.policy_curve": {},
    "evaluate.Evaluate.improvers": {},
    "evaluate.Evaluate.policies": {},
    "evaluate.Evaluate.original_steps": 2,
    "evaluate.Evaluate.prompts": 12,
    "evaluate.Evaluate.iterations": 2,
    "evaluate.Evaluate.temperatures": (1.0, 0.0),
    "evaluate.Evaluate.batch_size": 8,
    "run.Experiment.tensorboard": False,
}


@dataclasses.dataclass
class Host:
    """One process of a run, as if on a host of its own, and where its output goes."""

    process: subprocess.Popen[bytes]
    log: pathlib.Path

    def wait(self, seconds: float) -> int:
        """Return its exit status; a process that does not end is killed, and fails the test."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.log} did not end within {seconds:g} s:\n{self.said()}") from None

    def said(self) -> str:
        """Return the end of its output."""
        return self.log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """End it like a machine that is switched off."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


STARTED: list[Host] = []
"""All hosts of the test under way, to be ended with it."""


def flags(directory: pathlib.Path, settings: Mapping[str, Any], recipe: str = "recipes/demo.gin") -> list[str]:
    """Return the flags of a small run of a recipe."""
    bound = SETTINGS | dict(settings) | {"MODEL_DIR": str(directory)}
    return [f"--gin_file={recipe}", *(f"--gin.{name}={value!r}" for name, value in bound.items())]


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def spawn(
    command: Sequence[str],
    log: pathlib.Path,
    *,
    devices: int,
    environment: Mapping[str, str],
    directory: pathlib.Path = ROOT,
) -> Host:
    """Start one process with so many fake devices."""
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=variables | environment, stdout=output, stderr=subprocess.STDOUT
        )
    STARTED.append(Host(process, log))
    return STARTED[-1]


def start(
    logs: pathlib.Path,
    commands: Sequence[Sequence[str]],
    *,
    devices: int,
    directories: Sequence[pathlib.Path] | None = None,
) -> list[Host]:
    """Start `pit-jax COMMAND` for every command, one process each, as hosts of one run where there are several."""
    count, port = len(commands), free_port()
    several = [f"--coordinator_address=localhost:{port}", f"--process_count={count}"] if count > 1 else []
    return [
        spawn(
            [sys.executable, "-m", "pit_jax", *command, *several, *([f"--process_id={number}"] if several else [])],
            logs / f"host_{number}.log",
            devices=devices,
            environment={},
            directory=ROOT if directories is None else directories[number],
        )
        for number, command in enumerate(commands)
    ]


def finish(hosts: Sequence[Host], seconds: float = 1800.0) -> None:
    """Wait until all have ended well."""
    statuses = [host.wait(seconds) for host in hosts]
    assert not any(statuses), f"{statuses}\n" + "\n".join(host.said() for host in hosts)


def pipeline(
    directory: pathlib.Path, settings: Mapping[str, Any], recipe: str, *, processes: int, devices: int
) -> None:
    """Run a whole recipe on so many processes with so many devices each."""
    command = ["pipeline", *flags(directory, settings, recipe)]
    finish(start(directory.parent / f"{directory.name}_logs", [command] * processes, devices=devices))


def wait_for(path: pathlib.Path, seconds: float) -> None:
    """Wait until a file or directory is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear within {seconds:g} s"
        time.sleep(0.05)


def records(directory: pathlib.Path, stage: str) -> list[dict[str, Any]]:
    """Return the metric records of a stage without what depends on the machine."""
    lines = [json.loads(line) for line in (directory / stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("timing/")} for line in lines]
