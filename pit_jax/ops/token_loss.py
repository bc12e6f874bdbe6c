"""A sum of losses of tokens and its gradient in one pass over the logits.

`logprob.token_scores` does not know what its scores are used for: its backward pass must compute all logits again,
four products with the output matrix in all. Where the loss of a token depends on that token's scores alone, as in
likelihood learning and policy gradients, its gradient is known as soon as the scores are: three products, and the
logits of a chunk of tokens exist once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.errors import invalid
from pit_jax.core.types import TokenScores
from pit_jax.ops import logprob

PerToken = Callable[[TokenScores, Any], Float[Array, "..."]]
"""The loss of each token, given its scores and the other arrays of the token: elementwise, a sum is taken of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """How the tokens are gone through; hashable, static under jit.

    chunks: so many parts, one after the other, of whose tokens float32 logits exist.
    rows, columns: numbers of devices that rows and columns are cut over. Each adds up a gradient of the output matrix
      of its own, so that they meet once and not once a chunk.
    softcap, scale: as in `logprob.token_scores`.
    """

    chunks: int
    rows: int = 1
    columns: int = 1
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
          ConfigError: one of them is not positive.
        """
        for name in ("chunks", "rows", "columns"):
            if vars(self)[name] < 1:
                raise invalid(f"Passage.{name}", vars(self)[name], "be at least 1", "Use 1 not to cut.")


def token_loss(
    per_token: PerToken,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    others: Any,
    passage: Passage,
) -> tuple[Float[Array, ""], TokenScores]:
    """Return sum_bt per_token(scores[b, t], others[b, t]), and the scores, which have no gradient.

    The gradient of the sum with respect to `hidden` and `head` is computed together with it, where it is asked for;
    without, this is `logprob.token_scores`, token chunk by token chunk.

    Args:
      per_token: the loss of a token; it may hold no traced arrays of its own.
      hidden: `[B, T, D]` states that the targets are predicted from.
      head: `[D, V]` output matrix.
      targets: `[B, T]` token ids in [0, V).
      others: tree of arrays `[B, T]` which `per_token` reads; constants.
      passage: how the tokens are gone through.
    """
    others = jax.lax.stop_gradient(others)
    return _summed(hidden, head, targets, others, per_token, passage)


class _Cut:
    """The tokens of a batch as chunks `[chunks, *devices, size]`, filled up with zeros, and back."""

    def __init__(self, shape: tuple[int, ...], passage: Passage) -> None:
        self.shape, self.rows, self.columns = shape, passage.rows, passage.columns
        # Axes of length 1 would keep XLA for CPUs from its fast reductions.
        self.devices = (self.rows, self.columns) if self.rows * self.columns > 1 else ()
        self.tokens = shape[0] * shape[1] // (self.rows * self.columns)
        self.chunks = min(passage.chunks, self.tokens)
        self.size = -(-self.tokens // self.chunks)

    def apart(self, x: Array) -> Array:
        """Return `[B, T, ...]` in chunks."""
        batch, length = self.shape
        rest, axis = x.shape[2:], len(self.devices)
        x = x.reshape(self.rows, batch // self.rows, self.columns, length // self.columns, *rest).swapaxes(1, 2)
        x = x.reshape(*self.devices, self.tokens, *rest)
        filler = self.chunks * self.size - self.tokens
        x = jnp.pad(x, [(0, filler if index == axis else 0) for index in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*self.devices, self.chunks, self.size, *rest), axis, 0)

    def together(self, x: Array) -> Array:
        """Return the chunks as `[B, T, ...]`."""
        batch, length = self.shape
        axis = len(self.devices)
        rest = x.shape[axis + 2 :]
        x = jnp.moveaxis(x, 0, axis).reshape(*self.devices, self.chunks * self.size, *rest)
        x = jax.lax.slice_in_dim(x, 0, self.tokens, axis=axis)
        x = x.reshape(self.rows, self.columns, batch // self.rows, length // self.columns, *rest).swapaxes(1, 2)
        return x.reshape(batch, length, *rest)

    def real(self, index: Array) -> Bool[Array, "*ones size"]:
        """Return which tokens of a chunk are no filler."""
        real = index * self.size + jnp.arange(self.size) < self.tokens
        return real.reshape(*(1 for _ in self.devices), self.size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(
    hidden: Array, head: Array, targets: Array, others: Any, per_token: PerToken, passage: Passage
) -> tuple[Array, TokenScores]:
    cut = _Cut(targets.shape, passage)

    def score(_: None, chunk: tuple[Array, Array]) -> tuple[None, TokenScores]:
        states, wanted = chunk
        return None, _Table.of(states, head.astype(states.dtype).T, passage).scores(wanted)

    _, chunked = jax.lax.scan(score, None, (cut.apart(hidden), cut.apart(targets)))
    scores = TokenScores(*(cut.together(part) for part in chunked))
    return jnp.sum(per_token(scores, others)), scores


def _forward(
    hidden: Array, head: Array, targets: Array, others: Any, per_token: PerToken, passage: Passage
) -> tuple[tuple[Array, TokenScores], tuple[Array, Array]]:
    cut, vectors = _Cut(targets.shape, passage), head.astype(hidden.dtype).T

    def add(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array, Any]):
        (total, on_vectors), (index, states, wanted, beside) = sums, chunk
        table = _Table.of(states, vectors, passage)
        scores = table.scores(wanted)

        def loss(logp: Array, log_z: Array) -> Array:
            losses = per_token(scores._replace(logp=logp, log_z=log_z), beside)
            return jnp.sum(jnp.where(cut.real(index), losses, 0.0))

        more, (on_logp, on_log_z) = jax.value_and_grad(loss, argnums=(0, 1))(scores.logp, scores.log_z)
        on_products = table.gradient(wanted, on_logp, on_log_z, passage).astype(hidden.dtype)
        on_states = jnp.matmul(on_products, vectors, preferred_element_type=jnp.float32).astype(hidden.dtype)
        piece = jnp.einsum("...nv,...nd->...vd", on_products, states, preferred_element_type=jnp.float32)
        return (total + more, on_vectors + piece), (on_states, scores)

    zeros = (jnp.zeros(()), jnp.zeros((*cut.devices, *vectors.shape), jnp.float32))
    parts = jax.tree.map(cut.apart, (hidden, targets, others))
    (total, on_vectors), (on_hidden, scores) = jax.lax.scan(add, zeros, (jnp.arange(cut.chunks), *parts))
    on_head = jnp.sum(on_vectors, axis=tuple(range(len(cut.devices)))).T.astype(head.dtype)
    outputs = total, TokenScores(*(cut.together(part) for part in scores))
    return outputs, (cut.together(on_hidden), on_head)


def _backward(per_token: PerToken, passage: Passage, gradients: tuple[Array, Array], cotangents: tuple[Array, Any]):
    on_total = cotangents[0]
    on_hidden, on_head = ((on_total * part).astype(part.dtype) for part in gradients)
    return on_hidden, on_head, None, None


class _Table(NamedTuple):
    """All logits of some tokens, the largest of each token, and e^(logits - largest) with their sum."""

    logits: Float[Array, "*N V"]
    peak: Float[Array, "*N 1"]
    weights: Float[Array, "*N V"]
    total: Float[Array, "*N 1"]

    @classmethod
    def of(cls, states: Float[Array, "*N D"], vectors: Float[Array, "V D"], passage: Passage) -> _Table:
        logits = logprob.logits(states, vectors.T, softcap=passage.softcap, scale=passage.scale)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        return cls(logits, peak, weights, jnp.sum(weights, axis=-1, keepdims=True))

    def scores(self, targets: Int[Array, "*N"]) -> TokenScores:
        target = jnp.take_along_axis(self.logits, targets[..., None], axis=-1)[..., 0]
        log_z = (self.peak + jnp.log(self.total))[..., 0]
        slanted = jnp.sum(self.weights * (self.logits - self.peak), axis=-1)
        entropy = (jnp.log(self.total) - slanted[..., None] / self.total)[..., 0]
        return TokenScores(target - log_z, log_z, entropy, (target >= self.peak[..., 0]).astype(jnp.float32))

    def gradient(self, targets: Array, on_logp: Array, on_log_z: Array, passage: Passage) -> Float[Array, "*N V"]:
        # d logp / d z = [target] - p,  d log_z / d z = p
        slope = ((on_log_z - on_logp)[..., None] / self.total) * self.weights
        slope = slope + jnp.where(logprob.is_target(targets, 0, slope.shape[-1]), on_logp[..., None], 0.0)
        return slope * logprob.Logits(passage.scale, passage.softcap).slope(self.logits)


_summed.defvjp(_forward, _backward)
