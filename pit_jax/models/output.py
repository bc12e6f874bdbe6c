"""A language model's head: from the states that response tokens are predicted from to scores and losses of tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from pit_jax.core.types import Conditional, Params, TokenScores
from pit_jax.models import attending, layers
from pit_jax.models.api import ConditionalLM
from pit_jax.ops import logprob
from pit_jax.ops.token_loss import Passage, PerToken, token_loss
from pit_jax.sharding import rules

_CACHED = 2**21
"""Logits of a chunk that stay in a CPU's cache: there larger chunks are a quarter slower."""


class Output(NamedTuple):
    """The output matrix and how logits are made with it; `chunk` is `ModelConfig.logprob_chunk`."""

    matrix: Float[Array, "D V"]
    chunk: int
    softcap: float | None
    scale: float

    def scores(self, states: Float[Array, "B T D"], x: Conditional) -> TokenScores:
        """Return the scores of the response tokens, 0 at padding; they have gradients."""
        scores = logprob.token_scores(
            states, self.matrix, x.response, chunk=self.chunk, softcap=self.softcap, scale=self.scale
        )
        return layers.zero_padding(scores, x.response_segments)

    def loss(
        self, per_token: PerToken, states: Float[Array, "B T D"], x: Conditional, others: Any
    ) -> tuple[Float[Array, ""], TokenScores]:
        """Return the sum of the losses of all tokens, which has a gradient, and their scores, which have none."""
        passage = self._passage(states.shape[0], states.shape[1])
        total, scores = token_loss(per_token, states, self.matrix, x.response, others, passage)
        return total, layers.zero_padding(scores, x.response_segments)

    def _passage(self, rows: int, columns: int) -> Passage:
        """Return chunks of tokens with as many logits at once as blocks of `chunk` vocabulary entries would have."""
        mesh, vocabulary = jax.sharding.get_abstract_mesh(), self.matrix.shape[1]
        cut = rules.spec(("batch", "length"), (rows, columns), dict(mesh.shape), rules.in_force())
        parts = [_devices(axes, mesh.shape) for axes in (*cut, None, None)[:2]]
        chunks = -(-vocabulary // self.chunk)
        if attending.platform() == "cpu":
            chunks = max(chunks, -(-rows * columns * vocabulary // (math.prod(parts) * _CACHED)))
        return Passage(chunks=chunks, rows=parts[0], columns=parts[1], softcap=self.softcap, scale=self.scale)


def _devices(axes: Any, sizes: Any) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(sizes[name] for name in names)


def summed_loss(
    lm: ConditionalLM, params: Params, x: Conditional, per_token: PerToken, others: Any, key: jax.Array | None = None
) -> tuple[Float[Array, ""], TokenScores]:
    """Return the sum over response tokens of a loss that depends on each one's scores alone, and the scores.

    The sum is what is to be differentiated: its gradient is computed in the same pass over the logits. The scores, 0
    at padding, are for metrics and have no gradient.

    Args:
      lm: the language model.
      params: its parameters.
      x: prompts and responses, `[B, S]` and `[B, T]`.
      per_token: the loss of each token, elementwise; see `ops.token_loss`.
      others: tree of arrays `[B, T]` that `per_token` reads; constants.
      key: for dropout; None for none.
    """
    return lm.output(params).loss(per_token, lm.predictors(params, x, key), x, others)
