"""Parts of an evaluation's report that are computed: ratings by both methods, and what length explains."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from pit_jax.evaluation import bootstrap, ratings
from pit_jax.evaluation.bootstrap import Interval
from pit_jax.evaluation.ratings import RatingConfig, RatingTable
from pit_jax.evaluation.summary import Summary, summarise
from pit_jax.evaluation.winrate import ResponseSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rated:
    """Ratings of a number of systems by one judge, by both methods; anchor: the rating that is fixed, if one is."""

    judge: str
    bradley_terry: RatingTable
    elo: RatingTable
    anchor: float | None


def rate(
    results: Mapping[tuple[str, str], Float[np.ndarray, " n"]],
    groups: Sequence[str],
    *,
    judge: str,
    seed: int,
    config: RatingConfig | None = None,
) -> Rated:
    """Return the ratings of systems of which pairs were compared, by Bradley-Terry and as in MT-Bench (ELO).

    Args:
      results: (first, second) -> outcome on each prompt: +1 first wins, -1 second wins, 0 tie, NaN no verdict.
      groups: the prompt (or prompt group) of each outcome.
      judge: who said so.
      seed: of the bootstrap and of the random orders.
      config: how; None takes the defaults.

    Raises:
      DataError: see `ratings.battles` and `ratings.bradley_terry`.
    """
    settings = config or RatingConfig()
    games = ratings.battles(results, groups)
    return Rated(
        judge=judge,
        bradley_terry=ratings.bradley_terry(games, settings, seed=seed),
        elo=ratings.elo(games, settings, seed=seed),
        anchor=None if settings.anchor is None else settings.at,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthRow:
    """What length explains of one comparison.

    difference: candidate's mean length minus the baseline's, in tokens. summary: Delta as it is and at equal lengths.
    longer: Delta, in points, if the judge always preferred the longer response; longer_ci95: its interval.
    """

    candidate: str
    baseline: str
    judge: str
    temperature_candidate: float
    temperature_baseline: float
    difference: float
    summary: Summary
    longer: float
    longer_ci95: Interval


def length_row(
    candidate: ResponseSet,
    baseline: ResponseSet,
    outcomes: Float[np.ndarray, " n"],
    *,
    groups: Sequence[str],
    judge: str,
    seed: int,
) -> LengthRow:
    """Return what length explains of a comparison.

        longer = 100 mean sign(length of candidate - length of baseline), over the comparisons with a verdict

    Args:
      candidate, baseline: the response sets, over the same prompts in the same order.
      outcomes: +1 candidate wins, -1 baseline wins, 0 tie, NaN no verdict.
      groups: the prompt (or prompt group) of each outcome.
      judge: who said so.
      seed: of the bootstrap.

    Raises:
      DataError: there is no verdict at all.
    """
    difference = np.asarray(candidate.lengths, np.float64) - np.asarray(baseline.lengths, np.float64)
    summary = summarise(outcomes, difference, groups, seed=seed)
    answered = ~np.isnan(outcomes)
    signs = np.sign(difference[answered])
    kept = [group for group, there in zip(groups, answered, strict=True) if there]
    low, high = bootstrap.mean_interval(signs, kept, seed=seed, bounds=(-1.0, 1.0))
    return LengthRow(
        candidate=candidate.name,
        baseline=baseline.name,
        judge=judge,
        temperature_candidate=candidate.temperature,
        temperature_baseline=baseline.temperature,
        difference=float(difference[answered].mean()),
        summary=summary,
        longer=100 * float(signs.mean()),
        longer_ci95=Interval(100 * low, 100 * high),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """Something an evaluation could not use: what, why, how many of how many; example: one of them, if there is."""

    what: str
    reason: str
    count: int
    total: int | None = None
    example: str = ""


def families(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return (family, iteration) of the systems that were iterated: NAME is 1, NAME_iter2 is 2, and so on.

    A system that was improved once only is in no family.
    """
    given = list(dict.fromkeys(names))
    found = {name: (match[1], int(match[2])) for name in given if (match := re.fullmatch(r"(.+)_iter(\d+)", name))}
    stems = {family for family, _ in found.values()}
    return {name: found.get(name, (name, 1)) for name in given if name in found or name in stems}
