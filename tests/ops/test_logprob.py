"""The chunked language-model head against a plain float64 softmax: values, gradients, numerics and memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pit_jax.core.errors import ConfigError
from pit_jax.core.types import TokenScores
from pit_jax.ops.logprob import logits, token_scores

V, D = 23, 8
LEADING = (3, 5)
OPTIONS = [(None, 1.0), (3.0, 0.5)]


def _inputs(leading: tuple[int, ...] = LEADING, size: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(size * rng.normal(size=(*leading, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, V, leading), jnp.int32)


def _reference(hidden, head, targets, softcap, scale) -> TokenScores:
    """Return the scores in float64, by NumPy."""
    logits = scale * np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    peak = logits.max(-1, keepdims=True)
    log_z = peak[..., 0] + np.log(np.exp(logits - peak).sum(-1))
    logps = logits - log_z[..., None]
    logp = np.take_along_axis(logps, np.asarray(targets)[..., None], -1)[..., 0]
    return TokenScores(logp, log_z, -(np.exp(logps) * logps).sum(-1), logits.argmax(-1) == np.asarray(targets))


@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
@pytest.mark.parametrize("chunk", [1, 7, 22, V, 4 * V])
def test_values(chunk: int, softcap: float | None, scale: float):
    hidden, head, targets = _inputs()
    # The most likely token of half of the positions is the target, so that `correct` has both values.
    targets = targets.at[:, ::2].set(jnp.argmax(hidden @ head, axis=-1)[:, ::2])
    got = token_scores(hidden, head, targets, chunk=chunk, softcap=softcap, scale=scale)
    want = _reference(hidden, head, targets, softcap, scale)
    for name, value in got._asdict().items():
        assert value.dtype == jnp.float32 and value.shape == LEADING
        np.testing.assert_allclose(value, want._asdict()[name], atol=1e-5, err_msg=name)
    assert 0 < got.correct.sum() < got.correct.size


@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
def test_logits_of_decoding_are_those_of_training(softcap: float | None, scale: float):
    hidden, head, targets = _inputs()
    table = jax.nn.log_softmax(logits(hidden, head, softcap=softcap, scale=scale))
    sampled = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    trained = token_scores(hidden, head, targets, chunk=7, softcap=softcap, scale=scale)
    np.testing.assert_allclose(sampled, trained.logp, atol=1e-5)


@pytest.mark.parametrize(("softcap", "scale"), OPTIONS)
@pytest.mark.parametrize("chunk", [7, V])
def test_gradients_equal_finite_differences(chunk: int, softcap: float | None, scale: float):
    hidden, head, targets = _inputs()
    rng = np.random.default_rng(1)
    on_logp, on_log_z = rng.normal(size=(2, *LEADING))

    def loss(hidden, head):
        scores = token_scores(hidden, head, targets, chunk=chunk, softcap=softcap, scale=scale)
        return jnp.sum(
            jnp.asarray(on_logp, jnp.float32) * scores.logp + jnp.asarray(on_log_z, jnp.float32) * scores.log_z
        )

    def slope(direction_hidden, direction_head, step=1e-5) -> float:
        ends = []
        for sign in (1, -1):
            moved = np.asarray(hidden) + sign * step * direction_hidden, np.asarray(head) + sign * step * direction_head
            scores = _reference(*moved, targets, softcap, scale)
            ends.append((on_logp * scores.logp + on_log_z * scores.log_z).sum())
        return (ends[0] - ends[1]) / (2 * step)

    grads = jax.grad(loss, (0, 1))(hidden, head)
    for _ in range(8):
        directions = rng.normal(size=hidden.shape), rng.normal(size=head.shape)
        for kept in ((1, 0), (0, 1)):
            parts = [keep * direction for keep, direction in zip(kept, directions, strict=True)]
            got = sum(np.vdot(np.asarray(grad), part) for grad, part in zip(grads, parts, strict=True))
            np.testing.assert_allclose(got, slope(*parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 2)])
def test_any_leading_shape(leading: tuple[int, ...]):
    hidden, head, targets = _inputs(leading)
    gradient = jax.value_and_grad(
        lambda hidden, head, chunk: jnp.sum(token_scores(hidden, head, targets, chunk=chunk).logp), (0, 1)
    )
    blocked, plain = gradient(hidden, head, 5), gradient(hidden, head, V)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), blocked, plain)


@pytest.mark.parametrize("chunk", [7, V])
def test_entropy_and_correct_have_no_gradient(chunk: int):
    hidden, head, targets = _inputs()

    def reported(hidden, head):
        scores = token_scores(hidden, head, targets, chunk=chunk)
        return jnp.sum(scores.entropy + scores.correct)

    assert all(not jnp.any(grad) for grad in jax.grad(reported, (0, 1))(hidden, head))


@pytest.mark.parametrize("chunk", [7, V])
def test_extreme_logits(chunk: int):
    hidden, head, targets = _inputs(size=300.0)
    got = token_scores(hidden, head, targets, chunk=chunk)
    want = _reference(hidden, head, targets, None, 1.0)
    np.testing.assert_allclose(got.logp, want.logp, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(got.log_z, want.log_z, rtol=1e-6)
    np.testing.assert_allclose(got.entropy, want.entropy, atol=1e-3)


def test_bfloat16_accumulates_in_float32_and_keeps_the_dtypes():
    hidden, head, targets = _inputs()
    half = hidden.astype(jnp.bfloat16)

    def loss(hidden, head, chunk):
        scores = token_scores(hidden, head, targets, chunk=chunk)
        return jnp.sum(scores.logp), scores

    (_, scores), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(half, head, 7)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    rounded = head.astype(jnp.bfloat16)
    np.testing.assert_allclose(scores.logp, _reference(half, rounded, targets, None, 1.0).logp, atol=1e-4)
    exact = jax.grad(lambda *a: loss(*a)[0], (0, 1))(half.astype(jnp.float32), rounded.astype(jnp.float32), V)
    np.testing.assert_allclose(grads[0].astype(jnp.float32), exact[0], atol=0.05)
    np.testing.assert_allclose(grads[1], exact[1], atol=0.05)


def _compiled(chunk: int, batch: int = 4, length: int = 32, width: int = 16, vocabulary: int = 1000):
    shapes = (batch, length, width), (width, vocabulary)

    def loss(hidden, head, targets):
        scores = token_scores(hidden, head, targets, chunk=chunk)
        return jnp.sum(scores.logp + scores.log_z), scores

    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*abstract, targets).compile()


def test_the_table_of_logits_never_exists():
    def largest(compiled) -> int:
        sizes = re.findall(r"\b(?:f32|f64|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
        return max(int(np.prod([int(n) for n in size.split(",")])) for size in sizes)

    blocked, plain = _compiled(chunk=100), _compiled(chunk=1000)
    table = 4 * 32 * 1000
    assert largest(plain) >= table, "the plain form must show what is looked for"
    # The head [16, 1000] and one block of logits [4, 32, 100] are the largest arrays that are left.
    assert largest(blocked) <= 16 * 1000
    used = [compiled.memory_analysis().temp_size_in_bytes for compiled in (blocked, plain)]
    assert used[0] < 4 * table / 2 < 4 * table <= used[1], used


def test_sharded_rows_need_no_gathering():
    hidden, head, targets = _inputs((8, 5))
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def loss(hidden, head, targets):
        scores = token_scores(hidden, head, targets, chunk=7)
        return jnp.sum(scores.logp), scores.logp

    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    placed = jax.device_put((hidden, head, targets), (rows, everywhere, rows))
    compiled = jax.jit(gradient).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    sharded = jax.block_until_ready(compiled(*placed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sharded, gradient(hidden, head, targets))


def test_chunk_must_be_positive():
    with pytest.raises(ConfigError, match=r"token_scores.chunk = 0"):
        token_scores(*_inputs(), chunk=0)
