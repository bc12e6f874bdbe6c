"""Bootstrap intervals of anything that is computed from sums over rows, resampling whole groups of rows.

Win rates, ratings, kappas and length-controlled win rates are all functions of sums: of outcomes, of games won, of
cells of a table. A bootstrap sample gives every group a number of times it was drawn, so its sums are one product of
matrices, and thousands of samples are made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from pit_jax.core.errors import invalid

Statistic = Callable[[Float[np.ndarray, "draws m"]], Float[np.ndarray, " draws"]]
# Numbers of a block of samples that are held in memory at once.
_BLOCK = 4_000_000
_LEAST_DEFINED = 0.5


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def members(groups: Sequence[str], rows: int) -> tuple[Int[np.ndarray, " n"], int]:
    """Return the number of each row's group, and how many groups there are.

    Raises:
      ConfigError: there are no rows, or not one group a row.
    """
    if rows == 0:
        raise invalid("rows", 0, "be at least 1", "Check that the evaluation has prompts and that judges answered.")
    if len(groups) != rows:
        raise invalid(
            "groups", f"{len(groups)} entries", f"have one entry for each of {rows} rows", "Name each prompt."
        )
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    return member, int(member.max()) + 1


def group_sums(rows: Float[np.ndarray, "n m"], groups: Sequence[str]) -> Float[np.ndarray, "g m"]:
    """Return the sums of each group's rows."""
    member, count = members(groups, len(rows))
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, member, rows)
    return sums


def drawn(count: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draws g"]:
    """Return how often each of `count` groups is drawn when `count` are drawn with replacement, `draws` times."""
    chosen = rng.integers(0, count, (draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float64)


def resample(sums: Float[np.ndarray, "g m"], *, seed: int, draws: int) -> Float[np.ndarray, "draws m"]:
    """Return the sums over all rows in each of `draws` bootstrap samples of the groups."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(sums))
    return np.concatenate([drawn(len(sums), min(block, draws - start), rng) @ sums for start in range(0, draws, block)])


def percentiles(
    values: Float[np.ndarray, "draws ..."], groups: int
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Return the ends of the 95 % expanded percentile interval.

    Plain percentiles are too narrow for few groups, by sqrt((g - 1) / g) and for want of Student's t. The tails
    are therefore cut at alpha' = Phi(t_{alpha/2, g-1} sqrt(g / (g - 1))) instead of alpha / 2 = 2.5 %
    (Hesterberg 2015, "What teachers should know about the bootstrap", section 3.4).

    Samples in which the statistic is not defined (NaN) are left out; where that is more than half of them, and
    where there is one group only, both ends are NaN.
    """
    missing = np.full(values.shape[1:], np.nan)
    if groups < 2:
        return missing, missing.copy()
    tail = float(special.ndtr(special.stdtrit(groups - 1, 0.025) * np.sqrt(groups / (groups - 1))))
    defined = np.mean(~np.isnan(values), axis=0) >= _LEAST_DEFINED
    kept = np.where(defined, values, 0.0)
    low, high = np.nanquantile(kept, [tail, 1 - tail], axis=0)
    return np.where(defined, low, missing), np.where(defined, high, missing)


def interval(
    rows: Float[np.ndarray, "n m"], groups: Sequence[str], statistic: Statistic, *, seed: int, draws: int = 2000
) -> Interval:
    """Return the 95 % interval of `statistic(sum of rows)`, resampling whole groups.

    Args:
      rows: what is summed; rows of one group (several samples for one prompt) are not independent.
      groups: the prompt (or prompt group) of each row.
      statistic: from sums of many samples to one value each; NaN where it is not defined.
      seed: of the bootstrap.
      draws: bootstrap samples.
    """
    sums = group_sums(rows, groups)
    low, high = percentiles(statistic(resample(sums, seed=seed, draws=draws)), len(sums))
    return Interval(float(low), float(high))


def mean_interval(
    values: Float[np.ndarray, " n"],
    groups: Sequence[str],
    *,
    seed: int,
    draws: int = 2000,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Return the 95 % interval of the mean of `values`, resampling whole groups.

    Args:
      values: such as outcomes or scores.
      groups: the prompt (or prompt group) of each value.
      seed: of the bootstrap.
      draws: bootstrap samples.
      bounds: least and greatest possible value. Where all values are equal, no resample differs from another; with
        bounds, the interval then allows for the share 1 - 0.025^(1/g) of groups with another value, which could
        have escaped g groups with probability 2.5 % (Clopper & Pearson 1934).
    """
    rows = np.stack([values, np.ones_like(values)], axis=1)
    found = interval(rows, groups, lambda sums: sums[:, 0] / sums[:, 1], seed=seed, draws=draws)
    if bounds is None or np.ptp(values) > 0:
        return found
    unseen = 1 - 0.025 ** (1 / len(set(groups)))
    value = float(values[0])
    return Interval(value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value))
