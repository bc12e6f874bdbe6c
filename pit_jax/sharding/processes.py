"""Several processes as one run, by plain `jax.distributed`: every host runs the same line.

Whatever the processes do together has a name. `barrier`, `first` and `agree` go through the coordination service that
process 0 runs, not through the devices, so that they can say who is missing where a collective would only hang. With
one process they cost nothing.

A process that is gone is noticed while the others compute, too. Each gives a sign of life every few seconds; after
`Cluster.silence` seconds without one, or when a process reports that it ends with an error, all others say who it was
and end. Where process 0 itself dies, the coordination service dies with it, and the runtime ends the others at once.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed

from pit_jax.core import errors
from pit_jax.core.errors import PitError, ProcessError, invalid

PATIENCE = 1800.0
"""Seconds a barrier waits for a process that is alive: where one has a program in its cache, another compiles it."""
EXIT_LOST = 75
"""Exit status where another process is gone and the same command is worth another try (EX_TEMPFAIL)."""
_LONGEST = 24 * 3600.0
_ENDING = threading.Lock()
_BEAT, _GRACE, _LAST_WORDS = 1.0, 2.0, 6.0
_ROOT = "pit_jax"
_ENVIRONMENT = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS",),
    "count": ("JAX_PROCESS_COUNT", "JAX_NUM_PROCESSES"),
    "process": ("JAX_PROCESS_ID",),
}


class AbsentError(ProcessError):
    """A process did not come where the others wait; the command should return `EXIT_LOST`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a run; JAX finds out what is None on TPU VMs, GKE (TPU), SLURM and Open MPI.

    coordinator: `host:port` on which process 0 listens. count: how many processes there are. process: which of them
    this one is. silence: seconds without a sign of life after which a process counts as lost. start: seconds to wait
    for all processes at the start.
    """

    coordinator: str | None = None
    count: int | None = None
    process: int | None = None
    silence: float = 60.0
    start: float = 300.0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            fix = "Give the address of process 0 with a free port, such as 10.0.0.2:8476."
            raise invalid("coordinator_address", self.coordinator, "be HOST:PORT", fix)
        if self.count is not None and self.count < 1:
            raise invalid("process_count", self.count, "be at least 1", "Count the processes of all hosts.")
        if self.process is not None and not 0 <= self.process < (self.count or math.inf):
            fix = "Number the processes from 0."
            raise invalid("process_id", self.process, f"lie in 0..process_count - 1 (of {self.count})", fix)
        if self.silence <= 0 or self.start <= 0:
            raise invalid("process_timeout", min(self.silence, self.start), "be > 0", "Give seconds.")

    @property
    def given(self) -> tuple[str | int | None, ...]:
        """What has been said about the processes."""
        return (self.coordinator, self.count, self.process)


def cluster(settings: Cluster, environment: Mapping[str, str]) -> Cluster | None:
    """Return the cluster this process belongs to, None where it is on its own.

    What `settings` leave open is taken from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT (or JAX_NUM_PROCESSES) and
    JAX_PROCESS_ID; without any of these, a cluster is looked for where JAX knows how to find one.

    Raises:
      ConfigError: a number is none, or only a part of what is needed has been said.
    """
    found: dict[str, Any] = {}
    for field, names in _ENVIRONMENT.items():
        present = next((name for name in names if environment.get(name)), None)
        if present is not None:
            found[field] = environment[present] if field == "coordinator" else _number(present, environment[present])
    said = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    known = Cluster(**(found | said))
    detectable = _detectable(environment)
    if known.count == 1 or (known.given == (None, None, None) and not detectable):
        return None
    if None in known.given and not detectable:
        fix = "Give --coordinator_address, --process_count and --process_id, or the JAX_* variables of these names."
        raise invalid("coordinator_address, process_count, process_id", known.given, "be given together", fix)
    return known


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise invalid(name, text, "be a whole number", "Unset the variable, or mend it.")
    return int(text)


def _detectable(environment: Mapping[str, str]) -> bool:
    """Return whether this is one of several tasks of a launcher that JAX knows, or a TPU host, which may be one."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # set by `srun`, not by `salloc`
    if all(name in environment for name in slurm) and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    if environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
        if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1:
            return True
        # A plain TPU VM says nothing in its environment; JAX asks the metadata server who its neighbours are.
        chips = pathlib.Path("/dev/accel0").exists() or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
        return chips and not hosts and "TPU_SKIP_MDS_QUERY" not in environment
    return False


def join(cluster: Cluster | None) -> None:
    """Start `jax.distributed` where there are several processes; must come before anything uses a device.

    Raises:
      ProcessError: JAX could not find out who the others are. Where they do not come in time, the process ends.
    """
    if cluster is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    complete = None not in cluster.given
    # The runtime would end the process without a word that helps, so we are to be first; the same holds for silence.
    late = threading.Timer(cluster.start, _came_alone, [cluster])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator, cluster.count, cluster.process,
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=math.ceil(cluster.start) + 30,
            heartbeat_timeout_seconds=math.ceil(cluster.silence) + 30,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(
            f"{cluster}: the processes did not come together: {_first_line(error)}. Run the same line on every host, "
            "each with its own process_id, and check that all reach the port of process 0. On a TPU host that is on "
            "its own set TPU_SKIP_MDS_QUERY=1."
        ) from error
    finally:
        late.cancel()
    _client().key_value_set(f"{_ROOT}/host/{number()}", socket.gethostname())
    if count() > 1:
        _Watch.start_for(cluster.silence)


