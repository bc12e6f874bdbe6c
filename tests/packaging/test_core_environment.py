"""An environment made from requirements/core.txt alone trains the whole of PIT, RL included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pit_jax.io import files

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("core_pipeline.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the environment: what core.txt names, and pit_jax without its dependencies."""
    uv = Path(sys.executable).with_name("uv")
    folder = tmp_path_factory.mktemp("core")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache", "shared")
    shutil.copytree(ROOT, source, ignore=ignored)
    interpreter = folder / "venv" / "bin" / "python"
    for command in (
        ("venv", "--python", sys.executable, str(folder / "venv")),
        ("pip", "install", "--python", str(interpreter), "-r", str(ROOT / "requirements" / "core.txt")),
        ("pip", "install", "--python", str(interpreter), "--no-deps", str(source)),
    ):
        done = subprocess.run([str(uv), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return interpreter


@pytest.mark.slow
def test_the_whole_of_pit_trains_in_the_core_environment(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-P", str(PROGRAM), "run"],
        cwd=tmp_path, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = files.read_json(tmp_path / "run" / "report" / "report.json")
    assert {"pit", "pit_raw", "best_of_2"} <= {row["candidate"] for row in report["comparisons"]}
    assert (tmp_path / "run" / "rl_improver" / "result.json").exists()


@pytest.mark.slow
def test_recipes_say_what_they_need_there(python: Path, tmp_path: Path) -> None:
    command = [str(python), "-P", "-m", "pit_jax", "pipeline", "--gin_file=recipes/demo.gin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "pit-jax pipeline: Recipes need gin, which is not installed here: pip install gin-config.\n"
