"""What is declared, locked and imported agrees."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RIM = {"gin-config", "importlib-resources", "seqio", "tensorflow", "tensorflow-datasets"}
# Import names that differ from the distribution's.
DISTRIBUTIONS = {"array_record": "array-record", "gin": "gin-config", "orbax": "orbax-checkpoint"}
# Imported lazily, and only where the user asks for what they do.
OPTIONAL = {
    "clu", "huggingface_hub", "hypothesis", "prometheus_client", "pytest", "starlette", "tensorboard", "torch",
    "transformers", "uvicorn", "wandb",
}  # fmt: skip


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=;@ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text()
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _declared() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_core_requirements_are_the_declared_ones_without_the_rim() -> None:
    assert sorted(_lines("core.txt")) == sorted(r for r in _declared() if _name(r) not in RIM)


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_lock_pins_every_dependency_and_names_no_host_or_path(version: str) -> None:
    lines = _lines(f"lock-{version}.txt")
    pinned = {_name(line) for line in lines}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in [*_declared(), *extras["dev"], *extras["serve"], *extras["tensorboard"]]:
        assert _name(requirement) in pinned, requirement
    assert all(re.match(r"[\w.-]+==[\w.]+( ;.*)?$", line) for line in lines)
    assert not re.search(
        r"://|--index|--find-links|/home|/root|/tmp", (ROOT / "requirements" / f"lock-{version}.txt").read_text()
    )


def test_t5x_is_pinned_to_commits() -> None:
    lines = _lines("t5x.txt")
    assert len(lines) == 3
    assert all(re.match(r"\w+ @ git\+https://github\.com/[\w./-]+@[0-9a-f]{40}$", line) for line in lines)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", ["pit_jax", "tasks"])
def test_everything_imported_is_declared(folder: str) -> None:
    declared = {_name(requirement) for requirement in _declared()}
    ours = {"pit_jax", "tasks"}
    undeclared = {
        f"{module} ({path.relative_to(ROOT)})"
        for path in (ROOT / folder).rglob("*.py")
        for module in _imports(path) - set(sys.stdlib_module_names) - ours - OPTIONAL
        if DISTRIBUTIONS.get(module, module).lower().replace("_", "-") not in declared
    }
    assert not undeclared
