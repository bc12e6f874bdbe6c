"""launch/local.sh turns a recipe's name into the pipeline's command, and leaves quotes and spaces alone."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PIT_JAX": "my pit-jax", "PATH": "/usr/bin:/bin"}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("recipe", ["demo", "recipes/demo.gin"])
def test_dry_run_shows_the_command(recipe: str) -> None:
    done = _run(recipe, "runs/a b", "--gin.TOKENIZER='my model'", "--dry-run", "--gin.RANDOM_SEED=2")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "my pit-jax",
        "pipeline",
        "--gin_file=recipes/demo.gin",
        "--gin.MODEL_DIR='runs/a b'",
        "--gin.TOKENIZER='my model'",
        "--gin.RANDOM_SEED=2",
    ]


def test_runs_the_program_and_returns_its_status() -> None:
    done = subprocess.run(
        [SCRIPT, "demo", "runs/a"], capture_output=True, text=True, env={"PIT_JAX": "false", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 1


def test_usage() -> None:
    assert "RECIPE MODEL_DIR" in _run("--help").stdout
    wrong = _run("demo")
    assert wrong.returncode == 2
    assert "RECIPE MODEL_DIR" in wrong.stderr
