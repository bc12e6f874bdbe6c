"""Win, lose, tie and Delta between two sets of responses, with bootstrap intervals clustered by prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.evaluation.bootstrap import mean_interval

MARGIN = 1e-9
"""Differences of scores up to this size are ties: equal but for rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of a win-rate table, in percentage points.

    delta = win - lose; ci95 is the expanded percentile bootstrap interval of delta over prompts.
    """

    candidate: str
    baseline: str
    judge: str
    n: int
    win: float
    lose: float
    tie: float
    delta: float
    ci95: tuple[float, float]
    temperature_candidate: float
    temperature_baseline: float
    seed: int
    mean_candidate: float
    mean_baseline: float
    length_candidate: float
    length_baseline: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseSet:
    """Responses of one system to the prompts of an evaluation, in the prompts' order."""

    name: str
    temperature: float
    responses: tuple[str, ...]
    lengths: tuple[int, ...]


def outcomes(
    candidate: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " n"], *, margin: float
) -> Float[np.ndarray, " n"]:
    """Return +1 where the candidate's score is higher by more than `margin`, -1 where lower, else 0."""
    difference = candidate - baseline
    return np.where(difference > margin, 1.0, np.where(difference < -margin, -1.0, 0.0))


def compare(
    candidate: ResponseSet,
    baseline: ResponseSet,
    scores: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]],
    *,
    groups: Sequence[str],
    judge: str,
    seed: int,
    margin: float = MARGIN,
) -> Comparison:
    """Return the win / lose / tie / Delta row of two response sets from a judge's scores of both.

    Args:
      candidate, baseline: the response sets, over the same prompts in the same order.
      scores: the judge's scores of the candidate's and of the baseline's responses.
      groups: the prompt (or prompt group) of each row, for the clustered interval.
      judge: name of the judge.
      seed: of the run; also of the bootstrap.
      margin: differences up to this size are ties.
    """
    first, second = scores
    if not len(first) == len(second) == len(groups):
        raise invalid(
            "scores",
            (len(first), len(second), len(groups)),
            "have one entry per prompt",
            "Compare response sets over the same prompts.",
        )
    result = outcomes(first, second, margin=margin)
    low, high = mean_interval(result, groups, seed=seed, bounds=(-1.0, 1.0))
    win, lose = float(np.mean(result > 0)), float(np.mean(result < 0))
    return Comparison(
        candidate=candidate.name,
        baseline=baseline.name,
        judge=judge,
        n=len(result),
        win=100 * win,
        lose=100 * lose,
        tie=100 * (1 - win - lose),
        delta=100 * (win - lose),
        ci95=(100 * low, 100 * high),
        temperature_candidate=candidate.temperature,
        temperature_baseline=baseline.temperature,
        seed=seed,
        mean_candidate=float(np.mean(first)),
        mean_baseline=float(np.mean(second)),
        length_candidate=float(np.mean(candidate.lengths)),
        length_baseline=float(np.mean(baseline.lengths)),
    )


def proportion_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion, for accuracies (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(centre - half), float(centre + half)
