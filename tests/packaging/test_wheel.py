"""A built wheel works in an empty directory: it carries its recipes and tasks, and leaves gin-config alone."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """
from __gin__ import dynamic_registration
import tasks.shipped_example
from pit_jax.stages import pipeline
pipeline.Recipe.model_dir = %MODEL_DIR
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout that has one recipe and one task of known content."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "hatch_build.py", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("# pit_jax\n")
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ("pit_jax", "gin", "tasks"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    (copy / "gin" / "recipes" / "shipped_example.gin").write_text(RECIPE)
    (copy / "tasks" / "shipped_example.py").write_text("NAME = 'shipped'\n")
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(output)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel (it is pure Python, so installing is unpacking) beside the test environment's packages."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def _python(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cwd / ".cache")}
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_wheel_has_no_foreign_top_level_names(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"pit_jax"}
    shipped = {name.removeprefix("pit_jax/_shipped/") for name in names if "/_shipped/" in name}
    for folder, pattern in (("gin", "*.gin"), ("tasks", "*.py")):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}
        assert expected <= shipped
    assert not [name for name in shipped if name.startswith("gin/") and name.endswith(".py")]


def test_console_script_points_to_main(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    parsed = configparser.ConfigParser()
    parsed.read_string(archive.read(entry_points).decode())
    assert parsed["console_scripts"]["pit-jax"] == "pit_jax.cli.main:main"


def test_help_lists_the_shipped_recipes(site: Path, tmp_path: Path) -> None:
    done = _python(site, tmp_path, "-m", "pit_jax", "pipeline", "--help")
    assert done.returncode == 0, done.stderr
    assert "recipes/shipped_example.gin" in done.stdout


def test_shipped_files_and_gin_config_are_found_in_an_empty_directory(site: Path, tmp_path: Path) -> None:
    program = """
import gin, pit_jax
from pit_jax.cli import shipped
from pit_jax.cli.gin_files import Library
shipped.make_importable()
import tasks.shipped_example
print(pit_jax.__file__)
print(gin.__file__)
print(tasks.shipped_example.NAME)
print(Library().find("recipes/shipped_example.gin", "test"))
"""
    done = _python(site, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    package, gin, task, recipe = done.stdout.splitlines()
    assert Path(package).is_relative_to(site)
    assert not Path(gin).is_relative_to(site)
    assert task == "shipped"
    assert Path(recipe) == site / "pit_jax" / "_shipped" / "gin" / "recipes" / "shipped_example.gin"


def test_print_config_from_an_empty_directory(site: Path, tmp_path: Path) -> None:
    """A missing macro is reported for the shipped recipe: it was found, its task imported, its text parsed."""
    done = _python(
        site, tmp_path, "-m", "pit_jax", "pipeline", "--gin_file=recipes/shipped_example.gin", "--print_config"
    )
    assert done.returncode == 1
    assert "MODEL_DIR is required (recipes/shipped_example.gin:5)" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_recipe_from_an_empty_directory(site: Path, tmp_path: Path) -> None:
    """The shipped demo builds from the wheel, and what it prints is a configuration that builds again."""
    flags = ("--gin_file=recipes/demo.gin", "--gin.MODEL_DIR='runs/here'", "--gin.RANDOM_SEED=7", "--print_config")
    done = _python(site, tmp_path, "-m", "pit_jax", "pipeline", *flags)
    assert done.returncode == 0, done.stderr
    assert "MODEL_DIR = 'runs/here'" in done.stdout
    assert "RANDOM_SEED = 7" in done.stdout
    assert not (tmp_path / "runs").exists()
    (tmp_path / "config.gin").write_text(done.stdout)
    again = _python(site, tmp_path, "-m", "pit_jax", "pipeline", "--gin_file=config.gin", "--print_config")
    assert again.stdout == done.stdout
