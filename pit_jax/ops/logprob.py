"""The language-model head: log-probabilities of target tokens without the table of all logits.

For N tokens and a vocabulary of V the logits are N x V float32 numbers, commonly the largest array of a training
step. Here they exist one block of `chunk` vocabulary entries at a time: the forward pass keeps running sums of the
softmax, the backward pass computes each block again. Blocks run over the vocabulary, not over tokens, so that the
leading (batch) axes keep their shape and their sharding, and each block of the head's gradient is written once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.errors import invalid
from pit_jax.core.types import TokenScores

# Stands for minus infinity: finite, because 0 * inf and inf - inf are NaN.
_LOWEST = -1e30


def logits(
    hidden: Float[Array, "... D"], head: Float[Array, "D C"], *, softcap: float | None = None, scale: float = 1.0
) -> Float[Array, "... C"]:
    """Return cap(scale hidden head) in float32, as `token_scores` does block by block: for the few rows of decoding."""
    raw = scale * jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


class Logits(NamedTuple):
    """How logits come from products of hidden states and head; hashable, static under jit."""

    scale: float
    softcap: float | None

    def of(self, hidden: Float[Array, "... D"], head: Float[Array, "D C"]) -> Float[Array, "... C"]:
        """Return the logits, by `logits`."""
        return logits(hidden, head, softcap=self.softcap, scale=self.scale)

    def slope(self, values: Float[Array, "... C"]) -> Float[Array, "... C"] | float:
        """Return d logits / d products, in terms of the logits `values`."""
        return self.scale if self.softcap is None else self.scale * (1.0 - jnp.square(values / self.softcap))


def token_scores(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*N"],
    *,
    chunk: int,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenScores:
    """Return log-probability, normaliser, entropy and correctness of each target token, in float32.

        logits = cap(scale hidden head),   cap(z) = softcap tanh(z / softcap), or z without a soft-cap
        log_z = log sum_v exp(logits[v]),   logp = logits[target] - log_z

    Products run in the dtype of `hidden` (the head is cast to it) and accumulate in float32. `logp` and `log_z`
    have gradients with respect to `hidden` and `head`; `entropy` (nats) and `correct` have none.

    Args:
      hidden: `[..., D]` final hidden states.
      head: `[D, V]` output matrix.
      targets: `[...]` token ids in [0, V).
      chunk: most vocabulary entries of which float32 logits exist at once; from V on, the plain form is used.
      softcap: bound of the logits' magnitude (Gemma 2).
      scale: factor of the products (T5 with tied embeddings: D ** -0.5).

    Raises:
      ConfigError: `chunk` is not positive.
    """
    if chunk < 1:
        raise invalid("token_scores.chunk", chunk, "be at least 1", "Give the vocabulary entries per block.")
    rule = Logits(scale, softcap)
    if chunk >= head.shape[1]:
        return _plain(hidden, head, targets, rule)
    return _blocked(hidden, head, targets, chunk, rule)


def _plain(hidden: Array, head: Array, targets: Array, rule: Logits) -> TokenScores:
    table = rule.of(hidden, head)
    log_z = jax.nn.logsumexp(table, axis=-1)
    # A comparison and a sum fuse with what surrounds them; the gradient of a gather would be a scatter.
    target = jnp.sum(jnp.where(is_target(targets, 0, head.shape[1]), table, 0.0), axis=-1)
    still, still_z = jax.lax.stop_gradient((table, log_z))
    entropy = still_z - jnp.sum(jnp.exp(still - still_z[..., None]) * still, axis=-1)
    correct = (jax.lax.stop_gradient(target) >= jnp.max(still, axis=-1)).astype(jnp.float32)
    return TokenScores(target - log_z, log_z, entropy, correct)


def is_target(targets: Int[Array, "*N"], start: Int[Array, ""] | int, size: int) -> Bool[Array, "*N C"]:
    """Return where each target stands among so many entries of the vocabulary from `start` on."""
    columns = jax.lax.broadcasted_iota(targets.dtype, (*targets.shape, size), targets.ndim)
    return columns + start == targets[..., None]


class _Blocks(NamedTuple):
    """Equal blocks that cover the vocabulary; the last is moved left to end at V and overlaps the one before."""

    count: int
    size: int
    vocabulary: int

    @classmethod
    def covering(cls, vocabulary: int, chunk: int) -> _Blocks:
        """Return the fewest blocks of at most `chunk` entries, as equal as they can be."""
        count = -(-vocabulary // chunk)
        return cls(count, -(-vocabulary // count), vocabulary)

    def start(self, index: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(index * self.size, self.vocabulary - self.size)

    def fresh(self, index: Int[Array, ""], rank: int) -> Bool[Array, "..."]:
        """Return which columns no earlier block had: `[1, ..., 1, size]` of the given rank."""
        columns = self.start(index) + jnp.arange(self.size)
        return (columns >= index * self.size).reshape((1,) * (rank - 1) + (self.size,))


class _Sums(NamedTuple):
    """Running sums of the softmax over the vocabulary so far, relative to the largest logit so far."""

    peak: Float[Array, "*N"]
    total: Float[Array, "*N"]
    slanted: Float[Array, "*N"]
    target: Float[Array, "*N"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocked(hidden: Array, head: Array, targets: Array, chunk: int, rule: Logits) -> TokenScores:
    return _blocked_forward(hidden, head, targets, chunk, rule)[0]


def _blocked_forward(hidden: Array, head: Array, targets: Array, chunk: int, rule: Logits):
    blocks = _Blocks.covering(head.shape[1], chunk)

    def add(sums: _Sums, index: Array) -> tuple[_Sums, None]:
        start = blocks.start(index)
        table = rule.of(hidden, jax.lax.dynamic_slice_in_dim(head, start, blocks.size, axis=1))
        table = jnp.where(blocks.fresh(index, table.ndim), table, _LOWEST)
        peak = jnp.maximum(sums.peak, jnp.max(table, axis=-1))
        offset = table - peak[..., None]
        weights = jnp.exp(offset)
        # total = sum e^(z - peak), slanted = sum e^(z - peak) (z - peak); both move along when the peak does.
        drop = sums.peak - peak
        shrink = jnp.exp(drop)
        hit = is_target(targets, start, blocks.size) & blocks.fresh(index, table.ndim)
        return _Sums(
            peak,
            shrink * sums.total + jnp.sum(weights, axis=-1),
            shrink * (sums.slanted + drop * sums.total) + jnp.sum(weights * offset, axis=-1),
            sums.target + jnp.sum(jnp.where(hit, table, 0.0), axis=-1),
        ), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    sums, _ = jax.lax.scan(add, _Sums(zero + _LOWEST, zero, zero, zero), jnp.arange(blocks.count))
    log_total = jnp.log(sums.total)
    log_z = sums.peak + log_total
    entropy = log_total - sums.slanted / sums.total
    correct = (sums.target >= sums.peak).astype(jnp.float32)
    return TokenScores(sums.target - log_z, log_z, entropy, correct), (hidden, head, targets, log_z)


def _blocked_backward(chunk: int, rule: Logits, saved: tuple[Array, ...], cotangents: TokenScores):
    hidden, head, targets, log_z = saved
    on_logp, on_log_z = cotangents.logp[..., None], cotangents.log_z[..., None]
    blocks = _Blocks.covering(head.shape[1], chunk)
    leading = tuple(range(targets.ndim))

    def add(grads: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        on_hidden, on_head = grads
        start = blocks.start(index)
        block = jax.lax.dynamic_slice_in_dim(head, start, blocks.size, axis=1).astype(hidden.dtype)
        table = rule.of(hidden, block)
        fresh = blocks.fresh(index, table.ndim)
        # d logp / d z = [target] - p,  d log_z / d z = p
        slope = (on_log_z - on_logp) * jnp.exp(table - log_z[..., None])
        slope = slope + jnp.where(is_target(targets, start, blocks.size), on_logp, 0.0)
        slope = jnp.where(fresh, slope * rule.slope(table), 0.0).astype(hidden.dtype)
        on_hidden = on_hidden + jnp.matmul(slope, block.T, preferred_element_type=jnp.float32)
        piece = jnp.tensordot(hidden, slope, (leading, leading), preferred_element_type=jnp.float32)
        # The last block overlaps the one before: where it is not fresh, its piece is 0 and the old one stays.
        old = jax.lax.dynamic_slice_in_dim(on_head, start, blocks.size, axis=1)
        return (on_hidden, jax.lax.dynamic_update_slice_in_dim(on_head, old + piece.astype(head.dtype), start, 1)), None

    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(head))
    (on_hidden, on_head), _ = jax.lax.scan(add, zeros, jnp.arange(blocks.count))
    return on_hidden.astype(hidden.dtype), on_head, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
