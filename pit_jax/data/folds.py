"""Splits and folds by a hash of the record's group: no prompt is in two of them."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

from pit_jax.core.errors import invalid

Split = Literal["train", "validation"]
Fold = Literal["sft", "rm", "rl"]
FOLDS: tuple[Fold, ...] = ("sft", "rm", "rl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folds:
    """How groups are dealt out: a validation split, and three equal folds of the rest (PIT's D_SFT, D_RM, D_RL).

    Where a group goes depends on its name and `salt` alone, so data may be added without moving what is there,
    and raising `validation_fraction` moves groups from train to validation only.

    Attributes:
      validation_fraction: share of groups held out, in [0, 1).
      salt: change it to deal again.
    """

    validation_fraction: float = 0.05
    salt: str = ""

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 <= self.validation_fraction < 1:
            rule = "be at least 0 and less than 1"
            raise invalid("Folds.validation_fraction", self.validation_fraction, rule, "0.05 is usual.")

    def split(self, group: str) -> Split:
        """Return the split of a group."""
        return "validation" if self._draw("split", group) < self.validation_fraction else "train"

    def fold(self, group: str) -> Fold:
        """Return the fold of a group of the train split."""
        return FOLDS[int(self._draw("fold", group) * len(FOLDS))]

    def holds(self, group: str, split: Split, fold: Fold | None) -> bool:
        """Return whether a group belongs to a split and, in train, to a fold; None stands for all of the split."""
        if self.split(group) != split:
            return False
        return split == "validation" or fold is None or self.fold(group) == fold

    def _draw(self, purpose: str, group: str) -> float:
        """Return a number in [0, 1) that only depends on the arguments and the salt."""
        text = "\0".join((self.salt, purpose, group)).encode("utf-8", errors="surrogatepass")
        digest = hashlib.blake2s(text, digest_size=6).digest()
        return int.from_bytes(digest, "little") / (1 << 48)
