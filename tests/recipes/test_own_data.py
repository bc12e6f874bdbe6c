"""What the README says about own data works, word for word, in an empty directory."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMALL = (
    "TRAIN_STEPS=2",
    "RL_STEPS=1",
    "BATCH_SIZE=4",
    "EVAL_PROMPTS=4",
    "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}",
    "decoder_only.DecoderOnlyConfig.width=16",
    "decoder_only.DecoderOnlyConfig.layers=1",
    "decoder_only.DecoderOnlyConfig.head_dim=4",
    "decoder_only.DecoderOnlyConfig.mlp=16",
    "rl.RlTraining.contexts=2",
    "rl.RlTraining.evaluation_prompts=4",
    "run.Experiment.tensorboard=False",
)
"""What makes a recipe for own data small enough for a test."""


@pytest.fixture
def empty(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a directory with nothing in it but a user's preferences."""
    rows = ({"prompt": f"Say {n}", "chosen": f"It is {n}.", "rejected": f"It is {n + 1}."} for n in range(150))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _command(recipe: str) -> list[str]:
    """Return the arguments of the README's command that names a recipe or an option."""
    lines = README.replace("\\\n", " ").splitlines()
    (found,) = (line for line in lines if line.startswith("pit-jax") and recipe in line)
    return shlex.split(found)[1:]


def _program() -> str:
    """Return the README's Python that registers a data set."""
    (found,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "register" in block)
    return found


def _run(directory: pathlib.Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pit_jax", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_at_most_five_lines() -> None:
    lines = [line for line in _program().splitlines() if line.strip()]
    assert len(lines) + 1 <= 5  # and the command


def test_a_file_is_checked(empty: pathlib.Path) -> None:
    assert "150 records" in _run(empty, *_command("--input=mine.jsonl"))


def test_a_registered_set_trains(empty: pathlib.Path) -> None:
    (empty / "my_tasks.py").write_text(_program())
    _, *flags = _command("recipes/seqio.gin")
    _run(empty, "sft", "--role=policy", *flags, *(f"--gin.{setting}" for setting in SMALL))
    assert json.loads((empty / "runs/mine/sft_policy/done.json").read_text())["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["recipes/jsonl.gin", "recipes/seqio.gin"])
def test_the_whole_of_pit_runs_on_it(recipe: str, empty: pathlib.Path) -> None:
    (empty / "my_tasks.py").write_text(_program())
    _run(empty, *_command(recipe), *(f"--gin.{setting}" for setting in SMALL))
    assert (empty / "runs/mine/report/report.html").exists()
