"""A lock on a directory, so that two runs never write to one: a file that says who holds it, and that beats.

    DIRECTORY/lock.json   {"host", "boot", "pid", "started", "token", "beat"}; removed when the holder ends

A lock that was left behind is taken over. On the machine of its holder that is known at once: the process is gone.
On another machine it is watched: a holder that lives changes `beat` every `BEAT_SECONDS`, and one that has not for
`STALE_SECONDS` is dead. No two clocks are ever compared, so a clock that is wrong or runs backwards does no harm.

Object stores cannot create a file only where there is none. So who writes the file reads it again after a moment and
has the lock only if it is still the own one; and a holder whose file was replaced all the same (it slept for an
hour, say) finds out before it writes anything else: `check`.
"""

from __future__ import annotations

import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from etils import epath

from pit_jax.core.errors import CheckpointError, DataError
from pit_jax.io import files

LOCK = "lock.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 35.0
"""More than three beats: a busy disk may delay one."""
_SETTLE_SECONDS = 0.1
_LOG = logging.getLogger(__name__)


class Lock:
    """The lock of one directory, held from `acquire` to `release`."""

    def __init__(self, directory: epath.PathLike, *, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self.path = epath.Path(directory) / LOCK
        self._beat, self._stale = beat, stale
        self._own = _identity() | {"token": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._lost: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock, or that of a holder that is dead.

        Raises:
          CheckpointError: somebody else holds it; host and process are named. Or the directory cannot be written.
        """
        try:
            self._acquire()
        except OSError as error:
            fix = "Check its permissions and the free space, or use another MODEL_DIR."
            raise CheckpointError(f"{self.path.parent} cannot be written: {error}. {fix}") from error
        self._thread.start()

    def _acquire(self) -> None:
        holder = _read(self.path)
        if holder is not None:
            if self._lives(holder):
                raise self._taken(holder)
            _LOG.warning("%s was left behind by %s, which is gone; taken over", self.path, _named(holder))
        files.write_json(self.path, self._own | {"beat": 0})
        time.sleep(_SETTLE_SECONDS)
        now = _read(self.path)
        if now is None or now["token"] != self._own["token"]:
            raise self._taken(now)

    def release(self) -> None:
        """Stop beating and remove the file, if it is still the own one."""
        self._ended.set()
        self._thread.join()
        if self._lost is None and self._is_own(_read(self.path)):
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Check that the lock is still held; to be called before anything is written.

        Raises:
          CheckpointError: another process has taken it over.
        """
        if self._lost is not None:
            raise self._taken(self._lost)

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Return whether a holder is alive: at once on its own machine, else after watching its beat."""
        if all(holder[name] == self._own[name] for name in ("host", "boot")):
            return holder["started"] == _started(holder["pid"])
        _LOG.info(
            "%s is held by %s: watching for up to %.0f s whether it lives", self.path, _named(holder), self._stale
        )
        limit = time.monotonic() + self._stale
        while time.monotonic() < limit:
            time.sleep(min(self._beat, 1.0))
            now = _read(self.path)
            if now is None:
                return False
            if now != holder:
                return True
        return False

    def _keep_beating(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat):
            try:
                now = _read(self.path)
                if not self._is_own(now):
                    self._lost = now or {}
                    return
                beat += 1
                files.write_json(self.path, self._own | {"beat": beat})
            except OSError as error:  # A disk that is full or away for a moment is no reason to stop.
                _LOG.warning("%s could not be renewed: %s", self.path, error)

    def _is_own(self, content: dict[str, Any] | None) -> bool:
        return content is not None and content["token"] == self._own["token"]

    def _taken(self, holder: dict[str, Any] | None) -> CheckpointError:
        return CheckpointError(
            f"{self.path.parent} is in use by {_named(holder or {})}. Two runs would destroy each other's files: stop "
            f"that one, or use another MODEL_DIR. (If you are sure that it is gone, delete {self.path}.)"
        )


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def _read(path: epath.Path) -> dict[str, Any] | None:
    try:
        return files.read_json(path)
    except DataError:  # missing
        return None


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _boot() -> str | None:
    """Return what tells this machine from another of its name, and from itself before it was started anew."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process was started, None if there is none: its number alone may be used again.

    Where there is no /proc, a process that exists has "" for all times.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if pathlib.Path("/proc/self/stat").exists() else _exists(pid)
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] == "Z" else fields[19]


def _exists(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
