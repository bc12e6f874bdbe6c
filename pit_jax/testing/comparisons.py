"""Simulated judges whose true win rate, ratings, length effect and agreement are known.

Rows of one group share chance: with probability `shared` a row uses its group's random number instead of its own. So
rows of a group are dependent while each follows the stated probabilities exactly, and the truth needs no integral.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

# Probabilists' Gauss-Hermite points, for means over a standard normal variable.
_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


class Compared(NamedTuple):
    """Simulated outcomes, the group of each, and the true value of what is to be estimated."""

    outcomes: Float[np.ndarray, " n"]
    groups: list[str]
    truth: float


class Lengths(NamedTuple):
    """Simulated outcomes that depend on length and difficulty; truth: the win rate at equal lengths, in percent."""

    outcomes: Float[np.ndarray, " n"]
    length_difference: Float[np.ndarray, " n"]
    difficulty: Float[np.ndarray, " n"]
    groups: list[str]
    truth: float


def chances(groups: int, rows: int, shared: float, rng: np.random.Generator) -> Float[np.ndarray, "groups rows"]:
    """Return uniform random numbers; with probability `shared` a row has that of its group."""
    common = np.broadcast_to(rng.random((groups, 1)), (groups, rows))
    return np.where(rng.random((groups, rows)) < shared, common, rng.random((groups, rows)))


def outcomes(score: np.ndarray, ties: float, chance: np.ndarray) -> np.ndarray:
    """Return +1, 0 or -1 with the expected score P(win) + P(tie) / 2 = `score`.

    P(tie) = 2 ties min(score, 1 - score), for `ties` in [0, 1].
    """
    half = ties * np.minimum(score, 1 - score)
    return np.where(chance < score - half, 1.0, np.where(chance < score + half, 0.0, -1.0))


def names(groups: int, rows: int) -> list[str]:
    """Return the group of each row of [groups, rows], flattened."""
    return [str(group) for group in np.repeat(np.arange(groups), rows)]


def win_rates(
    groups: int, rows: int, *, score: float, ties: float, shared: float, rng: np.random.Generator
) -> Compared:
    """Return outcomes of one candidate against one baseline; truth: E[outcome] = 2 score - 1."""
    found = outcomes(np.full((groups, rows), score), ties, chances(groups, rows, shared, rng))
    return Compared(found.ravel(), names(groups, rows), 2 * score - 1)


def tournament(
    theta: Float[np.ndarray, " systems"], groups: int, *, ties: float, shared: float, rng: np.random.Generator
) -> dict[tuple[str, str], Float[np.ndarray, " groups"]]:
    """Return every pair's outcomes on each prompt, scored by Bradley-Terry; systems are named s0, s1, ..."""
    pairs = np.array([(i, j) for i in range(len(theta)) for j in range(i + 1, len(theta))])
    score = special.expit(theta[pairs[:, 0]] - theta[pairs[:, 1]])
    found = outcomes(score[None], ties, chances(groups, len(pairs), shared, rng))
    return {(f"s{i}", f"s{j}"): found[:, k] for k, (i, j) in enumerate(pairs)}


def davidson_tournament(
    theta: Float[np.ndarray, " systems"], groups: int, *, tie: float, shared: float, rng: np.random.Generator
) -> dict[tuple[str, str], Float[np.ndarray, " groups"]]:
    """Return every pair's outcomes on each prompt by Davidson's model."""
    pairs = np.array([(i, j) for i in range(len(theta)) for j in range(i + 1, len(theta))])
    half = (theta[pairs[:, 0]] - theta[pairs[:, 1]]) / 2
    win, lose = np.exp(half), np.exp(-half)
    total = win + lose + tie
    chance = chances(groups, len(pairs), shared, rng)
    found = np.where(chance < win / total, 1.0, np.where(chance < (win + tie) / total, 0.0, -1.0))
    return {(f"s{i}", f"s{j}"): found[:, k] for k, (i, j) in enumerate(pairs)}


def lengths(
    groups: int, rows: int, *, effects: tuple[float, float, float], ties: float, shared: float, rng: np.random.Generator
) -> Lengths:
    """Return outcomes of a judge with score sigmoid(theta + phi tanh(d) + psi difficulty), `effects` the three.

    Length differences are normal with mean 0.7 sd (the candidate is wordier); difficulties are standard normal and
    the same for all rows of a group. The truth is 100 E[sigmoid(theta + psi difficulty)].
    """
    theta, phi, psi = effects
    spread = 300.0
    difference = spread * rng.normal(0.7, 1.0, (groups, rows))
    difficulty = np.broadcast_to(rng.normal(size=(groups, 1)), (groups, rows))
    score = special.expit(theta + phi * np.tanh(difference / spread) + psi * difficulty)
    found = outcomes(score, ties, chances(groups, rows, shared, rng))
    truth = 100 * float(special.expit(theta + psi * _POINTS) @ _WEIGHTS / _WEIGHTS.sum())
    return Lengths(found.ravel(), difference.ravel(), difficulty.ravel(), names(groups, rows), truth)


def votes(
    items: int, judges: int, *, kinds: int, reliability: float, missing: float, rng: np.random.Generator
) -> Float[np.ndarray, "items judges"]:
    """Return votes of judges who see the true category with probability `reliability` and guess otherwise.

    All categories are equally likely, so Cohen's and Fleiss' kappa and Krippendorff's alpha are reliability^2.
    A vote is missing (NaN) with probability `missing`.
    """
    true = np.broadcast_to(rng.integers(0, kinds, (items, 1)), (items, judges))
    seen = np.where(rng.random((items, judges)) < reliability, true, rng.integers(0, kinds, (items, judges)))
    return np.where(rng.random((items, judges)) < missing, np.nan, seen.astype(np.float64))
