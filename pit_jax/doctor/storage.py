"""Can MODEL_DIR be written, read and emptied, is there room, and is it one place for all hosts?"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from pit_jax.doctor.report import Check, ok, problem, warning
from pit_jax.io import files

SMALL = 2 * 10**9
"""Bytes below which not even the demo's checkpoints are sure to fit."""

VOLATILE = ("tmpfs", "ramfs", "overlay")
"""File systems whose content is gone when the machine or the container is."""


_TRIES, _PAUSE = 20, 0.1
"""How often, and after how many seconds, what another host may have disturbed is tried again."""


def check_storage(directory: str) -> list[Check]:
    """Write, read and remove a small file in `directory`, which is made where needed and left as it was.

    Other hosts may be doing the same: whoever has made a folder removes it, so it can be gone before a file is in it.
    """
    folder, text, back = epath.Path(directory), uuid.uuid4().hex, ""
    start = time.perf_counter()
    for left in reversed(range(_TRIES)):
        try:
            back = _written(folder, text)
            break
        except OSError as error:
            if left and isinstance(error, FileNotFoundError):
                time.sleep(_PAUSE)
                continue
            fix = "Check the path and your rights to it (for gs://: gcloud auth application-default login)."
            return [problem("storage", f"{directory}: {error}", fix)]
    milliseconds = (time.perf_counter() - start) * 1e3
    if back != text:
        return [problem("storage", f"{directory} gives back other bytes than were written", "Use another place.")]
    found = f"{directory}: wrote, read and removed a file in {milliseconds:.0f} ms"
    return [ok("storage", found), *_room(directory)]


def _written(folder: epath.Path, text: str) -> str:
    """Return what a file in the folder holds after `text` was written to it; nothing is left behind."""
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    with there(folder):
        try:
            probe.write_text(text)
            return probe.read_text()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)


@contextlib.contextmanager
def there(folder: epath.Path) -> Iterator[None]:
    """Make a folder and those above it, where they are not there, for as long as the context lasts."""
    made: list[epath.Path] = []
    try:
        _make(folder, made)
        yield
    finally:
        _remove(made)


def _make(folder: epath.Path, made: list[epath.Path]) -> None:
    """Make a folder and those above it, noting which; object stores have no folders."""
    if not files.is_local(folder) or folder.exists():
        return
    _make(folder.parent, made)
    with contextlib.suppress(FileExistsError):  # Another host was faster.
        folder.mkdir()
        made.append(folder)


def _remove(folders: list[epath.Path]) -> None:
    for folder in reversed(folders):
        for _ in range(_TRIES):
            try:
                Path(folder).rmdir()  # epath raises a ValueError of its own
                break
            except OSError:  # The file of another host is in it, or this one's, which could not be removed.
                time.sleep(_PAUSE)


def _room(directory: str) -> list[Check]:
    free = files.free_bytes(directory)
    if free is None:
        return []
    found = f"{free / 1e9:.1f} GB free"
    kind = file_system(Path(directory).absolute())
    checks = [warning("free disk", found, "Free some space.") if free < SMALL else ok("free disk", found)]
    if kind in VOLATILE:
        fix = "For more than a trial name a disk or a bucket that stays."
        checks.append(warning("kind of disk", f"{kind}: gone when this machine or container is", fix))
    return checks


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the kind of file system that `path` is or will be on ("ext4", "nfs4", ...), or "" where unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        place, name = line.split()[1:3]
        inside = os.path.commonpath((place, os.fspath(path))) == place
        if inside and len(place) >= len(best):
            best, kind = place, name
    return kind
