"""What the hosts of a run do in step: agree on what they are about to do, and share one directory.

Process 0 alone writes small files; the others wait for it and then see what it wrote. With one process nothing of this
costs anything.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from pit_jax.core.errors import ProcessError
from pit_jax.data.source import Source
from pit_jax.io import files
from pit_jax.sharding import processes

_VISIBLE_SECONDS = 60.0
"""Network file systems remember for up to this long that a file was not there."""
_PACKAGES = ("pit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "tokenizers")


def agree_on_settings(settings: dict[str, Any]) -> None:
    """Check that all processes are about to do the same, with the same packages.

    Raises:
      ProcessError: one differs; it is named, with the first setting or version it differs in.
    """
    if processes.count() > 1:
        processes.agree("start", {"settings": settings, "versions": versions()})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def same_everywhere(source: Source, name: str) -> Source:
    """Return a source, after checking that all processes have the same examples in it.

    Raises:
      ProcessError: one has others; it is named.
    """
    processes.agree(f"data of {name}", {"examples": source.fingerprint})
    return source


def write(name: str, action: Callable[[], object], *paths: epath.Path) -> None:
    """Let process 0 run `action`, which writes `paths`; return where every process sees them.

    Args:
      name: what is done, for errors.
      action: what writes.
      paths: files or directories that exist afterwards.

    Raises:
      PitError: what `action` has raised, on all processes.
      ProcessError: this process does not see what process 0 has written.
    """

    def act() -> None:
        action()

    processes.first(name, act)
    for path in paths:
        if not processes.is_first() and not _appears(path):
            raise ProcessError(
                f"{path} was written by process 0, and this process does not see it. MODEL_DIR must be storage that "
                "all hosts share: NFS, Filestore, Lustre, or gs://."
            )


def check_shared(directory: epath.Path) -> None:
    """Check that all processes see what process 0 writes to a run's directory.

    Raises:
      ProcessError: some do not; they are named.
    """
    if processes.count() == 1:
        return
    name = f".seen_by_all_{uuid.uuid4().hex[:12]}"
    name = processes.first("file for all", lambda: _mark(directory, name))
    seen = processes.gather("shared storage", _appears(directory / name))
    if processes.is_first():
        (directory / name).unlink(missing_ok=True)
    blind = [process for process, sees in enumerate(seen) if not sees]
    if blind:
        raise ProcessError(
            f"MODEL_DIR = {str(directory)!r} is not shared: {processes.named(blind)} cannot see what "
            f"{processes.named([0])} writes there. Use storage that all hosts mount (NFS, Filestore, Lustre), or gs://."
        )


def _mark(directory: epath.Path, name: str) -> str:
    files.write_text(directory / name, "Every host of the run must see this file. It may be deleted.\n")
    return name


def _appears(path: epath.Path) -> bool:
    """Return whether a path exists, waiting for it; a listing of its directory is asked for, which is less cached."""
    end = time.monotonic() + min(_VISIBLE_SECONDS, processes.silence())
    while True:
        if path.exists() or (path.parent.exists() and any(entry.name == path.name for entry in path.parent.iterdir())):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
