"""Gin files become objects; whatever is misspelt, missing or unused is an error that says where and what instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pit_jax.cli.gin_config import GinSource, bindings_in, build
from pit_jax.core.errors import ConfigError

PARTS = """
import dataclasses
from pit_jax.core.errors import invalid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float
    warmup: int = 10

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise invalid("Optimizer.learning_rate", self.learning_rate, "be positive", "Try 1e-3.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    role: str
    steps: int
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    model_dir: str
    stages: list
    lengths: dict
"""
BASE = """
from __gin__ import dynamic_registration
import pit_jax_gin_parts as parts

MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 5
LEARNING_RATE = 1e-3
LENGTHS = {'inputs': 3, 'targets': 4}

parts.Optimizer.learning_rate = %LEARNING_RATE
parts.Sft:
  steps = %TRAIN_STEPS
  optimizer = @parts.Optimizer()
policy/parts.Sft.role = 'policy'
improver/parts.Sft.role = 'improver'
improver/parts.Optimizer.warmup = 20
parts.Recipe:
  model_dir = %MODEL_DIR
  lengths = %LENGTHS
  stages = [@policy/parts.Sft(), @improver/parts.Sft()]
"""
MODEL_DIR = "MODEL_DIR = 'runs/a'"


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make the classes importable, once: gin's registry lives as long as the process."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "pit_jax_gin_parts.py").write_text(PARTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base.gin").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _build(*bindings: str, files: tuple[str, ...] = ("base.gin",), **options: Any) -> tuple[Any, str]:
    return build(GinSource(files=files, bindings=bindings, **options), "pit_jax_gin_parts:Recipe")


def _message(*bindings: str, files: tuple[str, ...] = ("base.gin",)) -> str:
    with pytest.raises(ConfigError) as caught:
        _build(*bindings, files=files)
    return str(caught.value)


def test_builds_plain_objects_with_scopes() -> None:
    recipe, _ = _build(MODEL_DIR)
    assert recipe.model_dir == "runs/a"
    assert recipe.lengths == {"inputs": 3, "targets": 4}
    assert [(s.role, s.steps, s.optimizer.warmup) for s in recipe.stages] == [("policy", 5, 10), ("improver", 5, 20)]


def test_flags_override_files_and_the_last_file_wins(folder: Path) -> None:
    (folder / "mine.gin").write_text("include 'base.gin'\nTRAIN_STEPS = 7\nMODEL_DIR = 'runs/mine'\n")
    assert _build(files=("mine.gin",))[0].stages[0].steps == 7
    assert _build("TRAIN_STEPS = 9", files=("mine.gin",))[0].stages[0].steps == 9
    (folder / "more.gin").write_text("TRAIN_STEPS = 8\n")
    assert _build(files=("mine.gin", "more.gin"))[0].stages[0].steps == 8
    recipe, _ = _build(MODEL_DIR, "policy/parts.Sft.steps = 1", "parts.Sft.steps = 2")
    assert [stage.steps for stage in recipe.stages] == [1, 2]


def test_text_is_read_back_as_the_same_object(folder: Path) -> None:
    recipe, text = _build(MODEL_DIR, "LEARNING_RATE = 0.5")
    (folder / "config.gin").write_text(text)
    again, text_again = _build(files=("config.gin",))
    assert again == recipe
    assert text_again == text
    assert bindings_in(text)["LEARNING_RATE"] == "0.5"


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("TRAIN_STEP = 7", ["TRAIN_STEP ", "nothing uses it", "'TRAIN_STEPS'", "--gin.TRAIN_STEP = 7"]),
        ("Sft.step = 7", ["no parameter 'step'", "'steps'", "--gin.Sft.step"]),
        ("Sfd.steps = 7", ["nothing called 'Sfd'", "'Sft'"]),
        ("LEARNING_RATE = %LEARNING_RAT", ["LEARNING_RAT is required", "'LEARNING_RATE'"]),
        ("LEARNING_RATE = -1.0", ["Optimizer.learning_rate = -1.0 must be positive", "base.gin:10", "--gin.LEARNING"]),
        ("LEARNING_RATE = 'big'", ["Optimizer.learning_rate = 'big' must be a number", "base.gin:10", "--gin.LEARN"]),
        ("Sft.steps = 2.5", ["Sft.steps = 2.5 must be a whole number", "--gin.Sft.steps"]),
        ("Sft.steps = True", ["Sft.steps = True must be a whole number"]),
        ("Sft.optimizer = 3", ["Sft.optimizer = 3 must be @Optimizer()"]),
    ],
)
def test_wrong_bindings_name_the_right_one(binding: str, expected: list[str]) -> None:
    message = _message(MODEL_DIR, binding)
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize("value", ["runs/demo", "/data/runs", "demo", "gs://bucket/run"])
def test_unquoted_strings_are_explained(value: str) -> None:
    message = _message(f"MODEL_DIR={value}")
    assert f"--gin.MODEL_DIR=\"'{value}'\"" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("TRAIN_STEPZ = 3", ["bad.gin:3", "'TRAIN_STEPS'"]),
        ("parts.Sft.stepz = 3", ["bad.gin:3", "no parameter 'stepz'", "'steps'"]),
        ("parts.Sfd.steps = 3", ["bad.gin:3", "'parts.Sfd' does not exist", "'Sft'"]),
        ("partz.Sft.steps = 3", ["bad.gin:3", "'partz'", "not imported", "'parts'"]),
        ("import pit_jax_gin_partz", ["bad.gin:3", "no module 'pit_jax_gin_partz'"]),
        ("include 'bose.gin'", ["bad.gin:3", "'bose.gin'", "'base.gin'"]),
        ("include 'bad.gin'", ["includes itself"]),
        ("TRAIN_STEPS = 3 4", ["bad.gin:3", "newline"]),
        ("TRAIN_STEPS = [1,", ["bad.gin"]),
        ("parts.Recipe.lengths = %LENGTH", ["LENGTH is required (bad.gin:3)", "'LENGTHS'"]),
    ],
)
def test_wrong_files_name_file_and_line(folder: Path, line: str, expected: list[str]) -> None:
    header = "from __gin__ import dynamic_registration\nimport pit_jax_gin_parts as parts\n"
    (folder / "bad.gin").write_text(f"{header}{line}\n{MODEL_DIR}\n")
    message = _message(files=("base.gin", "bad.gin"))
    for part in expected:
        assert part in message, message


def test_a_value_that_scopes_bind_differently_is_looked_for() -> None:
    rates = ("policy/parts.Optimizer.learning_rate = -2.0", "improver/parts.Optimizer.learning_rate = 1.0")
    message = _message(MODEL_DIR, *rates)
    assert message.startswith("Optimizer.learning_rate = -2.0 must be positive")
    assert f"set at --gin.{rates[0]}" in message and rates[1] not in message


def test_required_macros_are_all_named(folder: Path) -> None:
    (folder / "more.gin").write_text("TRAIN_STEPS = %gin.REQUIRED  # how long to train\n")
    message = _message(files=("base.gin", "more.gin"))
    assert "MODEL_DIR is required (base.gin:5)" in message
    assert "TRAIN_STEPS, how long to train, is required (more.gin:1)" in message
    assert "--gin.MODEL_DIR=VALUE" in message


def test_unbound_field_is_named(folder: Path) -> None:
    (folder / "little.gin").write_text(
        "from __gin__ import dynamic_registration\nimport pit_jax_gin_parts as parts\nparts.Recipe.model_dir = 'a'\n"
    )
    message = _message(files=("little.gin",))
    assert "Recipe needs 'stages' and 'lengths'" in message


def test_defaults_fill_only_what_is_required_and_unbound() -> None:
    assert _build(defaults=("MODEL_DIR='scratch'", "OTHER=1"))[0].model_dir == "scratch"
    assert _build(MODEL_DIR, defaults=("MODEL_DIR='scratch'",))[0].model_dir == "runs/a"


def test_search_order(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Current directory, then search paths in order; the same for included files."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for place, steps in ((second, 2), (first, 1)):
        (place / "steps.gin").write_text(f"TRAIN_STEPS = {steps}\n")
    (folder / "top.gin").write_text("include 'base.gin'\ninclude 'steps.gin'\nMODEL_DIR = 'a'\n")
    paths = (str(first), str(second))
    assert _build(files=("top.gin",), search_paths=paths)[0].stages[0].steps == 1
    assert _build(files=("top.gin",), search_paths=paths[::-1])[0].stages[0].steps == 2
    (folder / "steps.gin").write_text("TRAIN_STEPS = 3\n")
    assert _build(files=("top.gin",), search_paths=paths)[0].stages[0].steps == 3


def test_missing_file_lists_where_it_was_looked_for(folder: Path) -> None:
    message = _message(files=("bass.gin",))
    assert "'base.gin'" in message
    assert str(folder) in message
    assert "--gin_search_paths" in message


def test_file_that_is_not_text(folder: Path) -> None:
    (folder / "binary.gin").write_bytes(b"\xff\xfe\x00")
    assert "binary.gin" in _message(files=("binary.gin",))


def test_task_modules_come_from_user_first_then_from_pit_jax(tmp_path: Path) -> None:
    """A user's own `tasks` package is not shadowed, and still finds the shipped modules it lacks."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    (tmp_path / "tasks" / "mine.py").write_text("NAME = 'mine'\n")
    program = (
        "from pit_jax.cli import shipped; import importlib.util, tasks.mine\n"
        "shipped.make_importable(); shipped.make_importable()\n"
        "print(tasks.mine.NAME, importlib.util.find_spec('tasks.hh_rlhf').origin, importlib.util.find_spec('tasks.no'))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mine", str(root / "tasks" / "hh_rlhf.py"), "None"]
