"""What the training loop measures between two records: sums of metrics, and the time that steps take."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

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


class Clock:
    """Time spent on steps since `restart`, without evaluation and saving."""

    def __init__(self) -> None:
        """Start now."""
        self._begin = time.monotonic()
        self._since = self._begin
        self._away = 0.0

    def restart(self) -> None:
        """Begin a new stretch of steps."""
        self._since, self._away = time.monotonic(), 0.0

    def read(self, steps: int, tokens: float) -> dict[str, float]:
        """Return the timing fields of a record over `steps` steps."""
        now = time.monotonic()
        seconds = max(now - self._since - self._away, 1e-9)
        rates = {TIMING + "steps_per_second": steps / seconds, TIMING + "seconds": now - self._begin}
        return rates | ({TIMING + "tokens_per_second": tokens / seconds} if tokens else {})

    @contextlib.contextmanager
    def paused(self) -> Iterator[Any]:
        """Leave out what happens inside; yields a function that gives its seconds afterwards."""
        begin, spent = time.monotonic(), [0.0]
        try:
            yield lambda: spent[0]
        finally:
            spent[0] = time.monotonic() - begin
            self._away += spent[0]