def is_first() -> bool:
    """Return whether this is the process that writes files and speaks; also true where it is the only one."""
    return number() == 0


def _came_alone(cluster: Cluster) -> None:
    """End a process that has waited too long for the others to start."""
    which = "" if cluster.process is None else f", process {cluster.process}"
    text = (
        f"pit-jax{which}: after {cluster.start:g} s the processes have not come together (coordinator_address = "
        f"{cluster.coordinator or 'as JAX found it'}, process_count = {cluster.count or 'as JAX found it'}). Start the "
        "same line on every host, each with its own process_id, and check that all reach the port of process 0."
    )
    os.write(2, f"\n{text}\n".encode())
    os._exit(EXIT_LOST)


def number() -> int:
    """Return the number of this process, 0 where it is the only one."""
    return distributed.global_state.process_id


def count() -> int:
    """Return the number of processes."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def silence() -> float:
    """Return the seconds after which another process counts as lost (`Cluster.silence`)."""
    return math.inf if _Watch.running is None else _Watch.running.silence


def gather(name: str, value: Any, timeout: float = PATIENCE) -> list[Any]:
    """Return what each process has passed, JSON data, in the order of the processes; all wait for each other.

    Raises:
      AbsentError: a process did not come; the missing ones are named.
    """
    if count() == 1:
        return [value]
    place = _numbered("gather", name)
    _client().key_value_set(f"{place}/{number()}", json.dumps(value))
    try:
        _client().wait_at_barrier(place, _milliseconds(timeout))
    except jax.errors.JaxRuntimeError as error:
        present = _at(place)
        missing = [process for process in range(count()) if process not in present]
        raise AbsentError(
            f"{name}: {named(missing) or 'a process'} did not come within {timeout:g} s; {named(sorted(present))} "
            "did. Look at the log of the one that is missing, then run the same command on all hosts again."
        ) from error
    found = _at(place)
    return [json.loads(found[process]) for process in range(count())]


def barrier(name: str, timeout: float = PATIENCE) -> None:
    """Wait until every process has come to the barrier of this name.

    Raises:
      AbsentError: a process did not come within `timeout` seconds; the missing ones are named.
    """
    gather(name, None, timeout)


def first(name: str, action: Callable[[], Any]) -> Any:
    """Run `action` on process 0 while the others wait, and return its result, JSON data, on all.

    Raises:
      PitError: `action` has raised one (or an OSError) on process 0; every process raises it.
    """
    if count() == 1:
        return action()
    client, key = _client(), _numbered("first", name)
    if is_first():
        try:
            result = action()
        except (PitError, OSError) as error:
            client.key_value_set(key, json.dumps({"error": type(error).__name__, "message": str(error)}))
            raise
        client.key_value_set(key, json.dumps({"result": result}))
        return result
    answer = json.loads(_wait_for(client, name, key))
    if "error" in answer:
        raise vars(errors).get(answer["error"], ProcessError)(answer["message"])
    return answer["result"]


def agree(name: str, value: Any) -> None:
    """Check that all processes hold the same JSON data.

    Raises:
      ProcessError: one differs from process 0; it is named, with the first thing it differs in.
    """
    values = gather(name, value)
    for process, other in enumerate(values):
        found = _difference(values[0], other, "")
        if found is not None:
            where, ours, theirs = found
            raise ProcessError(
                f"{name}: {named([process])} differs from {named([0])} in {where or 'the value'}: {theirs!r}, "
                f"not {ours!r}. Every host must run the same line with the same files and packages."
            )


def leave(status: int, reason: str) -> None:
    """End a process's part: with status 0, when all others have come to their end too, else at once.

    Does not return where there are several processes and the status is not 0, for the runtime's own way of ending
    would wait for the others. They are told the reason, and end as well.
    """
    if count() == 1:
        return
    if status == 0:
        barrier("end", _LONGEST)
        _Watch.stop()
        return
    error = sys.exc_info()[1]
    if error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    watched = _Watch.running is not None and "RESOURCE_EXHAUSTED" not in str(error)
    if watched and isinstance(error, jax.errors.JaxRuntimeError):
        # That is how collectives end when a process has died; the watch then finds out which, and ends this one.
        time.sleep(silence() + 2 * _GRACE)
    _ENDING.acquire()  # for good: where the watch ends this process already, its reason and its status count
    _Watch.stop()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # The coordination service may have gone before.
        told = json.dumps({"status": status, "message": f"{named([number()])} has ended: {reason}"})
        _client().key_value_set(f"{_ROOT}/lost/{number()}", told)
    _exit(status)


def _exit(status: int) -> NoReturn:
    """End at once; process 0 after the others, for with it ends the coordination service, by which they learn why."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_ROOT}/gone/{number()}", "")
        end = time.monotonic() + _LAST_WORDS
        while is_first() and len(_at(f"{_ROOT}/gone") | _at(f"{_ROOT}/lost")) < count() and time.monotonic() < end:
            time.sleep(0.1)
    os._exit(status)


