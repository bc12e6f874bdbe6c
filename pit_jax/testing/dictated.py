"""A language model that says what it is told, at the cost of the model it stands on."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pit_jax.core.types import Params, Prompts

_CERTAIN = 1e4
"""Added to the logit of what is to be said: nothing else can be drawn."""


class Told(NamedTuple):
    """The other model's cache, and how many tokens each row has said."""

    cache: Any
    said: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Dictated:
    """Draws row b of `params["answers"]`, `[B, T]`, from the logits that `lm` computes with `params["network"]`.

    So the passes of a model can be timed and counted at any rate of right drafts.
    """

    lm: Any

    def prefill(
        self, params: Params, prompts: Prompts, max_new: int, samples: int = 1, tried: int = 0
    ) -> tuple[Float[Array, "B V"], Told]:
        """Return the logits of the first tokens, and the cache."""
        logits, cache = self.lm.prefill(params["network"], prompts, max_new, samples, tried)
        said = jnp.zeros(logits.shape[0], jnp.int32)
        return self._told(params, logits[:, None], said)[:, 0], Told(cache, said)

    def ready(self, params: Params) -> Params:
        """Return the parameters as a loop reads them fastest."""
        return params | {"network": self.lm.ready(params["network"])}

    def step(self, params: Params, cache: Told, token: Int[Array, " B"]) -> tuple[Float[Array, "B V"], Told]:
        """Return the logits after one token a row."""
        logits, inner = self.lm.step(params["network"], cache.cache, token)
        said = cache.said + 1
        return self._told(params, logits[:, None], said)[:, 0], Told(inner, said)

    def extend(self, params: Params, cache: Told, tokens: Int[Array, "B Q"]) -> tuple[Float[Array, "B Q V"], Told]:
        """Return the logits after each of a row's tokens."""
        logits, inner = self.lm.extend(params["network"], cache.cache, tokens)
        return self._told(params, logits, cache.said + 1), Told(inner, cache.said)

    def keep(self, cache: Told, kept: Int[Array, " B"]) -> Told:
        """Return the cache with so many of the tokens."""
        return Told(self.lm.keep(cache.cache, kept), cache.said + kept)

    def _told(self, params: Params, logits: Float[Array, "B Q V"], said: Int[Array, " B"]) -> Float[Array, "B Q V"]:
        answers = params["answers"]
        number = said[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
        token = jnp.take_along_axis(answers, jnp.minimum(number, answers.shape[1] - 1), axis=1)
        return logits + _CERTAIN * jax.nn.one_hot(token, logits.shape[2])
