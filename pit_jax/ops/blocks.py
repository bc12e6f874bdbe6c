"""Attention in blocks of queries, each with only the keys that some query of it may see: half of a causal square.

The scores of one block exist at a time, and the backward pass computes them again from the logarithm of each query's
softmax total, as flash attention does (Dao et al. 2022, arXiv 2205.14135) but in plain products: this is for where no
kernel runs. A block's keys are known from the static order alone; the mask decides inside of it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pit_jax.ops.sight import Order

# As in `attention`: finite, and a floor below every real score, so that a query without a key gets weights of 0.
_MASKED = -1e30
_FLOOR = -1e29


class Block(NamedTuple):
    """Queries `start` to `stop`, and the ranges of keys of which some query may see some key."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """How one attention is computed; hashable, static under jit.

    rows: so many sequences at once, the others after them, so that a block's scores stay in a CPU's cache; None for
      all of a batch. scale, softcap: as of `attention.attend`.
    """

    blocks: tuple[Block, ...]
    rows: int | None
    scale: float
    softcap: float | None


@functools.cache
def blocks(order: Order, queries: int, keys: int, size: int, join: int = 32) -> tuple[Block, ...]:
    """Return the blocks of so many queries, `size` in each, over so many keys.

    Args:
      order: what a query may see by the columns it and a key are in.
      queries: number of queries.
      keys: number of keys.
      size: queries a block.
      join: ranges that are fewer keys apart than this become one: a gap costs less than another piece.
    """
    columns = np.arange(keys)[None, :]
    found = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        shown = np.broadcast_to(order.shows(np.arange(start, stop)[:, None], columns), (stop - start, keys)).any(axis=0)
        edges = np.flatnonzero(np.diff(shown.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        ranges: list[tuple[int, int]] = []
        for first, last in edges.tolist():
            if ranges and first - ranges[-1][1] < join:
                ranges[-1] = (ranges[-1][0], last)
            else:
                ranges.append((first, last))
        found.append(Block(start, stop, tuple(ranges)))
    return tuple(found)


def attend(
    query: Float[Array, "B Q H E"],
    key: Float[Array, "B K Kh E"],
    value: Float[Array, "B K Kh Ev"],
    *,
    mask: Bool[Array, "#B 1 Q K"],
    plan: Plan,
) -> Float[Array, "B Q H Ev"]:
    """Return what `attention.attend` does, block by block; the plan's order must show all that the mask shows.

    Args:
      query: `[B, Q, H, E]`.
      key: `[B, K, Kh, E]`, where H is a multiple of Kh.
      value: `[B, K, Kh, Ev]`.
      mask: `[B | 1, 1, Q, K]`, true where the query may look.
      plan: the blocks, the factor of the products and the bound of the scores.
    """
    seen = jnp.broadcast_to(mask[:, 0], (query.shape[0], *mask.shape[2:]))
    return _attend(query, key, value, seen, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, seen: Array, plan: Plan) -> Array:
    return _forward(query, key, value, seen, plan)[0]


def _forward(query: Array, key: Array, value: Array, seen: Array, plan: Plan) -> tuple[Array, tuple[Array, ...]]:
    out, log_total = _rows(functools.partial(_read, plan), (query, key, value, seen), plan)
    return out, (query, key, value, seen, out, log_total)


def _backward(plan: Plan, saved: tuple[Array, ...], on_out: Array) -> tuple[Array, Array, Array, None]:
    return (*_rows(functools.partial(_gradient, plan), (*saved, on_out), plan), None)


_attend.defvjp(_forward, _backward)


def _rows(function: Any, arrays: tuple[Array, ...], plan: Plan) -> Any:
    """Return a function of one row for all rows of a batch."""
    if plan.rows is None or plan.rows >= arrays[0].shape[0]:
        return jax.vmap(function)(*arrays)
    return jax.lax.map(lambda row: function(*row), arrays, batch_size=None if plan.rows == 1 else plan.rows)


def _grouped(x: Float[Array, "Q H E"], kv_heads: int) -> Float[Array, "Kh Q G E"]:
    """Return queries by key head: those that share one become rows of one product."""
    queries, heads, width = x.shape
    return x.reshape(queries, kv_heads, heads // kv_heads, width).transpose(1, 0, 2, 3)


def _ungrouped(x: Float[Array, "Kh Q G E"]) -> Float[Array, "Q H E"]:
    return x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[3])


def _some(x: Array, ranges: tuple[tuple[int, int], ...]) -> Array:
    """Return ranges of columns, axis 1, next to each other."""
    parts = [x[:, first:last] for first, last in ranges]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _scores(block: Block, plan: Plan, rows: Array, keys: Array, seen: Array) -> tuple[Array, Array]:
    """Return the capped scores `[Kh, n, G, k]` of a block, and its part of the mask, `[1, n, 1, k]`."""
    queries = rows[:, block.start : block.stop]
    heads, count, groups, width = queries.shape
    products = jnp.matmul(
        queries.reshape(heads, count * groups, width), keys.swapaxes(1, 2), preferred_element_type=jnp.float32
    )
    scores = plan.scale * products.reshape(heads, count, groups, -1)
    if plan.softcap is not None:
        scores = plan.softcap * jnp.tanh(scores / plan.softcap)
    return scores, _some(seen[block.start : block.stop], block.keys)[None, :, None, :]


def _read(plan: Plan, query: Array, key: Array, value: Array, seen: Array) -> tuple[Array, Array]:
    """Return the results `[Q, H, Ev]` of one row, and the logarithm of each softmax's total, `[Kh, Q, G, 1]`."""
    rows, keys, values = _grouped(query, key.shape[1]), key.swapaxes(0, 1), value.swapaxes(0, 1)
    heads, _, groups, _ = rows.shape
    outs, totals = [], []
    for block in plan.blocks:
        count = block.stop - block.start
        if not block.keys:
            outs.append(jnp.zeros((heads, count, groups, value.shape[2]), jnp.float32))
            totals.append(jnp.zeros((heads, count, groups, 1), jnp.float32))
            continue
        scores, mask = _scores(block, plan, rows, _some(keys, block.keys), seen)
        scores = jnp.where(mask, scores, _MASKED)
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _FLOOR)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1.0)
        weights = weights.astype(value.dtype).reshape(heads, count * groups, -1)
        found = jnp.matmul(weights, _some(values, block.keys), preferred_element_type=jnp.float32)
        outs.append(found.reshape(heads, count, groups, -1) / total)
        totals.append(peak + jnp.log(total))
    return _ungrouped(jnp.concatenate(outs, axis=1)).astype(query.dtype), jnp.concatenate(totals, axis=1)


