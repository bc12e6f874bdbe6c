"""How far judges agree: raw agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha, with bootstrap intervals.

Votes are an array [items, judges] of categories (any numbers, such as +1, 0, -1), NaN where a judge gave none.
A measure is NaN where it is not defined: nothing was voted on twice, or all votes are of one category.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.evaluation import bootstrap
from pit_jax.evaluation.bootstrap import Interval

Votes = Float[np.ndarray, "items judges"]
Sums = Float[np.ndarray, "draws m"]
Weights = Literal["none", "linear", "quadratic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure of agreement with its 95 % interval; items: those that it rests on."""

    name: str
    value: float
    ci95: Interval
    items: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two judges: the share of items on which they say the same, and their kappa."""

    first: str
    second: str
    raw: Measure
    kappa: Measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a number of judges agree: all pairs, and all together.

    raw and alpha rest on every item with two votes or more, fleiss on those that have a vote of every judge.
    """

    pairs: tuple[Pair, ...]
    raw: Measure
    alpha: Measure
    fleiss: Measure


def agreement(names: Sequence[str], votes: Votes, groups: Sequence[str], *, seed: int) -> Agreement:
    """Return all measures of a table of votes.

    Args:
      names: of the judges, one a column.
      votes: the table.
      groups: the prompt (or prompt group) of each item, for the clustered intervals.
      seed: of the bootstrap.
    """
    if votes.ndim != 2 or votes.shape[1] != len(names) or len(names) < 2:
        raise invalid("votes", votes.shape, f"be [items, {len(names)}] for at least two judges", "Check the names.")
    pairs = tuple(
        Pair(
            first=names[i],
            second=names[j],
            raw=raw(votes[:, [i, j]], groups, seed=seed),
            kappa=cohen(votes[:, i], votes[:, j], groups, seed=seed),
        )
        for i, j in itertools.combinations(range(len(names)), 2)
    )
    complete = np.all(~np.isnan(votes), axis=1)
    return Agreement(
        pairs=pairs,
        raw=raw(votes, groups, seed=seed),
        alpha=krippendorff(votes, groups, seed=seed),
        fleiss=fleiss(votes[complete], _only(groups, complete), seed=seed),
    )


def cohen(
    first: Float[np.ndarray, " items"],
    second: Float[np.ndarray, " items"],
    groups: Sequence[str],
    *,
    seed: int,
    weights: Weights = "none",
) -> Measure:
    """Return Cohen's kappa of two judges, over the items on which both voted.

        kappa = 1 - sum_ij w_ij p_ij / sum_ij w_ij p_i. p_.j

    with w = 0 on the diagonal and elsewhere 1 (none), |i - j| (linear) or (i - j)^2 (quadratic), i and j being the
    places of the categories in order (Cohen 1960, 1968).
    """
    if weights not in ("none", "linear", "quadratic"):
        raise invalid("weights", weights, "be 'none', 'linear' or 'quadratic'", "Correct it.")
    votes = np.stack([first, second], axis=1)
    there = np.all(~np.isnan(votes), axis=1)
    kinds, codes = np.unique(votes[there], return_inverse=True)
    codes = codes.reshape(-1, 2)
    size = len(kinds)
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(np.float64)
    cost = {"none": np.minimum(distance, 1), "linear": distance, "quadratic": distance**2}[weights]

    def statistic(sums: Sums) -> Float[np.ndarray, " draws"]:
        table = sums.reshape(-1, size, size)
        table = table / table.sum(axis=(1, 2), keepdims=True)
        chance = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
        return 1 - _ratio((cost * table).sum(axis=(1, 2)), (cost * chance).sum(axis=(1, 2)))

    cells = np.eye(size * size)[codes[:, 0] * size + codes[:, 1]]
    name = "Cohen's kappa" if weights == "none" else f"Cohen's kappa, {weights} weights"
    return _measure(name, cells, _only(groups, there), statistic, seed)


