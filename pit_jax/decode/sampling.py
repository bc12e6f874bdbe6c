"""How one token is drawn from the logits: temperature, top-k, top-p, and one random stream per row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pit_jax.core.errors import invalid

DRAWS = ("gumbel", "inverse")
_BLOCK = 128
"""Tokens of a block in which `invert` looks for the second number: a vector register's or a tile's worth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the sampler.

    temperature: 1 samples from the model itself, 0 is greedy. A change does not recompile.
    top_k: only the k most likely tokens can be drawn; 0 switches it off.
    top_p: only the smallest set of most likely tokens with at least this probability (at the given
      temperature) can be drawn; 1 switches it off (Holtzman et al., arXiv 1904.09751).
    draws: "gumbel" adds noise to every logit; "inverse" inverts the distribution function, with two random numbers a
      token in the place of V. Both draw from the same distribution, but other samples from the same keys. On a CPU the
      second takes a third of the time (8,192 tokens), which is little beside the model's own.
    draft_tokens: tokens that are guessed and checked in one pass of the model (`decode.drafts`); 0 guesses none. The
      samples are the same, as far as wider passes round alike. A guess is what follows in the prompt, in a marked
      reference above all, or in the answer itself. It pays where answers repeat these and a pass takes as long for a
      few tokens as for one: on accelerators, which read all parameters and the cache in each pass, with batches that do
      not keep their arithmetic busy. It does not where answers are new texts (a policy's), or where arithmetic is what
      takes the time: on two CPU cores a row that copies gains up to twice, 32 rows a quarter, and rows whose guesses
      are wrong take twice as long (`benchmarks/drafting.py`).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    draws: str = "gumbel"
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.draws not in DRAWS:
            raise invalid("Sampling.draws", self.draws, f"be one of {', '.join(DRAWS)}", "Use one of them.")
        if not 0.0 <= self.temperature < float("inf"):
            raise invalid("Sampling.temperature", self.temperature, "be finite and >= 0", "Use 0 for greedy decoding.")
        if self.top_k < 0:
            raise invalid("Sampling.top_k", self.top_k, "be >= 0", "Use 0 to switch top-k off.")
        if not 0.0 < self.top_p <= 1.0:
            raise invalid("Sampling.top_p", self.top_p, "be in (0, 1]", "Use 1 to switch top-p off.")
        if self.draft_tokens < 0:
            raise invalid("Sampling.draft_tokens", self.draft_tokens, "be >= 0", "Use 0 to guess no tokens.")


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Set all but the `k` largest logits of a row to -inf; `k` = 0 keeps all, ties with the k-th are kept."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Set logits outside the nucleus, the smallest set of top tokens with probability >= `p`, to -inf; 1 keeps all."""
    if isinstance(p, float) and p == 1.0:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    smallest = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits >= smallest) | (p == 1.0), logits, -jnp.inf)


def tempered(logits: Float[Array, "B V"], temperature: Float[Array, "..."] | float) -> Float[Array, "B V"]:
    """Return logits / temperature; at temperature 0, the logits."""
    return logits / jnp.where(temperature > 0, temperature, 1.0)


def pick(
    logits: Float[Array, "B V"],
    kept: Float[Array, "B V"],
    keys: Key[Array, " B"],
    step: Int[Array, "#B"] | Int[Array, ""] | int,
    temperature: Float[Array, "..."] | float,
) -> Int[Array, " B"]:
    """Return argmax_v (logits_v + temperature * gumbel_v) over the tokens whose `kept` logit is above -inf."""
    vocabulary = logits.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, vocabulary))(_at(keys, step))
    perturbed = jnp.where(kept > -jnp.inf, logits + temperature * noise, -jnp.inf)
    return first_largest(perturbed)


def invert(
    kept: Float[Array, "B V"],
    keys: Key[Array, " B"],
    step: Int[Array, "#B"] | Int[Array, ""] | int,
    temperature: Float[Array, ""] | float,
) -> Int[Array, " B"]:
    """Return a sample of softmax(kept), logits at their temperature, by the distribution function.

    Two uniform numbers a row: the first finds a block of tokens, the second a token of the block by its share of the
    block. So neither a sum over V nor a number in [0, 1) has to be finer than float32 is. A token of weight 0 is never
    drawn. Where `temperature` is 0 it is the first most likely token.
    """
    rows, vocabulary = kept.shape
    weights = jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(rows, -1, _BLOCK)
    number = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(_at(keys, step))
    block = _find(jnp.sum(weights, axis=-1), number[:, 0])
    place = _find(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], number[:, 1])
    return jnp.where(temperature == 0.0, first_largest(kept), block * _BLOCK + place)


def _at(keys: Key[Array, " B"], step: Int[Array, "#B"] | Int[Array, ""] | int) -> Key[Array, " B"]:
    """Return each row's key of its token number `step`."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(step), keys.shape))


def _find(weights: Float[Array, "B K"], number: Float[Array, " B"]) -> Int[Array, " B"]:
    """Return the first place up to which the weights add up to more than `number` of their sum."""
    below = jnp.cumsum(weights, axis=-1)
    beyond = below > number[:, None] * below[:, -1:]
    # Rounding of the product can leave none; a place of weight 0 is never the first beyond.
    last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[1], dtype=jnp.int32)[None, :], 0), axis=-1)
    return jnp.where(jnp.any(beyond, axis=-1), first_largest(beyond.astype(jnp.float32)), last)


def first_largest(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return the first place of each row's largest number, as argmax does; the last of all if a row has NaN.

    A maximum and a comparison are loops over vectors where argmax, a reduction of pairs, is one number at a time on a
    CPU and takes the noise that it is fused with along: with both, drawing from 8,192 tokens is three times as fast.
    """
    last = x.shape[-1] - 1
    place = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(last + 1, dtype=jnp.int32)[None, :], last)
    return jnp.min(place, axis=-1)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    step: Int[Array, "#B"] | Int[Array, ""] | int,
    temperature: Float[Array, ""] | float,
    top_k: int,
    top_p: float,
    draws: str,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token for every row and return it with its untempered, unfiltered log-probability.

    With the draws "gumbel", token = argmax_v (logits_v + temperature * gumbel_v) over the kept tokens (the Gumbel-max
    trick), which is a sample from softmax(logits / temperature) and, at temperature 0, the most likely token; with
    "inverse", the same distribution's function is inverted (`invert`). Row b uses
    `fold_in(keys[b], step[b])` only, so its token does not depend on the other rows.
    """
    logits = logits.astype(jnp.float32)
    kept = keep_top_p(tempered(keep_top_k(logits, top_k), temperature), top_p)
    inverse = draws == "inverse"
    token = invert(kept, keys, step, temperature) if inverse else pick(logits, kept, keys, step, temperature)
    return token, log_probability(logits, token)


def log_probability(logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
    """Return log softmax(logits) of one token a row."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
