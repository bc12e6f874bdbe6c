"""The models of a run as the server holds them: what samples, what scores, and at which shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from pit_jax.core.types import Params
from pit_jax.decode.batches import Response
from pit_jax.decode.chunks import Program
from pit_jax.models.api import ConditionalLM
from pit_jax.stages import answering
from pit_jax.stages.improve import Improver
from pit_jax.text.codec import PromptRow

Kind = Literal["policy", "improver"]
SMALLEST_WIDTH, FACTOR = 64, 4
MOST_FILLED = 1.5
"""Rows of a call, filler included, for each one that is to be scored."""


class Speaker(NamedTuple):
    """A language model that answers prompts of one kind."""

    program: Program
    params: Params


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Return sizes that grow by `FACTOR` from `smallest`, and end with `largest`: the shapes that are compiled."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= FACTOR
    return (*sizes, largest)


def bucket(size: int, sizes: Sequence[int]) -> int:
    """Return the smallest of `sizes`, which are in order, that holds `size`."""
    return next(candidate for candidate in sizes if candidate >= size)


class Models(Improver):
    """An improver with its policy and its gap model, all in memory.

    Args:
      checkpoint: as of `stages.improve.Improver`.
      max_batch: most rows of a batch; rounded up to what the devices can share.
      draft_tokens: as of `stages.improve.Improver`.
    """

    def __init__(self, checkpoint: str, max_batch: int, draft_tokens: int | None = None) -> None:
        super().__init__(checkpoint, draft_tokens)
        parts = answering.shared_out(self.mesh, 1)
        largest = answering.shared_out(self.mesh, max_batch)
        # Under load batches are nearly full; those a little above a quarter are not to pay for whole ones.
        sizes = {*buckets(parts, largest), answering.shared_out(self.mesh, max(1, largest // 2))}
        self.row_sizes = tuple(sorted({answering.shared_out(self.mesh, n) for n in sizes}))
        self.widths = buckets(SMALLEST_WIDTH, max(self.codec.width("improver"), self.codec.width("gap")))
        program = self._program(self.artifact.lm, self.draft_tokens)
        self.speakers: dict[Kind, Speaker] = {"improver": Speaker(program, self.params())}
        if self.policy is not None:
            self.speakers["policy"] = Speaker(self._program(self.policy.lm, 0), self.policy_params())
        self._scoring = self.scorer(self.row_sizes[-1])

    def _program(self, lm: ConditionalLM, drafted: int) -> Program:
        codec = self.codec
        return Program(
            lm=lm, draft_tokens=drafted, max_new=codec.lengths.targets, eos_ids=codec.eos_ids, pad_id=codec.pad_id
        )

    @property
    def has_gap(self) -> bool:
        """Whether r_gap can be asked for."""
        return self._scoring is not None

    def width(self, rows: Sequence[PromptRow]) -> int:
        """Return the width at which prompt rows are read."""
        return bucket(max(len(row.ids) for row in rows), self.widths)

    def score(self, rows: Sequence[PromptRow], answers: Sequence[Response]) -> Float[np.ndarray, " N"]:
        """Return r_gap of each gap prompt with its response, at the largest shape that wastes little on filler.

        A score reads as many tokens as there are, so filler costs what rows cost: several calls are better.
        """
        assert self._scoring is not None
        scorer, params = self._scoring
        called = {size: -(-len(rows) // size) * size for size in self.row_sizes}
        fitting = [size for size in self.row_sizes if called[size] <= MOST_FILLED * len(rows)]
        size = fitting[-1] if fitting else self.row_sizes[0]
        return dataclasses.replace(scorer, batch_size=size, width=self.width(rows)).score(params, rows, answers)
