"""When a proposed answer replaces the present one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from pit_jax.core.errors import invalid
from pit_jax.decode.batches import Response

RULES = ("gap", "always")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Improve:
    """How answers are improved at inference.

    iterations: at most so many steps y_i -> y_{i+1}.
    candidates: proposals per step; the best by r_gap goes on.
    accept: "gap" keeps y_i and stops unless r_gap(y_{i+1}, y_i | x) > r_gap(y_i, y_i | x) + margin; "always"
      takes every proposal, as in the paper.
    margin: for "gap", in units of the gap reward.
    """

    iterations: int = 1
    candidates: int = 1
    accept: Literal["gap", "always"] = "gap"
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.iterations < 1:
            raise invalid("Improve.iterations", self.iterations, "be at least 1", "Use 1 for one improvement step.")
        if self.candidates < 1:
            raise invalid("Improve.candidates", self.candidates, "be at least 1", "Use 1 for one proposal per step.")
        if self.accept not in RULES:
            raise invalid("Improve.accept", self.accept, f"be one of {RULES}", "Choose one of them.")
        if not self.margin >= 0.0:
            raise invalid("Improve.margin", self.margin, "be >= 0", "A negative margin would accept worse answers.")

    @property
    def needs_gap(self) -> bool:
        """Whether R_PIT is needed: by the accept rule, or to choose among candidates."""
        return self.accept == "gap" or self.candidates > 1


def usable(scores: Float[np.ndarray, "*n"], answers: Sequence[Response]) -> Float[np.ndarray, "*n"]:
    """Return the scores with -inf for answers that were cut off: models are rewarded for complete ones only."""
    finished = np.array([answer.finished for answer in answers], bool).reshape(scores.shape)
    return np.where(finished, scores, -np.inf)


def best(scores: Float[np.ndarray, "X C"]) -> Int[np.ndarray, " X"]:
    """Return the number of the best of each row's candidates, the first of equals."""
    return np.argmax(scores, axis=1)


def accepts(gap: Float[np.ndarray, " X"], zero: Float[np.ndarray, " X"], margin: float) -> Bool[np.ndarray, " X"]:
    """Return whether r_gap(y', y | x) > r_gap(y, y | x) + margin; the gap model's own zero calibrates it."""
    return gap > zero + margin
