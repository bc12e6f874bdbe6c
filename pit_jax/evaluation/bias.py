"""What else can explain who won: chance, the place on the screen, and length.

Outcomes are +1 where the candidate wins, -1 where the baseline does, 0 for a tie, NaN without a verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

from pit_jax.core.errors import DataError, invalid
from pit_jax.evaluation import bootstrap, loglinear
from pit_jax.evaluation.bootstrap import Interval
from pit_jax.evaluation.judges import FunctionJudge

# Of the penalty on log-odds: keeps them finite where one side wins every comparison. Against 100 comparisons it moves
# an estimate by less than a hundredth of a percentage point.
_RIDGE = 1e-3
# Rows times bootstrap samples that are held in memory at once.
_BLOCK = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignTest:
    """Exact two-sided sign test; ties are dropped. p is 1 where nothing is left."""

    wins: int
    losses: int
    ties: int
    p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A share in percent with its 95 % interval, and the p-value of the exact test that it is 50 %."""

    n: int
    percent: float
    ci95: Interval
    p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthControl:
    """A win rate as it would be if both responses were equally long; percent.

    raw, controlled: win rates, a tie as half a win. delta = 2 controlled - 100, in points.
    length: phi, the log-odds of winning for a length difference far above its spread; above 0, longer wins.
    difficulty: psi, of the prompts' difficulty; None where none was given.
    """

    n: int
    raw: float
    raw_ci95: Interval
    controlled: float
    ci95: Interval
    delta: float
    delta_ci95: Interval
    length: float
    difficulty: float | None


def binomial_p(successes: float, failures: float) -> float:
    """Return the exact two-sided p-value that successes and failures are equally likely.

    p = min(1, 2 P(X <= min(successes, failures))) with X ~ Binomial(successes + failures, 1/2).
    """
    n = successes + failures
    return float(min(1.0, 2 * special.bdtr(min(successes, failures), n, 0.5))) if n else 1.0


def sign_test(outcomes: Float[np.ndarray, " n"], groups: Sequence[str]) -> SignTest:
    """Return the exact sign test of who wins more prompts (Dixon & Mood 1946).

    Rows of one group are not independent, so a group counts once, by the sign of its sum: as a win, a loss or a tie.
    """
    answered = ~np.isnan(outcomes)
    if not answered.any():
        return SignTest(wins=0, losses=0, ties=0, p=1.0)
    kept = [group for group, there in zip(groups, answered, strict=True) if there]
    sums = bootstrap.group_sums(outcomes[answered][:, None], kept)[:, 0]
    wins, losses, ties = (int(np.sum(sign)) for sign in (sums > 0, sums < 0, sums == 0))
    return SignTest(wins=wins, losses=losses, ties=ties, p=binomial_p(wins, losses))


def first_place(
    given: Float[np.ndarray, " n"], swapped: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int
) -> Share:
    """Return how often the response shown first wins, over questions asked in both orders (a tie is half a win).

    Each response is shown first as often as second, so a judge that reads only the answers gives 50 %.

    Args:
      given, swapped: the verdict in either order: +1 the response shown first wins, -1 the second, 0 tie, NaN none.
      groups: the prompt (or prompt group) of each question.
      seed: of the bootstrap.
    """
    both = (given + swapped) / 2
    return _share(both, groups, seed=seed, p=sign_test(both, groups).p)


def left_share(sides: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int) -> Share:
    """Return how often the left response wins where sides were drawn at random (+1 left, -1 right, 0 tie, NaN none).

    A person or judge that reads only the answers gives 50 %, up to chance.
    """
    return _share(sides, groups, seed=seed, p=sign_test(sides, groups).p)


def longer_wins(
    outcomes: Float[np.ndarray, " n"], length_difference: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int
) -> Share:
    """Return how often the longer response wins, among pairs of different lengths with a winner.

    The baseline "longer wins" is right that often about this judge; far above 50 %, the judge may be counting words.

    Args:
      outcomes: of the candidate.
      length_difference: candidate's length minus the baseline's, in any unit.
      groups: the prompt (or prompt group) of each row.
      seed: of the bootstrap.
    """
    agreement = outcomes * np.sign(length_difference)
    agreement = np.where(agreement == 0, np.nan, agreement)
    return _share(agreement, groups, seed=seed, p=sign_test(agreement, groups).p)


def longer_judge() -> FunctionJudge:
    """Return the judge that knows nothing but length, in characters: the baseline every judge has to beat."""
    return FunctionJudge(name="longer", function=lambda prompt, response: float(len(response)))


