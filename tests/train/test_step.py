"""The training step: how a batch is cut must not matter, and a broken batch must not touch the state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core import metric
from pit_jax.core.tree import named_leaves
from pit_jax.train import state as states
from pit_jax.train.optim import Optimizer, build
from pit_jax.train.step import make_step

OPTIMIZER = Optimizer(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
KEY = jax.random.key(0)


def parameters():
    one, two = jax.random.split(jax.random.key(1))
    return {"in": {"kernel": jax.random.normal(one, (4, 8))}, "out": {"kernel": jax.random.normal(two, (8,))}}


def examples(rows=16):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(rows, 4)).astype(np.float32),
        "y": rng.normal(size=rows).astype(np.float32),
        "weight": rng.integers(0, 4, size=rows).astype(np.float32),
    }


def objective(params, batch, key):
    del key
    error = jnp.tanh(batch["x"] @ params["in"]["kernel"]) @ params["out"]["kernel"] - batch["y"]
    loss = metric.mean(error**2, batch["weight"])
    return loss, {"absolute": metric.mean(jnp.abs(error), batch["weight"])}


def cut(batch, parts):
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)


def run(batch, *, params=None, steps=3, placement=None, optimizer=OPTIMIZER, loss=objective):
    transform = build(optimizer, steps)
    state = states.create(parameters() if params is None else params, transform, placement)
    step = make_step(loss, optimizer, steps=steps, shardings=placement)
    for _ in range(steps):
        state, metrics = step(state, batch, KEY)
        jax.block_until_ready(state)
    return state, metric.values(metrics)


def assert_same(left, right, tolerance=1e-6):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_of_unequal_weight_equal_one_batch(parts):
    whole, whole_metrics = run(cut(examples(), 1))
    pieces, pieces_metrics = run(cut(examples(), parts))
    assert_same(whole, pieces)
    assert pieces_metrics == pytest.approx(whole_metrics, rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("parts", [1, 2])
def test_four_devices_equal_one(kind, parts):
    optimizer = dataclasses.replace(OPTIMIZER, kind=kind)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = {
        "in": {"kernel": NamedSharding(mesh, PartitionSpec(None, "model"))},
        "out": {"kernel": NamedSharding(mesh, PartitionSpec("model"))},
    }
    transform = build(optimizer, 3)
    placement = states.shardings(states.abstract(parameters(), transform), placed, transform)
    batch = jax.device_put(cut(examples(), parts), NamedSharding(mesh, PartitionSpec(None, "data")))
    sharded, sharded_metrics = run(
        batch, params=jax.device_put(parameters(), placed), placement=placement, optimizer=optimizer
    )
    plain, plain_metrics = run(cut(examples(), parts), optimizer=optimizer)
    assert_same(plain, sharded)
    assert sharded_metrics == pytest.approx(plain_metrics, rel=1e-5)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == placement


def test_first_update_equals_a_numpy_adamw():
    params, batch = parameters(), examples()
    state, metrics = run(cut(batch, 1), params=params, steps=1)

    def mean_loss(flat):
        kernel, out = flat[:32].reshape(4, 8), flat[32:]
        error = np.tanh(batch["x"].astype(np.float64) @ kernel) @ out - batch["y"]
        return np.sum(error**2 * batch["weight"]) / np.sum(batch["weight"])

    flat = np.concatenate([np.ravel(params["in"]["kernel"]), params["out"]["kernel"]]).astype(np.float64)
    grads = np.array([(mean_loss(flat + d) - mean_loss(flat - d)) / 2e-5 for d in np.eye(flat.size) * 1e-5])
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(grads), rel=1e-4)
    assert metrics["loss"] == pytest.approx(mean_loss(flat), rel=1e-5)
    assert metrics["param_norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    clipped = grads * min(1.0, 0.5 / np.linalg.norm(grads))
    direction = clipped / (np.abs(clipped) + OPTIMIZER.eps)  # first step of Adam after bias correction
    direction[:32] += OPTIMIZER.weight_decay * flat[:32]  # the vector is not decayed
    expected = flat - OPTIMIZER.learning_rate * direction
    got = np.concatenate([np.ravel(state.params["in"]["kernel"]), state.params["out"]["kernel"]])
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_leaves_the_state_as_it_was(poison):
    def broken(params, batch, key):
        loss, metrics = objective(params, batch, key)
        if poison == "loss":
            return loss._replace(total=loss.total * jnp.nan), metrics
        # sqrt(0) has value 0 and an infinite slope: a finite loss with a gradient that is not.
        return loss._replace(total=loss.total + jnp.sqrt(jnp.sum(params["out"]["kernel"]) * 0.0)), metrics

    transform = build(OPTIMIZER, 3)
    before = jax.device_get(states.create(parameters(), transform))
    state, metrics = run(cut(examples(), 1), loss=broken, steps=1)
    assert metrics["loss_is_finite"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_the_start_lives_on_although_the_state_is_donated():
    params = parameters()
    state, _ = run(cut(examples(), 1), params=params, steps=1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert int(state.step) == 1


def test_a_batch_without_weight_changes_nothing_through_its_gradient():
    batch = examples() | {"weight": np.zeros(16, np.float32)}
    optimizer = Optimizer(learning_rate=1e-2)
    state, metrics = run(cut(batch, 2), optimizer=optimizer, steps=1)
    assert_same(parameters(), state.params, 0.0)
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0


def test_micro_batches_draw_different_numbers_and_a_key_repeats_them():
    def noisy(params, batch, key):
        loss, _ = objective(params, batch, key)
        draw = jax.random.normal(key, ())
        return loss, {"draw": metric.scalar(draw), "square": metric.scalar(draw**2)}

    _, once = run(cut(examples(), 2), loss=noisy, steps=1)
    _, again = run(cut(examples(), 2), loss=noisy, steps=1)
    assert once == again
    assert once["square"] - once["draw"] ** 2 > 1e-6  # variance over the two micro-batches


def test_the_step_is_compiled_once():
    transform = build(OPTIMIZER, 3)
    state = states.create(parameters(), transform)
    step = make_step(objective, OPTIMIZER, steps=3)
    for _ in range(3):
        state, _ = step(state, cut(examples(), 2), KEY)
    assert step._cache_size() == 1


def test_leaves_with_different_numbers_of_micro_batches_are_refused():
    batch = cut(examples(), 2) | {"y": examples()["y"][None]}
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        run(batch, steps=1)


def test_factored_moments_are_replicated_and_full_ones_live_with_their_parameter():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("model")), NamedSharding(mesh, PartitionSpec())
    shapes = {"kernel": jax.ShapeDtypeStruct((256, 128), jnp.float32), "scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    transform = build(Optimizer(learning_rate=1e-3, kind="adafactor"), 5)
    placed = states.shardings(states.abstract(shapes, transform), {"kernel": split, "scale": split}, transform)
    named = dict(named_leaves(placed.opt_state))
    moments = {name.split("/", 1)[1]: sharding for name, sharding in named.items()}
    assert moments["v_row/kernel"] == moments["v_col/kernel"] == moments["v/kernel"] == moments["count"] == whole
    assert moments["v/scale"] == split
