"""Means, shares and correlations of held-out records, with intervals clustered by prompt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pit_jax.evaluation import bootstrap
from pit_jax.evaluation.bootstrap import Interval
from pit_jax.evaluation.document import Estimate


class Figure(NamedTuple):
    """A number with its 95 % interval, and the number of records behind it; NaN where it is not known."""

    value: float
    ci95: Interval
    n: int

    def cell(self, form: str) -> Estimate:
        """Return what a table shows."""
        known = not math.isnan(self.ci95.low)
        return Estimate(value=self.value, ci95=(self.ci95.low, self.ci95.high) if known else None, form=form)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON; null for a value that is not known, and for the interval of one prompt alone."""
        value = None if math.isnan(self.value) else self.value
        return {"value": value, "ci95": None if math.isnan(self.ci95.low) else list(self.ci95), "n": self.n}


def as_json(row: Any) -> Any:
    """Return a dataclass, mapping or list that holds figures as JSON."""
    if isinstance(row, Figure):
        return row.as_json()
    if dataclasses.is_dataclass(row):
        return as_json(vars(row))
    if isinstance(row, Mapping):
        return {name: as_json(value) for name, value in row.items()}
    return [as_json(value) for value in row] if isinstance(row, list | tuple) else row


UNKNOWN = Figure(float("nan"), Interval(float("nan"), float("nan")), 0)
_FEWEST = 3


def mean(
    values: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int, bounds: tuple[float, float] | None = None
) -> Figure:
    """Return the mean with its interval, `UNKNOWN` without values; arguments as of `bootstrap.mean_interval`."""
    if len(values) == 0:
        return UNKNOWN
    found = bootstrap.mean_interval(values, groups, seed=seed, bounds=bounds)
    return Figure(float(np.mean(values)), found, len(values))


def share(margin: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int) -> Figure:
    """Return the share of positive margins, a tie counted half, so that a constant measure has 0.5."""
    right = (margin > 0).astype(np.float64) + 0.5 * (margin == 0)
    return mean(right, groups, seed=seed, bounds=(0.0, 1.0))


def pearson(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int, draws: int = 2000
) -> Figure:
    """Return Pearson's correlation with its interval, resampling whole groups; `UNKNOWN` where a side is constant.

        r = (n Sab - Sa Sb) / ((n Saa - Sa^2) (n Sbb - Sb^2))^1/2

    Args:
      a, b: the two measures of each record.
      groups: the prompt (or prompt group) of each.
      seed: of the bootstrap.
      draws: bootstrap samples.
    """
    if len(a) < _FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return UNKNOWN
    # Shifted and scaled first, because the formula of sums loses digits where means are large.
    a, b = ((values - values.mean()) / values.std() for values in (a, b))
    rows = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
    found = bootstrap.interval(rows, groups, _from_sums, seed=seed, draws=draws)
    return Figure(float(_from_sums(rows.sum(axis=0)[None])[0]), found, len(a))


def spearman(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int, draws: int = 2000
) -> Figure:
    """Return Spearman's rank correlation, as Pearson's of the ranks in the whole sample; arguments as of `pearson`."""
    return pearson(ranks(a), ranks(b), groups, seed=seed, draws=draws)


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the rank of each value from 1 up; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _from_sums(sums: Float[np.ndarray, "draws 6"]) -> Float[np.ndarray, " draws"]:
    n, a, b, aa, bb, ab = sums.T
    spread = np.maximum(n * aa - a * a, 0.0) * np.maximum(n * bb - b * b, 0.0)
    # A sample of one record again and again has no correlation; rounding must not give it one.
    known = spread > 1e-12 * np.maximum(n * aa, 1e-300) * np.maximum(n * bb, 1e-300)
    return np.where(known, (n * ab - a * b) / np.sqrt(np.where(known, spread, 1.0)), np.nan)