def length_controlled(
    outcomes: Float[np.ndarray, " n"],
    length_difference: Float[np.ndarray, " n"],
    groups: Sequence[str],
    *,
    seed: int,
    difficulty: Float[np.ndarray, " n"] | None = None,
    calibration: Calibration | None = None,
    draws: int = 2000,
) -> LengthControl:
    """Return the win rate at equal lengths by logistic regression, as in AlpacaEval 2.0.

        P(candidate wins) = sigmoid(theta + phi tanh(d / sd(d)) + psi difficulty)
        controlled = 100 mean sigmoid(theta + psi difficulty)

    with d the length difference; ties and graded preferences enter as fractions. Maximum likelihood with the
    penalty 0.0005 (theta^2 + phi^2 + psi^2), which matters only where one side wins everything. sd(d) is that of the
    whole sample in every bootstrap sample. (Dubois et al. 2024, "Length-controlled AlpacaEval", eq. 2; there the
    penalty is L1 with a weight chosen by cross-validation.)

    Args:
      outcomes: of the candidate, in [-1, 1].
      length_difference: candidate's length minus the baseline's; AlpacaEval counts characters.
      groups: the prompt (or prompt group) of each row, for the clustered intervals.
      seed: of the bootstrap.
      difficulty: of each prompt, such as AlpacaEval publishes; must be given with `calibration`.
      calibration: further rows that tie phi and psi down.
      draws: bootstrap samples.

    Raises:
      DataError: no verdict at all, or an outcome outside of [-1, 1].
    """
    answered = ~np.isnan(outcomes)
    if not answered.any():
        raise DataError("Length control needs verdicts, and there is none. Check the judge.")
    if np.abs(outcomes[answered]).max() > 1:
        raise invalid("outcomes", float(np.abs(outcomes[answered]).max()), "lie in [-1, 1]", "Use +1, 0 and -1.")
    win = (1 + outcomes[answered]) / 2
    spread = float(np.std(length_difference[answered], ddof=1)) if answered.sum() > 1 else 0.0
    length = np.tanh(length_difference[answered] / spread) if spread > 0 else np.zeros(len(win))
    hard = np.zeros((len(win), 0)) if difficulty is None else difficulty[answered][:, None]
    kept = [group for group, there in zip(groups, answered, strict=True) if there]
    member, count = bootstrap.members(kept, len(win))
    rows = _Rows(design=np.column_stack([np.ones(len(win)), length, hard]), win=win, calibration=calibration)
    theta, whole = _rates(rows, np.ones((1, len(win))))
    rng, block = np.random.default_rng(seed), max(1, _BLOCK // len(win))
    parts = [min(block, draws - start) for start in range(0, draws, block)]
    rates = np.concatenate([_rates(rows, bootstrap.drawn(count, part, rng)[:, member])[1] for part in parts])
    low, high = bootstrap.percentiles(rates, count)
    raw, controlled = (float(rate) for rate in whole[0])
    return LengthControl(
        n=len(win), raw=raw, raw_ci95=Interval(float(low[0]), float(high[0])),
        controlled=controlled, ci95=Interval(float(low[1]), float(high[1])),
        delta=2 * controlled - 100, delta_ci95=Interval(2 * float(low[1]) - 100, 2 * float(high[1]) - 100),
        length=float(theta[0, 1]), difficulty=None if difficulty is None else float(theta[0, 2]),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Comparisons of the baseline with wordier and terser versions of itself, which differ in length alone.

    They enter the regression with no theta of the candidate and a small weight each, as AlpacaEval 2.0 does to keep a
    candidate from gaming the correction.

    length: d / sd(d) of each row; difficulty: of its prompt; win: the longer-or-shorter version's preference in [0, 1].
    """

    length: Float[np.ndarray, " m"]
    difficulty: Float[np.ndarray, " m"]
    win: Float[np.ndarray, " m"]
    weight: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    design: Float[np.ndarray, "n p"]
    win: Float[np.ndarray, " n"]
    calibration: Calibration | None


def _rates(
    rows: _Rows, times: Float[np.ndarray, "draws n"]
) -> tuple[Float[np.ndarray, "draws p"], Float[np.ndarray, "draws 2"]]:
    """Return, for each weighting of the rows, the coefficients and the raw and controlled win rates in percent."""
    theta = _logistic(rows, times)
    equal = rows.design.copy()
    equal[:, 1] = 0
    sums = np.stack([times @ rows.win, np.sum(times * special.expit(theta @ equal.T), axis=1)], axis=1)
    return theta, 100 * sums / times.sum(axis=1, keepdims=True)


def _logistic(rows: _Rows, times: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, "draws p"]:
    design, win, weights, calibration = rows.design, rows.win, times, rows.calibration
    if calibration is not None:
        zero = np.zeros(len(calibration.win))
        extra = np.column_stack([zero, np.tanh(calibration.length), calibration.difficulty])
        if extra.shape[1] != design.shape[1]:
            fix = "Give each prompt's difficulty, or leave the calibration out."
            raise invalid("difficulty", None, "be given with a calibration", fix)
        design, win = np.concatenate([design, extra]), np.concatenate([win, calibration.win])
        weights = np.concatenate([times, np.full((len(times), len(zero)), calibration.weight)], axis=1)
    features = np.stack([design, np.zeros_like(design)], axis=1)
    counts = weights[:, :, None] * np.stack([win, 1 - win], axis=1)
    return loglinear.fit(features, counts, ridge=_RIDGE)


def _share(values: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int, p: float) -> Share:
    """Return (1 + mean) / 2 of values in [-1, 1], in percent; an empty share is NaN."""
    there = ~np.isnan(values)
    if not there.any():
        return Share(n=0, percent=float("nan"), ci95=Interval(float("nan"), float("nan")), p=1.0)
    kept = [group for group, here in zip(groups, there, strict=True) if here]
    low, high = bootstrap.mean_interval(values[there], kept, seed=seed, bounds=(-1.0, 1.0))
    percent = 50 * (1 + float(np.mean(values[there])))
    return Share(n=int(there.sum()), percent=percent, ci95=Interval(50 * (1 + low), 50 * (1 + high)), p=p)
