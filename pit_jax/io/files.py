"""Small files: JSON written so that no reader ever sees half of it, digests, and free disk space.

Paths are anything `etils.epath` knows (`gs://` included). On a local disk a written file survives `kill -9`
at any moment and a power failure after the call has returned; object stores make each write atomic themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from typing import Any

from etils import epath

from pit_jax.core.errors import CheckpointError, DataError


def is_local(path: epath.PathLike) -> bool:
    """Return whether `path` lies on a file system of this machine, not behind a scheme such as `gs://`."""
    return "://" not in os.fspath(path)


def write_text(path: epath.PathLike, text: str) -> None:
    """Replace the file at `path` by `text` in one step, making its directory where needed.

    A reader, or a restart after a crash, sees the old content or the new, never a part of it.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(target):
        target.write_text(text)
        return
    temporary = f"{os.fspath(target)}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: epath.PathLike, data: Any) -> None:
    """Write JSON data in one step (see `write_text`), indented, keys in the order given."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: epath.PathLike) -> Any:
    """Return the content of a JSON file.

    Raises:
      DataError: the file is missing, not UTF-8 or not JSON; the place of the first fault is named.
    """
    source = epath.Path(path)
    try:
        return json.loads(source.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{source} does not exist. Check the path.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error


def json_hash(data: Any) -> str:
    """Return the SHA-256 of JSON data in hexadecimal; the order of an object's keys does not count."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def free_bytes(directory: epath.PathLike) -> int | None:
    """Return the free space of the disk that `directory` is or will be on, in bytes; None for remote paths."""
    if not is_local(directory):
        return None
    place = pathlib.Path(directory).absolute()
    for existing in (place, *place.parents):
        # Only the answer shows that a folder is there: another process may remove it after it was looked for.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return shutil.disk_usage(existing).free
    return None


def require_free(directory: epath.PathLike, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `directory`.

    Raises:
      CheckpointError: they do not; both numbers are named.
    """
    free = free_bytes(directory)
    if free is not None and free < needed:
        raise CheckpointError(
            f"{directory} has {free / 1e6:.1f} MB free and {needed / 1e6:.1f} MB are needed. "
            "Free some space, then run the same command again: nothing was overwritten."
        )
