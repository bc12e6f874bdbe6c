"""Programs compiled in processes of their own, at most two at a time, each different one once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

from pit_jax.core.errors import ConfigError, PitError
from pit_jax.plan.orders import Compiled, Listed, Lowered, Order, Refused, read, write
from pit_jax.plan.topology import Target, describe
from pit_jax.plan.verdict import Planned, estimate
from pit_jax.stages.pipeline import Recipe

WORKERS = 2
_TAIL = 2000
_LOG = logging.getLogger(__name__)


class CompilerError(PitError):
    """The process that compiles has ended, or cannot do what it was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One program to be compiled: `recipe`'s mesh is that of the machine."""

    recipe: Recipe
    stage: str
    program: str


class Pool:
    """Workers for one machine; use it as a context manager.

    What was compiled once is not compiled again: stages share programs, and so do the tries of a search.
    """

    def __init__(self, machine: Target, workers: int = WORKERS) -> None:
        self.machine = machine
        self.compilations = 0
        self._workers = workers
        self._free: list[_Worker] = []
        self._lock = threading.Lock()
        self._known: dict[str, concurrent.futures.Future[Compiled]] = {}

    def __enter__(self) -> Pool:
        """Return itself; workers start with the first order."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        for worker in self._free:
            worker.close()

    def programs(self, recipe: Recipe, stage: str) -> Listed:
        """Return the names of a stage's programs.

        Raises:
          ConfigError: the stage's batches do not suit the mesh.
          CompilerError: the compiler cannot be used here.
        """
        answer = self._ask(Order(recipe=recipe, machine=self.machine, stage=stage))
        if isinstance(answer, Refused):
            raise ConfigError(f"Stage {stage!r} on {self.machine}: {answer.message}")
        assert isinstance(answer, Listed)
        return answer

    def plan(self, jobs: Sequence[Job]) -> Iterator[Planned]:
        """Yield what is known of each program, in order, as soon as it is known.

        Raises:
          ConfigError: a program cannot even be traced.
        """
        with concurrent.futures.ThreadPoolExecutor(self._workers) as executor:
            futures = [executor.submit(self._plan, job) for job in jobs]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _plan(self, job: Job) -> Planned:
        order = Order(recipe=job.recipe, machine=self.machine, stage=job.stage, program=job.program)
        with self._worker() as worker:
            lowered = worker.ask(order)
            if isinstance(lowered, Refused):
                raise ConfigError(f"Stage {job.stage!r}, program {job.program!r}: {lowered.message}")
            assert isinstance(lowered, Lowered)
            compiled = self._compiled(worker, dataclasses.replace(order, digest=lowered.digest))
        memory = compiled.memory
        if memory is not None:
            memory = dataclasses.replace(memory, residents=lowered.residents, total=memory.total + lowered.residents)
        planned = Planned(
            stage=job.stage,
            name=job.program,
            memory=memory,
            cost=compiled.cost,
            compiled=compiled.problem is None,
            seconds=compiled.seconds,
            available=self.machine.chip.memory,
            seconds_estimate=_estimated(compiled, self.machine),
            problem=compiled.problem,
            processor_seconds=compiled.processor_seconds,
        )
        _LOG.info("%s: %s", f"{job.stage} / {job.program}", _outcome(planned))
        return planned

    def _compiled(self, worker: _Worker, order: Order) -> Compiled:
        """Return the compilation of a lowered program: another worker's, if it has or is doing the same one."""
        assert order.digest is not None
        with self._lock:
            known = self._known.get(order.digest)
            mine = None if known is not None else concurrent.futures.Future[Compiled]()
            if mine is not None:
                self._known[order.digest] = mine
                self.compilations += 1
        if mine is None:
            assert known is not None
            return known.result()
        try:
            answer = worker.ask(order)
            if not isinstance(answer, Compiled):
                answer = Compiled(memory=None, cost=None, seconds=0.0, problem=str(answer))
        except CompilerError as error:
            answer = Compiled(memory=None, cost=None, seconds=0.0, problem=str(error))
        except BaseException as error:
            mine.set_exception(error)  # others may wait for it
            raise
        mine.set_result(answer)
        return answer

    def _ask(self, order: Order) -> Any:
        with self._worker() as worker:
            return worker.ask(order)

    def _worker(self) -> _Lease:
        with self._lock:
            return _Lease(self, self._free.pop() if self._free else _Worker(self.machine))

    def give_back(self, worker: _Worker) -> None:
        """Keep a worker for the next order, unless it has ended."""
        with self._lock:
            if worker.alive:
                self._free.append(worker)


class _Lease:
    """A worker for the length of a `with`."""

    def __init__(self, pool: Pool, worker: _Worker) -> None:
        self._pool, self._lent = pool, worker

    def __enter__(self) -> _Worker:
        return self._lent

    def __exit__(self, *_: object) -> None:
        self._pool.give_back(self._lent)


class _Worker:
    """One process of `plan.worker`, and what it has said on its standard error."""

    def __init__(self, machine: Target) -> None:
        from pit_jax.plan.devices import environment

        self._machine = machine
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pit_jax.plan.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **environment(machine), "PYTHONPATH": path},
        )

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def ask(self, order: Order) -> Any:
        """Return the answer to an order.

        Raises:
          CompilerError: the process has ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            write(self._process.stdin, order)
            return read(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            self._said.seek(0)
            tail = self._said.read().decode(errors="replace")[-_TAIL:].strip()
            what = f"stage {order.stage!r}" + (f", program {order.program!r}" if order.program else "")
            raise CompilerError(
                f"The process that compiles for {describe(self._machine)} ended with status {status} at {what}. "
                f"Its last words: {tail or 'none'}"
            ) from error

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def _estimated(compiled: Compiled, machine: Target) -> dict[str, float]:
    if compiled.cost is None or compiled.problem is not None:
        return {}
    return estimate(compiled.cost, machine.chip, machine.slices)


def _outcome(planned: Planned) -> str:
    took = f"{planned.seconds:.0f} s"
    if planned.memory is None:
        return f"not compiled ({took})"
    return f"{planned.memory.total / 2**30:.2f} GiB a chip, {'fits' if planned.fits else 'does not fit'} ({took})"
