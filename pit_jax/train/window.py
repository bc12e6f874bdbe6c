"""What the training loop measures between two records: sums of metrics, and the time that steps take."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import monitoring

from pit_jax.core.metric import Metrics
from pit_jax.io.writers import TIMING

TOKENS = "tokens"
"""Name of the metric whose total is the number of tokens a step has processed; it gives tokens per second."""


class Window:
    """Sums of the metrics since the last record; on the host in float64, added step by step.

    Adding in the order of the steps makes the sums the same whether or not a restart lies between.
    """

    def __init__(self, saved: Mapping[str, list[float]] | None = None) -> None:
        """Start with nothing, or with what `to_json` of an earlier process gave."""
        self._sums = {name: (pair[0], pair[1]) for name, pair in (saved or {}).items()}
        self._pending: list[tuple[int, Metrics]] = []
        self.steps = 0

    def add(self, step: int, metrics: Metrics) -> None:
        """Take a step's metrics and start their way to the host."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._pending.append((step, metrics))
        self.steps += 1

    def settle(self) -> tuple[int, str] | None:
        """Add up what is pending; return (step, what is wrong) for the first step whose loss is not finite."""
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        for (step, _), metrics in zip(pending, fetched, strict=True):
            loss, flag = metrics["loss"], metrics.get("loss_is_finite")
            if not math.isfinite(loss.total) or (flag is not None and flag.total < flag.weight):
                named = {name: float(metrics[name].total) for name in ("loss", "grad_norm") if name in metrics}
                return step, ", ".join(f"{name} = {value:g}" for name, value in named.items())
            for name, (total, weight) in metrics.items():
                before = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (before[0] + float(total), before[1] + float(weight))
        return None

    def values(self) -> dict[str, float]:
        """Return total / weight of every metric, 0 where there is no weight."""
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sorted(self._sums.items())}

    @property
    def tokens(self) -> float:
        """Tokens processed, 0 where the program does not count them."""
        return self._sums.get(TOKENS, (0.0, 0.0))[0]

    def to_json(self) -> dict[str, list[float]]:
        """Return the sums; Python writes floats so that they are read back exactly."""
        return {name: list(pair) for name, pair in self._sums.items()}


class Phases:
    """Wall time of what a program does in turn, such as making a batch and updating; one phase at a time.

    What is dispatched ahead takes the time that the host waits for it.
    """

    def __init__(self) -> None:
        """Start in no phase."""
        self._seconds: dict[str, float] = {}
        self._name: str | None = None
        self._since = 0.0

    def enter(self, name: str | None) -> None:
        """End the phase there is, if any, and begin another; None begins none."""
        now = time.monotonic()
        if self._name is not None:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now

    def read(self) -> dict[str, float]:
        """Return the seconds of every phase since the last time; the present one goes on."""
        self.enter(self._name)
        seconds, self._seconds = self._seconds, {}
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count what happens inside to no phase."""
        name = self._name
        self.enter(None)
        try:
            yield
        finally:
            self.enter(name)


class Compilation:
    """Seconds that jax has spent on compiling, in all threads, while this is open (a context manager)."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._seconds, self._lock = 0.0, threading.Lock()

    def __enter__(self) -> Compilation:
        """Begin to listen."""
        monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self._seconds += duration_secs

    def read(self) -> float:
        """Return the seconds since the last time."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


class Clock:
    """Time spent on steps since `restart`, without evaluation and saving."""

    def __init__(self, phases: Phases, compilation: Compilation, began: float | None = None) -> None:
        """Start now, or at a moment before of `time.monotonic`."""
        self._phases, self._compilation = phases, compilation
        self._begin = time.monotonic() if began is None else began
        self._first: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch of steps; what was compiled before the first belongs to its record."""
        self._since, self._away = time.monotonic(), 0.0
        self._phases.read()

    def first_step(self) -> float:
        """Return the seconds from the start to now, when the first step is done; the next record has them too."""
        self._first = time.monotonic() - self._begin
        return self._first

    def read(self, steps: int, tokens: float) -> dict[str, float]:
        """Return the timing fields of a record over `steps` steps.

        seconds: since the start. steps_per_second, tokens_per_second: of this record's steps. NAME_seconds: of a phase,
        mean over the steps. data_share: of the phase "data", 0 to 1. compile_seconds: since the last record, where any.
        first_step_seconds: from the start to the end of the first step, in the first record.
        """
        now = time.monotonic()
        seconds = max(now - self._since - self._away, 1e-9)
        fields = {"steps_per_second": steps / seconds, "seconds": now - self._begin}
        if tokens:
            fields["tokens_per_second"] = tokens / seconds
        phases, compiled = self._phases.read(), self._compilation.read()
        fields |= {f"{name}_seconds": spent / steps for name, spent in phases.items()}
        if "data" in phases:
            fields["data_share"] = phases["data"] / max(sum(phases.values()), 1e-9)
        if compiled:
            fields["compile_seconds"] = compiled
        if self._first is not None:
            fields["first_step_seconds"], self._first = self._first, None
        return {TIMING + name: value for name, value in fields.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[Any]:
        """Leave out what happens inside; yields a function that gives its seconds afterwards."""
        begin, spent = time.monotonic(), [0.0]
        try:
            with self._phases.paused():
                yield lambda: spent[0]
        finally:
            spent[0] = time.monotonic() - begin
            self._away += spent[0]
