"""Where `pit-jax improve` puts its rows: JSON Lines, written as they come.

Standard output gets every row at once. A file FILE is made as

    FILE.part     the settings, then the rows so far; flushed after each portion
    FILE          all rows, in one step when the last one is there; FILE.part is then removed

so that FILE is always whole, `tail -f FILE.part` shows how far it is, and after Ctrl-C, a crash or a kill the same
command goes on where the rows end. An object store cannot be appended to: there FILE appears at the end, and an
interrupted command begins anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pit_jax.core.errors import DataError
from pit_jax.io import files

_LOG = logging.getLogger(__name__)
Row = dict[str, Any]
PART = ".part"
_SETTINGS = "pit-jax improve"
_HEAD = f'{{"{_SETTINGS}": '.encode()


class Output(Protocol):
    """Takes rows, in order; only process 0 calls it."""

    def begin(self) -> list[Row]:
        """Get ready, and return the rows that an interrupted command has left."""
        ...

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows so that they are seen, and not lost if this process ends."""
        ...

    def finish(self) -> None:
        """Say that all rows are there."""
        ...

    def other(self, difference: str) -> DataError:
        """Return the error for rows that were left by another command."""
        ...

    def close(self) -> None:
        """Let go of what is open, whether all rows are there or not."""
        ...


def open_output(path: str | None, settings: Mapping[str, Any]) -> Output:
    """Return where rows go: standard output without a path.

    Args:
      path: of the file.
      settings: what decides the rows; a file that was begun with others is refused.
    """
    if path is None:
        return Printed()
    return PartFile(path, settings) if files.is_local(path) else AtTheEnd(path)


def as_line(row: Row) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _changed(rows: Sequence[Row]) -> str:
    return f"{sum(bool(row.get('changed')) for row in rows)} of {len(rows)} responses changed"


class Printed:
    """Standard output."""

    def begin(self) -> list[Row]:
        """Return no rows."""
        return []

    def add(self, rows: Sequence[Row]) -> None:
        """Print rows, and flush, for whoever reads them may wait for each."""
        sys.stdout.write("".join(map(as_line, rows)))
        sys.stdout.flush()

    def finish(self) -> None:
        """Do nothing more."""

    def other(self, difference: str) -> DataError:
        """Return an error; nothing is ever left here."""
        return DataError(difference)

    def close(self) -> None:
        """Leave standard output open."""


class AtTheEnd(Printed):
    """A file where nothing can be appended to."""

    def __init__(self, path: str) -> None:
        self._path, self._rows = path, list[Row]()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows until all are there."""
        self._rows += rows

    def finish(self) -> None:
        """Write the file."""
        files.write_text(self._path, "".join(map(as_line, self._rows)))
        _LOG.info("%s: %s", self._path, _changed(self._rows))


class PartFile:
    """A file that is continued."""

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self._path, self._part = path, pathlib.Path(path + PART)
        self._settings = json.loads(json.dumps(settings))
        self._file = -1

    def begin(self) -> list[Row]:
        """Open the part file; return its rows, if there are any. A line that was cut short is removed.

        Raises:
          DataError: it was begun with other settings, is no such file, or another process is writing it.
        """
        self._part.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock()
        with self._part.open("rb") as file:
            head = file.read(len(_HEAD))
        if not _HEAD.startswith(head):
            raise self.other("its first line has no settings")
        lines, whole = self._lines()
        os.ftruncate(self._file, whole)
        if not lines:
            self._write(as_line({_SETTINGS: self._settings}))
            return []
        self._check(lines[0])
        if lines[1:]:
            _LOG.info("%s: going on after the %d rows that are there", self._part, len(lines) - 1)
        return lines[1:]

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; they survive the end of this process, and a power failure."""
        self._write("".join(map(as_line, rows)))

    def finish(self) -> None:
        """Give the file its name."""
        lines, _ = self._lines()
        files.write_text(self._path, "".join(map(as_line, lines[1:])))
        self._part.unlink()
        _LOG.info("%s: %s", self._path, _changed(lines[1:]))

    def close(self) -> None:
        """Close the part file, and so give up its lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def other(self, difference: str) -> DataError:
        """Return the error for a file that was begun by another command."""
        return DataError(
            f"{self._part} was begun by another command: {difference}. Run that command again to finish it, delete the "
            "file, or use another --output."
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks: then it is up to the user.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataError(
                    f"{self._part} is being written by another process. Wait for it, or use another --output."
                ) from error

    def _lines(self) -> tuple[list[Row], int]:
        """Return the whole lines, and the bytes they take."""
        data = self._part.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            return [json.loads(line) for line in data[:whole].splitlines()], whole
        except ValueError as error:
            raise self.other(f"it holds a line that is not JSON ({error})") from error

    def _check(self, first: Row) -> None:
        begun = first[_SETTINGS]
        for name in [*self._settings, *begun]:
            if begun.get(name) != self._settings.get(name):
                raise self.other(f"{name} = {begun.get(name)!r} there, {self._settings.get(name)!r} here")

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
