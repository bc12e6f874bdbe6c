"""The head in one pass against scores that are differentiated: values, gradients, chunks, and what is never there."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pit_jax.core.errors import ConfigError
from pit_jax.core.types import TokenScores
from pit_jax.ops.logprob import token_scores
from pit_jax.ops.token_loss import Passage, token_loss

B, T, D, V = 4, 6, 8, 23


def inputs(dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return hidden, head, targets, jnp.asarray(rng.normal(size=(B, T)), jnp.float32)


def per_token(scores: TokenScores, weight: jax.Array) -> jax.Array:
    """Return a loss that is curved in both scores, and nowhere 0."""
    return weight * jnp.tanh(scores.logp) + 0.1 * jnp.square(scores.log_z) + 1.0


def plain(hidden, head, targets, weight, passage: Passage) -> tuple[jax.Array, TokenScores]:
    scores = token_scores(hidden, head, targets, chunk=V, softcap=passage.softcap, scale=passage.scale)
    return jnp.sum(per_token(scores, weight)), scores


def gradient(form, arrays, passage: Passage):
    def loss(hidden, head):
        total, scores = form(hidden, head, *arrays[2:], passage)
        return 3.0 * total, scores

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays[:2])


def close(found, expected, atol: float = 2e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol, rtol=1e-5), found, expected
    )


one_pass = functools.partial(token_loss, per_token)


@pytest.mark.parametrize("passage", [
    Passage(chunks=1), Passage(chunks=5), Passage(chunks=99), Passage(chunks=3, softcap=2.0, scale=0.5),
    Passage(chunks=2, rows=2, columns=1), Passage(chunks=4, rows=2, columns=3),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_scores(passage: Passage) -> None:
    arrays = inputs()
    expected = gradient(plain, arrays, passage)
    close(gradient(one_pass, arrays, passage), expected)
    close(jax.jit(one_pass, static_argnums=4)(*arrays, passage), (expected[0][0] / 3, expected[0][1]))


def test_scores_have_no_gradient() -> None:
    hidden, head, targets, weight = inputs()

    def reported(hidden, head, weight):
        return sum(jnp.sum(part) for part in one_pass(hidden, head, targets, weight, Passage(chunks=2))[1])

    assert all(not jnp.any(part) for part in jax.grad(reported, (0, 1, 2))(hidden, head, weight))


def test_bfloat16_keeps_the_dtypes_and_adds_up_in_float32() -> None:
    arrays = inputs("bfloat16")
    (_, scores), grads = gradient(one_pass, arrays, Passage(chunks=4))
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32 and scores.logp.dtype == jnp.float32
    # Half a unit in the last place of each of two roundings, at a size of 15.
    close(grads, gradient(plain, arrays, Passage(chunks=1))[1], atol=0.07)


def compiled(passage: Passage, vocabulary: int):
    shapes = ((B, 32, 16), (16, vocabulary)), jnp.float32
    hidden, head = (jax.ShapeDtypeStruct(shape, shapes[1]) for shape in shapes[0])
    targets, weight = (jax.ShapeDtypeStruct((B, 32), dtype) for dtype in (jnp.int32, jnp.float32))
    loss = jax.value_and_grad(lambda *arrays: one_pass(*arrays, passage), (0, 1), has_aux=True)
    return jax.jit(loss).lower(hidden, head, targets, weight).compile().as_text()


def sizes(text: str) -> set[int]:
    found = re.findall(r"\b(?:f32|f64|bf16|s32|pred)\[([\d,]+)\]", text)
    return {int(np.prod([int(part) for part in size.split(",")])) for size in found}


def test_the_logits_of_all_tokens_never_exist() -> None:
    vocabulary, tokens = 1000, B * 32
    whole, cut = (sizes(compiled(Passage(chunks=chunks), vocabulary)) for chunks in (1, 8))
    assert tokens * vocabulary in whole, "the single chunk must show what is looked for"
    # The head [16, 1000] and the logits of one chunk [16, 1000] are the largest arrays that are left.
    assert max(cut) == 16 * vocabulary


def test_gradients_of_the_head_meet_once_and_not_in_every_chunk() -> None:
    arrays = inputs()
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    placed = jax.device_put(arrays, (rows, everywhere, rows, rows))

    loss = jax.value_and_grad(lambda *arrays: one_pass(*arrays, Passage(chunks=3, rows=4)), (0, 1), has_aux=True)
    made = jax.jit(loss).lower(*placed).compile()
    text = made.as_text() or ""
    lines = [line for line in text.splitlines() if re.search(r"= .*all-reduce(-start)?\(", line)]
    of_head = [line for line in lines if f"[{V},{D}]" in line or f"[{D},{V}]" in line]
    assert of_head and not [line for line in of_head if "while/body" in line], lines
    assert "all-gather" not in text
    expected = jax.value_and_grad(lambda *arrays: plain(*arrays, Passage(chunks=1)), (0, 1), has_aux=True)(*arrays)
    close(jax.block_until_ready(made(*placed)), expected)


@pytest.mark.parametrize("name", ["chunks", "rows", "columns"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"Passage.{name} = 0"):
        Passage(**{"chunks": 1, name: 0})