class _Watch(threading.Thread):
    """Gives this process's signs of life, and ends it when another one is lost.

    Process 0 alone judges silence, for it alone cannot be cut off from the coordination service.
    """

    running: _Watch | None = None

    def __init__(self, silence: float) -> None:
        super().__init__(name="pit_jax watch", daemon=True)
        self.silence, self._over = silence, threading.Event()
        self._heard = {process: ("", time.monotonic()) for process in range(count())}

    @classmethod
    def start_for(cls, silence: float) -> None:
        """Start watching."""
        cls.running = cls(silence)
        cls.running.start()

    @classmethod
    def stop(cls) -> None:
        """Stop watching; what happens from now on is this process's own end."""
        if cls.running is not None:
            cls.running._over.set()

    def run(self) -> None:
        """Look and give signs until it is over."""
        beat = 0
        while not self._over.wait(min(self.silence / 10, _BEAT)):
            beat += 1
            try:
                lost = self._look(beat)
            except jax.errors.JaxRuntimeError as error:
                lost = {"status": EXIT_LOST, "message": f"{_ROOT}: process 0 is gone ({_first_line(error)})."}
            # What was lost may be the end that this process is just coming to by itself, with the better message.
            if lost is not None and not self._over.wait(_GRACE):
                _end(lost)

    def _look(self, beat: int) -> dict[str, Any] | None:
        _client().key_value_set(f"{_ROOT}/alive/{number()}", str(beat), allow_overwrite=True)
        if is_first():
            self._judge(_at(f"{_ROOT}/alive"))
        lost = _at(f"{_ROOT}/lost")
        return json.loads(lost[min(lost)]) if lost else None

    def _judge(self, signs: Mapping[int, str]) -> None:
        """Report the processes that have not changed their sign for too long."""
        now = time.monotonic()
        for process, sign in signs.items():
            if sign != self._heard[process][0]:
                self._heard[process] = (sign, now)
        silent = [process for process, (_, since) in self._heard.items() if now - since > self.silence]
        if silent:
            text = (
                f"{named(silent)} has given no sign of life for {self.silence:g} s: killed, out of memory, or cut "
                "off. Look at its log, then run the same command on all hosts again: the run goes on from its newest "
                "checkpoint."
            )
            value = json.dumps({"status": EXIT_LOST, "message": text})
            for process in silent:
                _client().key_value_set(f"{_ROOT}/lost/{process}", value, allow_overwrite=True)


def _end(lost: Mapping[str, Any]) -> NoReturn:
    process = number()
    # The main thread may wait for ever in a collective, so there is no one to raise to.
    _ENDING.acquire()
    os.write(2, f"\npit-jax, process {process}: {lost['message']}\n".encode())
    _exit(lost["status"])


def _wait_for(client: Any, name: str, key: str) -> str:
    """Return a value as soon as it is set; in slices, so that Ctrl-C is noticed."""
    end = time.monotonic() + _LONGEST
    while time.monotonic() < end:
        try:
            return client.blocking_key_value_get(key, 2_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise AbsentError(f"{name}: process 0 is gone ({_first_line(error)}). See its log.") from error
    raise AbsentError(f"{name}: process 0 did not finish this within {_LONGEST / 3600:g} hours. See its log.")


_NUMBERS: collections.Counter[str] = collections.Counter()


def _client() -> Any:
    """Return the connection to the coordination service; JAX has no public name for it."""
    return distributed.global_state.client


def _numbered(kind: str, name: str) -> str:
    """Return a key of its own for every use of a name: all processes use the names in the same order."""
    _NUMBERS[f"{kind}/{name}"] += 1
    return f"{_ROOT}/{kind}/{name}/{_NUMBERS[f'{kind}/{name}']}"


def _at(place: str) -> dict[int, str]:
    """Return what processes have set under a key, by their numbers."""
    found = _client().key_value_dir_get(f"{place}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}


def named(processes: list[int]) -> str:
    """Return processes with the names of their hosts, for messages."""
    hosts = _at(f"{_ROOT}/host")
    return ", ".join(f"process {number} ({hosts.get(number, 'host unknown')})" for number in processes)


def _difference(left: Any, right: Any, where: str) -> tuple[str, Any, Any] | None:
    """Return (path, left, right) of the first scalar in which two pieces of JSON data differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        pairs = [(str(key), left.get(key, "(absent)"), right.get(key, "(absent)")) for key in [*left, *right]]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = [(str(index), a, b) for index, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        return None if left == right else (where, left, right)
    below = (_difference(a, b, f"{where}.{key}" if where else key) for key, a, b in pairs)
    return next((found for found in below if found is not None), None)


def _milliseconds(seconds: float) -> int:
    return math.ceil(1000 * seconds)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
