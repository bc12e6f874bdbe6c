"""An RL step on prompts that their samples share is the step on a prompt for each sample."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from pit_jax.core import metric, tree
from pit_jax.core.errors import DataError
from pit_jax.core.types import Conditional
from pit_jax.decode.batches import Response, Scorer
from pit_jax.losses.policy import PolicyLoss
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.ops.shared import share
from pit_jax.rl.config import RlConfig
from pit_jax.rl.experience import Measured, batches, build, objective, token_scores, token_values
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.text.codec import PromptRow
from pit_jax.train.optim import Optimizer
from pit_jax.train.optim import build as build_optimizer
from pit_jax.train.state import create
from pit_jax.train.step import make_step

LM = language_model(preset("nano", vocab_size=12, width=16, heads=2, kv_heads=2, head_dim=8, mlp=24, layers=1))
GROUP, PROMPTS = 3, 4
PPO = RlConfig(estimator="ppo", samples_per_prompt=GROUP, policy=PolicyLoss(kind="ppo_clip"))


MESH = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def _sampled() -> Conditional:
    draw, rows = np.random.default_rng(2), PROMPTS * GROUP
    lengths = np.array([4, 2, 3, 1])[:, None] > np.arange(4)[None, :]
    prompts = np.where(lengths, draw.integers(3, 12, (PROMPTS, 4)), 0)
    return Conditional(
        prompt=np.repeat(prompts, GROUP, axis=0),
        prompt_segments=np.repeat(lengths.astype(np.int32), GROUP, axis=0),
        prompt_reference=np.zeros((rows, 4), bool),
        response=draw.integers(3, 12, (rows, 5)),
        response_segments=(np.arange(5)[None, :] < draw.integers(1, 6, rows)[:, None]).astype(np.int32),
    )


def _step(config: RlConfig, inputs: Conditional) -> tuple[dict, dict]:
    """Return parameters and metrics after the update(s) of one RL step."""
    network, rows = ValueModel(LM) if config.estimator == "ppo" else LM, PROMPTS * GROUP
    start = network.init(jax.random.key(0))
    trunk = start["trunk"] if config.estimator == "ppo" else start
    anchor = LM.init(jax.random.key(1))
    scores, frozen = (token_scores(LM, params, inputs, 2) for params in (trunk, anchor))
    values = token_values(network, start, inputs, 2) if config.estimator == "ppo" else np.zeros_like(scores.logp)
    reward, zeros = np.random.default_rng(3).normal(size=rows).astype(np.float32), np.zeros(rows, np.float32)
    measured = Measured(
        inputs, scores.logp, scores.logp, frozen.logp, values, scores.entropy, reward, zeros, zeros, zeros < 1
    )
    experience, stats = build(config, measured, 0.1, None)
    optimizer = Optimizer(learning_rate=0.01)
    state = create(start, build_optimizer(optimizer, config.updates))
    update, last = make_step(objective(LM, config), optimizer, steps=config.updates), {}
    for batch in batches(experience, config, 2, jax.random.key(4), MESH):
        state, last = update(state, batch, jax.random.key(5))
    return state.params, metric.values(stats | last)


@pytest.mark.parametrize(
    "config",
    [RlConfig(samples_per_prompt=GROUP), pytest.param(PPO, marks=pytest.mark.slow)],
    ids=lambda config: config.estimator,
)
def test_a_step_on_shared_prompts_is_the_plain_step(config: RlConfig) -> None:
    plain = _sampled()
    shared = share(plain, GROUP)
    assert shared.prompt.shape == (PROMPTS, 4) and shared.response is plain.response
    (params, metrics), (expected, wanted) = (_step(config, inputs) for inputs in (shared, plain))
    for (path, one), (_, other) in zip(tree.named_leaves(params), tree.named_leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=path)
    assert metrics.keys() == wanted.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_minibatches_of_shared_prompts_hold_whole_prompts() -> None:
    inputs = share(_sampled(), GROUP)
    table = np.broadcast_to(np.arange(PROMPTS * GROUP, dtype=np.float32)[:, None], (PROMPTS * GROUP, 5))
    zeros = table[:, 0]
    config = RlConfig(epochs=2, minibatches=2, samples_per_prompt=GROUP, policy=PolicyLoss(kind="ppo_clip"))
    measured = Measured(inputs, table, table, table, table, table, zeros, zeros, zeros, zeros < 1)
    parts = list(batches(build(config, measured, 0.1, None)[0], config, 1, jax.random.key(0), MESH))
    assert [part.inputs.prompt.shape for part in parts] == [(1, 2, 4)] * 4
    orders = []
    for part in parts:
        numbers = np.asarray(part.logp_sampler)[0, :, 0].reshape(-1, GROUP)
        orders.append((numbers[:, 0] / GROUP).astype(int).tolist())
        np.testing.assert_array_equal(numbers, numbers[:, :1] + np.arange(GROUP)[None, :])
        np.testing.assert_array_equal(part.inputs.prompt[0], inputs.prompt[orders[-1]])
    assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3]) == list(range(PROMPTS))


def test_a_scorer_computes_a_prompt_once_for_its_answers() -> None:
    model = ScalarModel(LM, "mean_difference", "causal")
    params = model.init(jax.random.key(0))
    rows = [PromptRow((3, 4, 5), (1, 3)), PromptRow((6,), (0, 0)), PromptRow((7, 8), (0, 1))]
    answers = [Response(tuple(range(3, 3 + length)), bool(length % 2)) for length in (1, 2, 3, 0, 1, 2)]
    repeated = [row for row in rows for _ in range(2)]
    make = functools.partial(Scorer, model=model, width=4, length=5, eos_id=1, pad_id=0, batch_size=2)
    expected = make().score(params, repeated, answers)
    np.testing.assert_allclose(make(samples=2).score(params, repeated, answers), expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3
    with pytest.raises(DataError, match="5 prompts are not 2 for each"):
        make(samples=2).score(params, repeated[:5], answers[:5])
