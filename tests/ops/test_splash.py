"""The Pallas kernels, interpreted, against plain attention; tests/models/test_tpu_compile.py compiles them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.ops import splash
from pit_jax.ops.attention import attend
from pit_jax.ops.sight import Order, Tokens, dense, sighted

B, L, H, KH, E = 2, 150, 4, 2, 8
PROMPT = 40


def inputs(queries: int, keys: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    draw = np.random.default_rng(0).normal
    shapes = (B, queries, H, E), (B, keys, KH, E), (B, keys, KH, E)
    return tuple(jnp.asarray(draw(size=shape), dtype) for shape in shapes)


def row(*lengths: tuple[int, ...], columns: int) -> Tokens:
    """Return rows of runs of these lengths: segments 1, 2, ..., then padding."""
    segments, positions = (np.zeros((len(lengths), columns), np.int32) for _ in range(2))
    for number, runs in enumerate(lengths):
        at = 0
        for segment, run in enumerate(runs, start=1):
            segments[number, at : at + run], positions[number, at : at + run] = segment, np.arange(run)
            at += run
    return Tokens(jnp.asarray(segments), jnp.asarray(positions))


def shape(order: Order, queries: int, keys: int, softcap: float | None = None) -> splash.Shape:
    return splash.Shape(queries=queries, keys=keys, heads=H, shards=1, order=order, softcap=softcap, interpret=True)


def both(order: Order, queries: Tokens, keys: Tokens, softcap: float | None = None, dtype: str = "float32"):
    """Return (outputs, gradients) of the kernel and of plain attention in float32."""
    arrays = inputs(queries.segments.shape[1], keys.segments.shape[1], dtype)
    made = shape(order, queries.segments.shape[1], keys.segments.shape[1], softcap)
    shown = sighted(queries.segments, keys.segments)

    def kernel(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = splash.attend(splash.kernel(made), *arrays, queries.segments, keys.segments, shown, 0.4)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def plain(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*arrays, mask=dense(order, queries, keys), bias=None, scale=0.4, softcap=softcap)
        return jnp.sum(jnp.sin(out)), out

    grad = [jax.jit(jax.grad(function, (0, 1, 2), has_aux=True)) for function in (kernel, plain)]
    return grad[0](*arrays), grad[1](*(part.astype(jnp.float32) for part in arrays))


PACKED = row((70, 50), (30,), columns=L)
CASES = {
    "causal": (Order(causal=True), None),
    "full": (Order(causal=False), None),
    "prefix, capped": (Order(causal=True, prefix=PROMPT), 3.0),
    "window": (Order(causal=True, before=9), None),
    "window on both sides, capped": (Order(causal=False, before=20, after=3), 3.0),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_plain_attention(name: str):
    order, softcap = CASES[name]
    (grads, out), (want_grads, want) = both(order, PACKED, PACKED, softcap)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for one, other in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    padding = PACKED.segments == 0
    assert not np.any(out[padding]) and not np.any(grads[0][padding])


def test_keys_of_another_row_and_a_memory_before_ones_own():
    prompts, own = row((20, 30), (0, 10), columns=60), row((70, 50), (30, 40), columns=140)
    (grads, out), (want_grads, want) = both(Order(causal=False), own, prompts)
    np.testing.assert_allclose(out, want, atol=1e-5)
    # The second row's first segment has no prompt.
    assert not np.any(out[1, :30]) and np.all(np.any(out[1, 30:70] != 0, axis=-1))
    for one, other in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    known = Tokens(*(jnp.concatenate(parts, axis=1) for parts in zip(prompts, own, strict=True)))
    (grads, out), (want_grads, want) = both(Order(causal=True, before=9, memory=60), own, known)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for one, other in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_bfloat16_is_close_and_keeps_its_dtype():
    (grads, out), (want_grads, want) = both(Order(causal=True), PACKED, PACKED, dtype="bfloat16")
    assert out.dtype == jnp.bfloat16 and {grad.dtype for grad in grads} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.03)
    for one, other in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05)


@pytest.mark.parametrize("order", [Order(causal=True), Order(causal=True, before=30), Order(causal=False)], ids=repr)
def test_parts_of_the_queries_equal_the_whole(order: Order):
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=automatic, devices=jax.devices()[:4])
    length, arrays = 4 * 35, inputs(4 * 35, 4 * 35)
    tokens = row((70, 50), (30,), columns=length)
    whole = splash.kernel(shape(order, length, length))
    shown = tokens.segments > 0
    want = splash.attend(whole, *arrays, tokens.segments, tokens.segments, shown, 0.4)
    settings = shape(order, length, length)
    cut = splash.kernel(splash.Shape(**vars(settings) | {"shards": 4}))
    part, all_of_it = jax.P(None, "sequence"), jax.P()
    parts = jax.shard_map(
        lambda made, *rest: splash.attend(made, *rest, 0.4),
        mesh=mesh,
        in_specs=(splash.kernel_specs(cut, mesh, "sequence"), part, all_of_it, all_of_it, part, all_of_it, part),
        out_specs=part,
        check_vma=False,
    )
    got = jax.block_until_ready(jax.jit(parts)(cut, *arrays, tokens.segments, tokens.segments, shown))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_hidden_blocks_are_left_out():
    # 16 blocks of 512: a causal row has the lower triangle, a window of 512 two blocks a row.
    length = 16 * 512

    def blocks(order: Order) -> int:
        made = splash.kernel(
            splash.Shape(queries=length, keys=length, heads=1, shards=1, order=order, softcap=None, interpret=True)
        )
        return int(np.sum(np.asarray(made.fwd_mask_info.block_mask) > 0))

    assert blocks(Order(causal=True)) == 16 * 17 // 2
    assert blocks(Order(causal=True, before=511)) == 16 + 15
