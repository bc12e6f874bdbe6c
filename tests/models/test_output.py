"""The head in one pass gives every family what scores that are differentiated give, on one device and on four."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.types import Conditional, Experience, Params
from pit_jax.losses.cross_entropy import cross_entropy, per_token
from pit_jax.losses.policy import PolicyLoss, policy_gradient
from pit_jax.models.api import ConditionalLM
from pit_jax.models.output import summed_loss
from pit_jax.rl import experience
from pit_jax.rl.config import RlConfig
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use

from . import tiny

MESHES = {"data x tensor": MeshConfig(data=2, tensor=2), "fsdp x sequence": MeshConfig(fsdp=2, sequence=2, data=1)}


@functools.partial(jax.jit, static_argnums=0)
def one_pass(lm: ConditionalLM, params: Params, x: Conditional) -> tuple:
    def loss(params: Params) -> tuple:
        mask = x.response_segments > 0
        return summed_loss(lm, params, x, functools.partial(per_token, z_loss=0.1), mask)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def differentiated(lm: ConditionalLM, params: Params, x: Conditional) -> tuple:
    def loss(params: Params) -> tuple:
        scores = lm.logprobs(params, x)
        return cross_entropy(scores, x.response_segments > 0, 0.1)[0].total, scores

    return jax.value_and_grad(loss, has_aux=True)(params)


def close(found: tuple, expected: tuple) -> None:
    (total, scores), grads = found
    np.testing.assert_allclose(total, expected[0][0], rtol=1e-5)
    for one, other in zip(scores, expected[0][1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * (1 + np.abs(other).max()), err_msg=path)


@pytest.mark.parametrize("name", tiny.slow_but(tiny.MODELS, "rotary", "t5"))
def test_one_pass_equals_differentiated_scores(name: str) -> None:
    lm = tiny.MODELS[name]
    params, x = tiny.params(lm), tiny.plain()
    close(one_pass(lm, params, x), differentiated(lm, params, x))


@pytest.mark.parametrize("mesh", MESHES)
def test_one_pass_over_four_devices_equals_one(mesh: str) -> None:
    lm, x = tiny.MODELS["rotary"], tiny.plain()
    params = tiny.params(lm)
    devices = make_mesh(MESHES[mesh], jax.devices()[:4])
    placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, devices))
    with use(devices, DEFAULT_RULES):
        found = jax.block_until_ready(one_pass(lm, placed, put_batch(x, devices, row_axis=0)))
    close(found, differentiated(lm, params, x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reinforce", "ppo_clip"])
def test_the_policy_gradient_is_that_of_differentiated_scores(kind: str) -> None:
    lm, x = tiny.MODELS["rotary"], tiny.plain()
    params, rng = tiny.params(lm), np.random.default_rng(0)
    logp = lm.logprobs(params, x).logp
    # Ratios on both sides of the clip, and what may be anything at padding.
    other = jnp.where(x.response_segments > 0, logp + rng.normal(size=logp.shape, scale=0.3), jnp.nan)
    batch = Experience(
        inputs=x, logp_sampler=other, logp_old=other, logp_anchor=other, returns=other, values_old=other,
        advantage=jnp.asarray(rng.normal(size=logp.shape), jnp.float32),
    )  # fmt: skip
    config = RlConfig(policy=PolicyLoss(kind=kind))

    def plain(params: Params) -> tuple:
        scores = lm.logprobs(params, batch.inputs)
        loss, metrics = policy_gradient(scores.logp, batch, config.policy, scores.entropy)
        return loss.total, (loss, metrics)

    def fused(params: Params) -> tuple:
        loss, metrics = experience.objective(lm, config)(params, batch, jax.random.key(0))
        return loss.total, (loss, metrics)

    (found, expected) = (jax.jit(jax.value_and_grad(form, has_aux=True))(params) for form in (fused, plain))
    for (path, one), (_, two) in zip(tree.named_leaves(found[1]), tree.named_leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5, err_msg=path)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), found[0], expected[0])
