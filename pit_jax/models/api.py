"""The facade of a conditional language model: all that the rest of the project knows of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import jax
from jaxtyping import Array, Float, Int

from pit_jax.core.types import Conditional, Hidden, Params, Prompts, TokenScores
from pit_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from pit_jax.models.output import Output

Attention = Literal["causal", "bidirectional"]
Cache = Any
"""What a model remembers while it decodes: a tree of arrays, opaque to everyone else."""


class ConditionalLM(Protocol):
    """p(response | prompt): frozen, hashable, static under jit; parameters are always arguments.

    `key` is the dropout key; None means no dropout. Rows may be packed (`Conditional`).
    """

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Return fresh parameters."""
        ...

    def abstract(self) -> Params:
        """Return the parameters' tree with shapes and dtypes in place of arrays; nothing is allocated."""
        ...

    def axes(self) -> Params:
        """Return the same tree with a tuple of logical axis names for each parameter."""
        ...

    def logprobs(self, params: Params, x: Conditional, key: jax.Array | None = None) -> TokenScores:
        """Return the scores of each response token, `[B, T]` each, 0 at padding."""
        ...

    def predictors(self, params: Params, x: Conditional, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Return, for each response token, the hidden state it is predicted from (which has not seen it)."""
        ...

    def output(self, params: Params) -> Output:
        """Return the head that scores tokens, given what `predictors` returns."""
        ...

    def hidden(self, params: Params, x: Conditional, key: jax.Array | None = None, *, attention: Attention) -> Hidden:
        """Return the final hidden states at the prompts' and the responses' own positions."""
        ...

    def prefill(
        self, params: Params, prompts: Prompts, max_new: int, samples: int = 1, tried: int = 0
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Return the logits of the first new token, and a cache with room for `max_new` of them.

        Each of X prompts is read once and has B / X = `samples` rows, one after the other. With `tried`, the cache is
        for `extend` with `tried` + 1 tokens at a time, of which rows keep different numbers.
        """
        ...

    def admit(self, cache: Cache, new: Cache, rows: Int[Array, " R"]) -> Cache:
        """Return a cache, of as many prompts as rows, with the R rows of another in the place of some of its own.

        Prompts of both have the same width and as much room. Row numbers beyond the last are dropped.
        """
        ...

    def ready(self, params: Params) -> Params:
        """Return the parameters as a loop of `step` reads them fastest; for `step` alone, and made before the loop."""
        ...

    def step(self, params: Params, cache: Cache, token: Int[Array, " B"]) -> tuple[Float[Array, "B V"], Cache]:
        """Append one token to every row and return the logits of the next; at most `max_new` times."""
        ...

    def extend(self, params: Params, cache: Cache, tokens: Int[Array, "B Q"]) -> tuple[Float[Array, "B Q V"], Cache]:
        """Try Q tokens after those of each row, and return the logits after each of them.

        The cache that is returned must be told by `keep` how many of them each row keeps: a row that keeps fewer goes
        on as if it had not tried the others. So `step` is `extend` by one token that all rows keep.
        """
        ...

    def keep(self, cache: Cache, kept: Int[Array, " B"]) -> Cache:
        """Return the cache that `extend` gave, with the first `kept` of its tokens for good."""
        ...