def _gradient(
    plan: Plan, query: Array, key: Array, value: Array, seen: Array, out: Array, log_total: Array, on_out: Array
) -> tuple[Array, Array, Array]:
    """Return d loss / d (query, key, value) of one row, given d loss / d out.

    With the weights p = e^(s - log_total): d s = p (d p - <d out, out>), because sum_k p d p = <d out, out>.
    """
    kv_heads = key.shape[1]
    rows, on_rows = _grouped(query, kv_heads), _grouped(on_out, kv_heads)
    mean = jnp.sum(on_rows.astype(jnp.float32) * _grouped(out, kv_heads), axis=-1, keepdims=True)
    keys, values = key.swapaxes(0, 1), value.swapaxes(0, 1)
    on_query, on_keys, on_values = [], *(jnp.zeros(part.shape, jnp.float32) for part in (keys, values))
    for block in plan.blocks:
        here = slice(block.start, block.stop)
        queries, on_found = rows[:, here], on_rows[:, here]
        heads, count, groups, width = queries.shape
        if not block.keys:
            on_query.append(jnp.zeros_like(queries))
            continue
        near, far = _some(keys, block.keys), _some(values, block.keys)
        scores, mask = _scores(block, plan, rows, near, seen)
        weights = jnp.where(mask, jnp.exp(scores - log_total[:, here]), 0.0)
        flat = on_found.reshape(heads, count * groups, -1)
        on_weights = jnp.matmul(flat, far.swapaxes(1, 2), preferred_element_type=jnp.float32).reshape(scores.shape)
        on_scores = plan.scale * weights * (on_weights - mean[:, here])
        if plan.softcap is not None:
            on_scores = on_scores * (1.0 - jnp.square(scores / plan.softcap))
        on_scores = on_scores.astype(query.dtype).reshape(heads, count * groups, -1)
        weights = weights.astype(value.dtype).reshape(heads, count * groups, -1)
        on_query.append(jnp.matmul(on_scores, near, preferred_element_type=jnp.float32).reshape(queries.shape))
        flat_queries = queries.reshape(heads, count * groups, width)
        on_keys = _add(on_keys, jnp.einsum("hqk,hqe->hke", on_scores, flat_queries, **_F32), block.keys)
        on_values = _add(on_values, jnp.einsum("hqk,hqe->hke", weights, flat, **_F32), block.keys)
    grads = _ungrouped(jnp.concatenate(on_query, axis=1)), on_keys.swapaxes(0, 1), on_values.swapaxes(0, 1)
    return grads[0].astype(query.dtype), grads[1].astype(key.dtype), grads[2].astype(value.dtype)


_F32: Any = {"preferred_element_type": jnp.float32}


def _add(sums: Array, parts: Array, ranges: tuple[tuple[int, int], ...]) -> Array:
    """Return the sums with parts, which lie next to each other, added to ranges of columns, axis 1."""
    begin = 0
    for first, last in ranges:
        part = parts[:, begin : begin + last - first]
        # Under vmap an update of a slice would be a scatter; a padded sum is fused.
        sums = sums + jnp.pad(part, ((0, 0), (first, sums.shape[1] - last), (0, 0)))
        begin += last - first
    return sums
