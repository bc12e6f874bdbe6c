"""Looks that may hang or end the process are made by a process of their own, which can be given up.

    python -m pit_jax.doctor.probe        reads a request (JSON) from standard input, writes findings a line

A line is `{"begin": name}` before a step, `{"check": {...}}` after it, or `{"process": 1, "processes": 4}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, TextIO

from pit_jax.core.errors import PitError
from pit_jax.doctor.report import Check, from_dict, problem

WORDS = 600
"""Characters of a failed probe's last words that are shown."""

_FATAL = re.compile(r"F\d{4} ")
"""Beginning of the line with which XLA ends a process, before a page of addresses."""

FIXES: Mapping[str, str] = {
    "start": "Run it again with --debug, or python -c 'import jax'.",
    "hosts": "Start the same line on every host at the same time, and check that all reach the port of process 0.",
    "devices": "Is another process using the accelerator? End it, or start the machine anew; see the message.",
    "collective": "The devices do not reach each other: check firewalls, and that all hosts are of one job.",
    "storage": "Check the path, the network, and your rights (for gs://: gcloud auth application-default login).",
}
"""What to do where a step neither succeeded nor said why not."""

_BROKEN: Mapping[str, str] = {
    "start": "Python and jax did not start",
    "hosts": "the processes did not all come together",
    "devices": "jax did not get its devices",
    "collective": "the devices did not exchange data",
    "storage": "MODEL_DIR could not be written and read",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What a probe has found; `process` and `processes` are those of this host in its job."""

    checks: tuple[Check, ...]
    process: int = 0
    processes: int = 1


def run(request: Mapping[str, Any], timeout: float) -> Findings:
    """Make a request in a process of its own, and give it up after `timeout` seconds without a word.

    Args:
      request: {"kind": "storage", "directory": ...} or {"kind": "devices", ...}: the fields of Examination.
      timeout: seconds.
    """
    checks: list[Check] = []
    numbers = {"process": 0, "processes": 1}
    step, ended = "start", False
    with tempfile.TemporaryFile() as words:
        child = _start(request, words)
        for line in _lines(child, timeout):
            if line is None:
                child.kill()
                break
            said = json.loads(line)
            if "begin" in said:
                step = said["begin"]
            elif "check" in said:
                checks.append(from_dict(said["check"]))
            elif "end" in said:
                ended = True
            else:
                numbers = said
        else:
            ended = _wait(child, timeout) == 0 and ended
            if not ended:
                checks.append(_failed(step, f"ended with status {child.returncode}", words))
            return Findings(checks=tuple(checks), **numbers)
        child.wait()
        checks.append(_failed(step, f"no answer within {timeout:g} s", words))
    return Findings(checks=tuple(checks), **numbers)


def _failed(step: str, what: str, words: BinaryIO) -> Check:
    last = _last(words)
    found = f"{_BROKEN.get(step, step)}: {what}{'. ' if last else ''}{last}"
    return problem(step, found, FIXES.get(step, FIXES["start"]))


def _start(request: Mapping[str, Any], words: BinaryIO) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pit_jax.doctor.probe"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:  # It may have ended already; why is said later.
        child.stdin.write(json.dumps(request).encode())
    return child


def _wait(child: subprocess.Popen[bytes], timeout: float) -> int:
    """Return a child's status; one that cannot end although it has said everything is killed."""
    try:
        return child.wait(timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return 0


def _lines(child: subprocess.Popen[bytes], timeout: float) -> Iterator[bytes | None]:
    """Yield the child's lines, or None when it has been silent for too long."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=timeout)
        except queue.Empty:
            yield None
            return
        if not line:
            return
        yield line


def _last(words: BinaryIO) -> str:
    """Return the last words on standard error in one line: those that ended the process, else the last few."""
    words.seek(0)
    lines = [line.strip() for line in words.read().decode("utf-8", "replace").splitlines()]
    fatal = [line.rpartition("absl::Status: ")[2] for line in lines if _FATAL.match(line)]
    if fatal:
        return fatal[-1][-WORDS:]
    said = [line for line in lines if line and not line.startswith(("@ ", "*** "))]
    return " / ".join(said[-3:])[-WORDS:]


def answer(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the lines that answer a request."""
    yield {"begin": "start"}
    if request["kind"] == "devices":
        yield from _devices(request)
        return
    from pit_jax.doctor.storage import check_storage

    yield {"begin": "storage"}
    yield from ({"check": dataclasses.asdict(check)} for check in check_storage(request["directory"]))
    yield {"end": True}


def _devices(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from pit_jax.doctor.devices import Examination, examine
    from pit_jax.doctor.machine import Accelerators
    from pit_jax.sharding import processes
    from pit_jax.sharding.mesh import MeshConfig

    what = Examination(
        cluster=None if request["cluster"] is None else processes.Cluster(**request["cluster"]),
        mesh=None if request["mesh"] is None else MeshConfig(**request["mesh"]),
        storage=request["storage"],
        accelerators=Accelerators(**request["accelerators"]),
        versions=request["versions"],
        checks=tuple(from_dict(check) for check in request["checks"]),
        timeout=request["timeout"],
    )
    try:
        for said in examine(what):
            if isinstance(said, str):
                yield {"begin": said}
            else:
                yield {"check": dataclasses.asdict(said)} if isinstance(said, Check) else said
    except PitError as error:
        print(error, file=sys.stderr)
        processes.leave(1, "the doctor could not go on there")
        sys.exit(1)
    yield {"end": True}
    processes.leave(0, "")


def main() -> None:
    """Answer the request on standard input; whatever libraries print goes to standard error."""
    out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in answer(json.load(sys.stdin)):
        print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
