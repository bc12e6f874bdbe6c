"""Everything that is said of one candidate against one baseline, from a judge's outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import DataError
from pit_jax.evaluation import bias, bootstrap
from pit_jax.evaluation.bias import LengthControl, Share, SignTest
from pit_jax.evaluation.bootstrap import Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Win, lose, tie and Delta in percent with Delta's 95 % interval; chance; length. n: comparisons with a verdict."""

    n: int
    unanswered: int
    groups: int
    win: float
    lose: float
    tie: float
    delta: float
    ci95: Interval
    sign: SignTest
    longer: Share
    length: LengthControl

    def lines(self, candidate: str, baseline: str) -> list[str]:
        """Return the summary in sentences."""
        length = self.length
        open_ones = f"; {self.unanswered} without a verdict" if self.unanswered else ""
        return [
            f"{candidate} against {baseline}: win {self.win:.1f} %, lose {self.lose:.1f} %, tie {self.tie:.1f} %, "
            f"Delta {self.delta:+.1f} {_interval(self.ci95, '+.1f')} "
            f"({self.n} comparisons, {self.groups} prompts{open_ones}).",
            f"Sign test over prompts: {self.sign.wins} to {self.sign.losses}, {self.sign.ties} ties, "
            f"p = {self.sign.p:.2g}.",
            f"At equal lengths: Delta {length.delta:+.1f} {_interval(length.delta_ci95, '+.1f')}.",
            f"The longer response wins {self.longer.percent:.1f} % {_interval(self.longer.ci95, '.1f')} of "
            f"{self.longer.n} comparisons with a winner and different lengths."
            if self.longer.n
            else "No comparison with a winner has responses of different lengths.",
        ]


def summarise(
    outcomes: Float[np.ndarray, " n"], length_difference: Float[np.ndarray, " n"], groups: Sequence[str], *, seed: int
) -> Summary:
    """Return the summary of outcomes (+1 candidate wins, -1 baseline, 0 tie, NaN no verdict).

    Args:
      outcomes: one for each comparison.
      length_difference: candidate's length minus the baseline's.
      groups: the prompt (or prompt group) of each comparison.
      seed: of the bootstrap.

    Raises:
      DataError: there is no verdict at all.
    """
    answered = ~np.isnan(outcomes)
    if not answered.any():
        raise DataError(f"Not one of {len(outcomes)} comparisons has a verdict. Check the judge.")
    found, difference = outcomes[answered], length_difference[answered]
    kept = [group for group, there in zip(groups, answered, strict=True) if there]
    win, lose = 100 * float(np.mean(found > 0)), 100 * float(np.mean(found < 0))
    low, high = bootstrap.mean_interval(np.sign(found), kept, seed=seed, bounds=(-1.0, 1.0))
    return Summary(
        n=len(found),
        unanswered=int(np.sum(~answered)),
        groups=len(set(kept)),
        win=win,
        lose=lose,
        tie=100 - win - lose,
        delta=win - lose,
        ci95=Interval(100 * low, 100 * high),
        sign=bias.sign_test(found, kept),
        longer=bias.longer_wins(found, difference, kept, seed=seed),
        length=bias.length_controlled(found, difference, kept, seed=seed),
    )


def _interval(found: Interval, form: str) -> str:
    return f"[{found.low:{form}}, {found.high:{form}}]"
