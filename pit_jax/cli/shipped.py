"""Where the gin files and tasks that come with pit_jax are: in a checkout, an editable install, or a wheel.

A checkout (editable or not) has `gin/` and `tasks/` beside the package; a wheel carries them inside it, in
`pit_jax/_shipped/`, because a top-level `gin` folder in site-packages would land in gin-config's own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pit_jax


def root() -> Path:
    """Return the folder that holds the shipped `gin/` and `tasks/`."""
    package = Path(pit_jax.__file__).resolve().parent
    shipped = package / "_shipped"
    return shipped if shipped.is_dir() else package.parent


def gin_directory() -> Path:
    """Return the folder of shipped gin files, to which `recipes/demo.gin` is relative."""
    return root() / "gin"


def recipes() -> list[str]:
    """Return the shipped recipes as they are named on the command line."""
    return _named("recipes/*.gin")


def studies() -> list[str]:
    """Return the shipped studies as they are named on the command line."""
    return _named("studies/*.gin")


def _named(pattern: str) -> list[str]:
    return sorted(path.relative_to(gin_directory()).as_posix() for path in gin_directory().glob(pattern))


class TaskFinder(importlib.abc.MetaPathFinder):
    """Imports `tasks` and `tasks.NAME` from the shipped folder where nothing else on the path provides them.

    It stands last in `sys.meta_path`, so a user's own package called `tasks` wins and still sees ours: a
    module it does not have is looked for among the shipped ones.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a shipped task module, or None for any other name."""
        del path, target
        package, _, module = fullname.partition(".")
        if package != "tasks":
            return None
        directory = root() / "tasks"
        if module:
            return importlib.machinery.PathFinder.find_spec(fullname, [str(directory)])
        return importlib.machinery.PathFinder.find_spec(fullname, [str(directory.parent)])


def make_importable() -> None:
    """Let `tasks.NAME` and modules of the current directory be imported, after everything installed.

    A console script does not have the current directory on its path while `python -m` does; users keep the
    module that registers their data there.
    """
    if not any(isinstance(finder, TaskFinder) for finder in sys.meta_path):
        sys.meta_path.append(TaskFinder())
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path and not sys.flags.safe_path:
        sys.path.append(here)
