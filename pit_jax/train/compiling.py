"""Compiling a stage's programs ahead of their first calls, several at a time.

A function of `jax.jit` that is lowered with shapes, and compiled, has its executable when it is called with arrays of
these shapes at these places: jax remembers lowered programs by their traces, and a lowered program its executable.
Tracing holds Python's lock and is done by the caller; XLA does not, and works in threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

from pit_jax.train.window import Compilation

FEWEST_CORES, MOST_THREADS = 4, 8
"""With fewer cores threads do not pay: on CPUs XLA's own keep 1.7 cores busy. No stage has many more programs."""

When = Literal["first", "later"]
"""When a program is called: in the first step, or in what comes after it."""

_T = TypeVar("_T")


class Lowered(Protocol):
    """A program as `jax.jit(...).lower` returns it."""

    def compile(self) -> Any:
        """Return the executable; the program remembers it."""
        ...


Listed = tuple[When, Callable[[], Lowered]]
"""When a program is called, and what lowers it."""


class Compiling:
    """The programs of one stage that are being compiled; a context manager for as long as the stage runs.

    Errors of the compiler are raised by `wait`, on the thread that would have met them in a call.
    """

    def __init__(self, threads: int = 0, programs: Callable[[], Iterable[Listed]] = tuple) -> None:
        """Compile nothing yet.

        Args:
          threads: that compile; 0 leaves programs to be compiled by their first calls.
          programs: lists the stage's programs, on all hosts the same in the same order.
        """
        self.compilation = Compilation()
        self._threads, self._programs = threads, programs
        self._functions: dict[str, Any] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._listed: list[Listed] = []
        self._pending: list[tuple[Lowered, Future[Any]]] = []

    def __enter__(self) -> Compiling:
        """Begin to measure, and to remember functions."""
        self._functions = {}
        self.compilation.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Give up what has not begun; what has goes on, for XLA cannot be stopped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.compilation.__exit__()
        self._functions, self._pool, self._listed, self._pending = None, None, [], []

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """Return what `make` makes, within a stage the same each time: jit knows programs by their function."""
        if self._functions is None:
            return make()
        if name not in self._functions:
            self._functions[name] = make()
        return self._functions[name]

    def start(self) -> None:
        """Lower the programs of the first step, and compile each as soon as it is lowered."""
        if self._threads and self._functions is not None and self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="compiling")
            self._listed = list(self._programs())
            self._submit("first")

    def go_on(self) -> None:
        """Do the same for what comes after the first step, which is done: it was not to wait for them."""
        self._submit("later")

    def _submit(self, when: When) -> None:
        for due, lower in self._listed:
            if due == when and self._pool is not None:
                lowered = lower()
                self._pending.append((lowered, self._pool.submit(lowered.compile)))
        self._listed = [(due, lower) for due, lower in self._listed if due != when]

    def wait(self) -> None:
        """Wait for the programs that are being compiled; call it before theirs.

        Raises:
          JaxRuntimeError: the compiler refused one.
        """
        for _, future in self._pending:
            future.result()
        self._pending = []


def threads(setting: int | None) -> int:
    """Return how many threads are to compile: the setting, or for None one for each core, up to a number."""
    cores = os.cpu_count() or 1
    if setting is None:
        return min(cores, MOST_THREADS) if cores >= FEWEST_CORES else 0
    return setting
