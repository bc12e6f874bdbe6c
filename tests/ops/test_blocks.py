"""Attention in blocks against the plain form: values, gradients, and what is multiplied at all."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.ops import attention, blocks
from pit_jax.ops.sight import Order, Tokens, dense

B, L, H, KH, E = 3, 20, 4, 2, 8
CAUSAL = Order(causal=True)
ORDERS = {
    "causal": CAUSAL,
    "everything": Order(causal=False),
    "prefix": Order(causal=True, prefix=7),
    "window": Order(causal=True, before=3, after=3),
    "memory": Order(causal=True, memory=6),
}
SEGMENTS = np.array([[1] * 20, [1] * 9 + [2] * 8 + [0] * 3, [0] * 20], np.int32)


def inputs(order: Order, dtype: str = "float32") -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return queries, keys, values and a cotangent, and the mask of packed rows, one of which is all padding."""
    rng = np.random.default_rng(0)
    keys = L + order.memory
    shapes = (B, L, H, E), (B, keys, KH, E), (B, keys, KH, E), (B, L, H, E)
    arrays = tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    positions = np.stack([np.arange(L), np.concatenate([np.arange(9), np.arange(11)]), np.zeros(L)]).astype(np.int32)
    own = Tokens(jnp.asarray(SEGMENTS), jnp.asarray(positions))
    memory = (jnp.asarray(part[:, : order.memory]) for part in (SEGMENTS, positions))
    known = Tokens(*(jnp.concatenate(parts, axis=1) for parts in zip(memory, own, strict=True)))
    return arrays, dense(order, own, known)


def gradient(function, arrays):
    def total(query, key, value):
        out = function(query, key, value)
        return jnp.sum((out * arrays[3]).astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays[:3])


def close(found, expected, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol), found, expected)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("rows", "softcap"), [(1, None), (2, 1.5), (None, None)])
def test_values_and_gradients_are_those_of_the_plain_form(name: str, rows: int | None, softcap: float | None) -> None:
    order = ORDERS[name]
    arrays, mask = inputs(order)
    # `join` is small, so that windows leave several ranges of keys: the memory and what is near.
    plan = blocks.Plan(blocks.blocks(order, L, L + order.memory, 6, join=2), rows, 0.3, softcap)
    found = gradient(lambda *known: blocks.attend(*known, mask=mask, plan=plan), arrays)
    close(found, gradient(
        lambda *known: attention.attend(*known, mask=mask, bias=None, scale=0.3, softcap=softcap), arrays
    ))  # fmt: skip
    assert not np.any(found[0][1][2]), "queries that see nothing get zeros"


def test_a_block_without_keys_gives_zeros() -> None:
    arrays, mask = inputs(CAUSAL)
    plan = blocks.Plan((blocks.Block(0, 5, ()), blocks.Block(5, L, ((0, L),))), 1, 0.3, None)
    found = gradient(lambda *known: blocks.attend(*known, mask=mask, plan=plan), arrays)
    hidden = mask.at[:, :, :5].set(False)
    close(found, gradient(lambda *known: attention.attend(*known, mask=hidden, bias=None, scale=0.3), arrays))


def test_bfloat16_keeps_its_dtypes() -> None:
    arrays, mask = inputs(CAUSAL, "bfloat16")
    plan = blocks.Plan(blocks.blocks(CAUSAL, L, L, 6), None, 0.3, None)
    found = gradient(lambda *known: blocks.attend(*known, mask=mask, plan=plan), arrays)
    assert all(part.dtype == jnp.bfloat16 for part in (found[0][1], *found[1]))
    close(found, gradient(lambda *known: attention.attend(*known, mask=mask, bias=None, scale=0.3), arrays), atol=0.1)


def test_blocks_have_the_keys_that_their_queries_may_see() -> None:
    assert blocks.blocks(CAUSAL, 8, 8, 4) == (blocks.Block(0, 4, ((0, 4),)), blocks.Block(4, 8, ((0, 8),)))
    window = Order(causal=True, before=1, memory=2)
    assert blocks.blocks(window, 9, 11, 3, join=1)[2] == blocks.Block(6, 9, ((0, 2), (7, 11)))
    assert blocks.blocks(window, 9, 11, 3)[2] == blocks.Block(6, 9, ((0, 11),)), "a small gap is not worth a piece"
    assert blocks.blocks(Order(causal=True, prefix=5), 8, 8, 4)[0] == blocks.Block(0, 4, ((0, 5),))


def test_the_scores_of_all_queries_never_exist() -> None:
    length = 64
    shapes = [jax.ShapeDtypeStruct((2, length, heads, E), jnp.float32) for heads in (H, KH, KH)]
    mask = jax.ShapeDtypeStruct((2, 1, length, length), jnp.bool_)
    plan = blocks.Plan(blocks.blocks(CAUSAL, length, length, 16), 1, 0.3, None)

    def largest(function) -> int:
        loss = jax.grad(lambda *arrays: jnp.sum(function(*arrays[:3], mask=arrays[3])), (0, 1, 2))
        text = jax.jit(loss).lower(*shapes, mask).compile().as_text()
        found = re.findall(r"\bf32\[([\d,]+)\]", text)
        return max(int(np.prod([int(part) for part in size.split(",")])) for size in found)

    assert largest(lambda *known, mask: attention.attend(*known, mask=mask, bias=None, scale=0.3)) >= 2 * H * length**2
    assert largest(lambda *known, mask: blocks.attend(*known, mask=mask, plan=plan)) <= H * 16 * length
