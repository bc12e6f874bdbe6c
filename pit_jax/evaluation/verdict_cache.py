"""Replies that were paid for, on disk: an interrupted run continues, and nothing is paid twice.

    PATH        one JSON object a line: {"key", "text", "finish", "model", "prompt_tokens", "completion_tokens"}
    PATH.lock   empty; bytes of it are locked

What is kept are the judges' replies and not the verdicts read from them, so a better parser needs no new replies. A
line is appended by one call of the operating system, and lost by `kill -9` at no moment; a line that was cut short
(full disk, power failure) is skipped and asked again. A process that asks a question holds the lock of the one byte of
PATH.lock that its key falls on: other processes wait for the reply instead of paying for another one. The kernel
releases these locks when a process dies, however it dies. They need a file system with POSIX locks: a local disk or
NFS 4, no object store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pit_jax.core.errors import DataError
from pit_jax.io import files

_LOG = logging.getLogger(__name__)
VERSION = 1
SYNC_SECONDS = 1.0
"""Lines written within this time of each other reach the disk together: a power failure loses no more than these."""
_APPEND = 1 << 60
"""The byte of the lock file that stands for the right to append; those of keys lie below."""


def key_of(request: Mapping[str, Any]) -> str:
    """Return the name of a request in the cache: a hash of everything that decides the reply."""
    return files.json_hash({"version": VERSION, **request})


class ReplyCache:
    """Replies by key, in a file that several processes may share; safe to be used by several threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not files.is_local(path):
            raise DataError(f"The cache of replies {os.fspath(path)} must be on a disk of this machine. Move it there.")
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._locks = _locks_of(self._path.with_name(self._path.name + ".lock"))
        self._mutex = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self._read_to = 0
        self._synced = time.monotonic()
        self._refresh()

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of replies."""
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return a reply, also one that another process has appended just now; None if there is none."""
        with self._mutex:
            self._refresh()
            place = self._places.get(key)
            return None if place is None else json.loads(os.pread(self._file, place[1], place[0]))

    def put(self, key: str, reply: Mapping[str, Any]) -> None:
        """Append a reply.

        Raises:
          DataError: it cannot be written, for example because the disk is full.
        """
        line = json.dumps({"key": key, **reply}, ensure_ascii=False).encode("utf-8", errors="surrogatepass") + b"\n"
        try:
            with self._mutex, self._locks.appending():
                if not self._ends_with_a_line():
                    line = b"\n" + line
                while line:
                    line = line[os.write(self._file, line) :]
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    self._sync()
        except OSError as error:
            raise DataError(
                f"A reply could not be written to {self._path}: {error.strerror}. The replies before it are safe; "
                "correct the cause, then run the same command again."
            ) from error

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold the right to ask for a key while inside; yields False, at once, if another has it.

        Whoever gets it must look with `get` once more: the reply may have come in between.
        """
        mine = self._locks.acquire(key)
        try:
            yield mine
        finally:
            if mine:
                self._locks.release(key)

    def sync(self) -> None:
        """Bring everything to the disk, so that it survives a power failure."""
        with self._mutex:
            self._sync()

    def close(self) -> None:
        """Bring everything to the disk and close the file."""
        with self._mutex:
            if self._file >= 0:
                self._sync()
                os.close(self._file)
                self._file = -1

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def _ends_with_a_line(self) -> bool:
        size = os.fstat(self._file).st_size
        return size == 0 or os.pread(self._file, 1, size - 1) == b"\n"

    def _refresh(self) -> None:
        """Read whole lines that were added since the last time; half a line may still be being written."""
        size = os.fstat(self._file).st_size
        if size <= self._read_to:
            return
        added = os.pread(self._file, size - self._read_to, self._read_to)
        broken = 0
        for line in added[: added.rfind(b"\n") + 1].splitlines(keepends=True):
            if key := _key_in(line):
                self._places[key] = (self._read_to, len(line))
            elif line.strip():
                broken += 1
            self._read_to += len(line)
        if broken:
            _LOG.warning("%s: %d lines are no replies; their questions will be asked again", self._path, broken)


def _key_in(line: bytes) -> str | None:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(reply, dict) and isinstance(reply.get("key"), str) and isinstance(reply.get("text"), str)
    return reply["key"] if whole else None


class _Locks:
    """Locks on single bytes of a file, between processes and between the threads of this one."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._mutex = threading.Lock()
        self._held: set[int] = set()

    def acquire(self, key: str) -> bool:
        """Take the byte of a key; return whether it was free."""
        place = _place(key)
        with self._mutex:
            # A process does not lock itself out, so its own locks are listed.
            if place in self._held or not self._take(place):
                return False
            self._held.add(place)
            return True

    def release(self, key: str) -> None:
        """Give the byte of a key back."""
        place = _place(key)
        with self._mutex:
            self._held.remove(place)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        """Wait for the right to append, and hold it while inside."""
        with self._mutex:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _APPEND)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _APPEND)

    def _take(self, place: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise DataError(
                f"The cache of replies cannot be locked: {error.strerror}. Put it on a local disk."
            ) from error
        return True


def _place(key: str) -> int:
    return int(key[:14], 16)


_KNOWN: dict[str, _Locks] = {}
_KNOWN_MUTEX = threading.Lock()


def _locks_of(path: pathlib.Path) -> _Locks:
    """Return the process's one handle on a lock file: closing any other one would release all its locks (POSIX)."""
    with _KNOWN_MUTEX:
        name = os.path.realpath(path)
        if name not in _KNOWN:
            _KNOWN[name] = _Locks(name)
        return _KNOWN[name]