def raw(votes: Votes, groups: Sequence[str], *, seed: int) -> Measure:
    """Return the share of pairs of votes on the same item that are equal; items with one vote do not count."""
    counts, there = _counts(votes)
    each = counts.sum(axis=1)
    rows = np.stack([np.sum(counts * (counts - 1), axis=1), each * (each - 1)], axis=1)
    return _measure("raw agreement", rows, _only(groups, there), lambda sums: _ratio(sums[:, 0], sums[:, 1]), seed)


def fleiss(votes: Votes, groups: Sequence[str], *, seed: int) -> Measure:
    """Return Fleiss' kappa of votes without gaps (Fleiss 1971).

        kappa = (P - Pe) / (1 - Pe),  P = mean_i sum_k n_ik (n_ik - 1) / (m (m - 1)),  Pe = sum_k p_k^2

    with n_ik votes for category k on item i, m judges, and p_k the share of k in all votes.

    Raises:
      ConfigError: a vote is missing; `krippendorff` allows that.
    """
    if np.isnan(votes).any():
        raise invalid("votes", f"{int(np.isnan(votes).sum())} missing", "be complete", "Use krippendorff instead.")
    counts, there = _counts(votes)
    judges = votes.shape[1]
    same = np.sum(counts * (counts - 1), axis=1) / (judges * (judges - 1))

    def statistic(sums: Sums) -> Float[np.ndarray, " draws"]:
        items = sums[:, -1]
        expected = np.sum((sums[:, 1:-1] / (judges * items[:, None])) ** 2, axis=1)
        return _ratio(sums[:, 0] / items - expected, 1 - expected)

    rows = np.column_stack([same, counts, np.ones(len(counts))])
    return _measure("Fleiss' kappa", rows, _only(groups, there), statistic, seed)


def krippendorff(votes: Votes, groups: Sequence[str], *, seed: int) -> Measure:
    """Return Krippendorff's alpha for nominal categories; votes may be missing.

        alpha = 1 - (N - 1) sum_u sum_{k != l} n_uk n_ul / (n_u - 1)  /  sum_{k != l} N_k N_l

    over the units u with at least two votes (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").
    """
    counts, there = _counts(votes)
    each = counts.sum(axis=1)
    differing = (each**2 - np.sum(counts**2, axis=1)) / (each - 1)

    def statistic(sums: Sums) -> Float[np.ndarray, " draws"]:
        totals = sums[:, 1:]
        size = totals.sum(axis=1)
        return 1 - _ratio((size - 1) * sums[:, 0], size**2 - np.sum(totals**2, axis=1))

    return _measure("Krippendorff's alpha", np.column_stack([differing, counts]), _only(groups, there), statistic, seed)


def _counts(votes: Votes) -> tuple[Float[np.ndarray, "units k"], np.ndarray]:
    """Return how many judges chose each category, for items with at least two votes, and which items these are."""
    kinds = np.unique(votes[~np.isnan(votes)])
    counts = np.sum(votes[:, :, None] == kinds, axis=1).astype(np.float64)
    there = counts.sum(axis=1) >= 2
    return counts[there], there


def _only(groups: Sequence[str], there: Iterable[bool]) -> list[str]:
    return [group for group, here in zip(groups, there, strict=True) if here]


def _ratio(above: Float[np.ndarray, " draws"], below: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    """Return above / below, NaN where below is zero (up to rounding)."""
    defined = np.abs(below) > 1e-12
    return np.where(defined, above / np.where(defined, below, 1.0), np.nan)


def _measure(
    name: str, rows: Float[np.ndarray, "n m"], groups: Sequence[str], statistic: Callable[[Sums], np.ndarray], seed: int
) -> Measure:
    if len(rows) == 0:
        return Measure(name=name, value=float("nan"), ci95=Interval(float("nan"), float("nan")), items=0)
    value = float(statistic(rows.sum(axis=0)[None])[0])
    return Measure(name=name, value=value, ci95=bootstrap.interval(rows, groups, statistic, seed=seed), items=len(rows))
