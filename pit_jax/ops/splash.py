"""Flash attention on TPUs by JAX's Pallas "splash" kernels, which skip blocks that the order hides.

Scores exist one block of queries and keys at a time, in the chip's own memory, in the backward pass as well. On other
platforms the kernels are interpreted: slow, and good for comparing values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from pit_jax.ops.sight import Order

BLOCK = 128
"""Least size of a block of queries or keys: the width of a TPU's vectors."""
_BLOCKS = (512, 256, BLOCK)
"""Sizes of blocks, the best first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel is made for; hashable.

    queries, keys: columns in the whole row. heads: query heads on one device. shards: devices that a row's queries are
    cut over, each with all keys. softcap: bound of the scores' magnitude. interpret: run without a TPU.
    """

    queries: int
    keys: int
    heads: int
    shards: int
    order: Order
    softcap: float | None
    interpret: bool


class _Mask(splash_mask.Mask):
    """An `Order` as the library's mask, computed in the kernel from the columns of queries and keys."""

    def __init__(self, order: Order, columns: np.ndarray, keys: int):
        self.order, self.q_sequence, self.keys = order, columns, keys
        self.mask_function = order.shows

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.q_sequence), self.keys)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        return self.order.shows(self.q_sequence[rows][:, None], np.arange(self.keys)[columns][None, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mask) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Order, bytes, int]:
        return self.order, self.q_sequence.tobytes(), self.keys


def kernel(shape: Shape) -> splash.SplashAttentionKernel:
    """Return the kernel of a shape: a tree of small arrays, to be passed to `attend` (and cut by `kernel_specs`)."""
    own, order = shape.queries // shape.shards, shape.order.within(shape.queries, shape.keys)
    # Where places hide nothing, all parts of a row are alike.
    shards = 1 if order.everything else shape.shards
    q_block, k_block = _block(own), _block(shape.keys)
    columns, keys = _columns(own, shards, q_block), _rounded(shape.keys, k_block)
    one = splash_mask.FullMask((len(columns), keys)) if order.everything else _Mask(order, columns, keys)
    sizes = splash.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_kv_compute=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_kv_dkv_compute=k_block,
        block_q_dq=q_block,
        block_kv_dq=k_block,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([one] * shape.heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=shape.softcap,
        interpret=shape.interpret,
    )


def kernel_specs(made: splash.SplashAttentionKernel, mesh: Any, length_axis: str | None) -> Any:
    """Return how a kernel's arrays are cut where queries are cut over a mesh axis (None: nowhere)."""
    cut = None if made.fwd_mask_info.q_sequence is None else length_axis
    return made.manual_sharding_spec(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, cut)))


def attend(
    made: splash.SplashAttentionKernel,
    query: Float[Array, "B Q H E"],
    key: Float[Array, "B K Kh E"],
    value: Float[Array, "B K Kh E"],
    q_segments: Int[Array, "B Q"],
    k_segments: Int[Array, "B K"],
    shown: Bool[Array, "B Q"],
    scale: float,
) -> Float[Array, "B Q H E"]:
    """Return what `ops.attention.attend` returns, of the queries that one device has.

    Args:
      made: the kernel, cut like the queries.
      query: `[B, Q, H, E]`.
      key: `[B, K, Kh, E]`, where H is a multiple of Kh.
      value: `[B, K, Kh, E]`.
      q_segments: segments of the queries; 0 is padding.
      k_segments: segments of the keys.
      shown: which queries see any key at all; the others get zeros, with zero gradient.
      scale: factor of the dot products.
    """
    sizes = made.kwargs["block_sizes"]
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    rows = (
        _padded(query, 1, sizes.block_q).swapaxes(1, 2),
        _padded(key, 1, sizes.block_kv).swapaxes(1, 2),
        _padded(value, 1, sizes.block_kv).swapaxes(1, 2),
    )
    segments = splash.SegmentIds(_padded(q_segments, 1, sizes.block_q), _padded(k_segments, 1, sizes.block_kv))
    with jax.numpy_rank_promotion("allow"):
        out = jnp.asarray(jax.vmap(made)(*rows, segments))
    # A query of padding sees the padding, and one without keys the mean of all: finite, and of no use.
    return jnp.where(shown[:, :, None, None], out.swapaxes(1, 2)[:, : query.shape[1]], jnp.zeros((), out.dtype))


def _block(length: int) -> int:
    """Return the largest size of blocks that adds at most an eighth to a length, or else the smallest."""
    return next((size for size in _BLOCKS if 8 * (_rounded(length, size) - length) <= length), _BLOCKS[-1])


def _rounded(length: int, block: int) -> int:
    return -(-length // block) * block


def _columns(own: int, shards: int, block: int) -> np.ndarray:
    """Return the column of each query, those of each shard padded to whole blocks by repeating the last."""
    padded = np.minimum(np.arange(_rounded(own, block)), own - 1)
    return (np.arange(shards)[:, None] * own + padded[None, :]).reshape(-1).astype(np.int32)


def _padded(x: Array, axis: int, block: int) -> Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, _rounded(x.shape[axis], block) - x.shape[axis])
    return jnp.pad(x, room)
