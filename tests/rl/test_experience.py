"""From rewards to experience and statistics, against NumPy and against exact expectations."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import metric
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Conditional, Experience
from pit_jax.decode.batches import Sampler
from pit_jax.decode.sampling import Sampling
from pit_jax.losses.policy import PolicyLoss
from pit_jax.models.heads import ValueModel
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.rl.config import RlConfig
from pit_jax.rl.experience import Baseline, Measured, batches, build, objective, split, token_scores, token_values
from pit_jax.rl.rollout import rollout, rollout_keys
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM, all_responses, conditional, toy_codec

LM = ToyLM()
MESH = make_mesh(MeshConfig(), devices=jax.devices()[:1])
PARAMS, ANCHOR = LM.init(jax.random.key(7)), LM.init(jax.random.key(8))
CODEC = toy_codec(inputs=4, targets=5)
GROUP, BETA = 3, 0.3
PPO = PolicyLoss(kind="ppo_clip")


def _measured() -> Measured:
    sampler = Sampler(
        lm=LM, sampling=Sampling(), width=4, max_new=5, eos_ids=(EOS, OTHER_EOS), pad_id=PAD, batch_size=6
    )
    rows = [CODEC.policy_prompt(prompt) for prompt in ((3, 4), (5,), (4, 4, 3), (5, 5))]
    result = rollout(sampler, PARAMS, rows, GROUP, rollout_keys(0, 0, 12))
    old, anchor = (token_scores(LM, params, result.inputs, 2) for params in (PARAMS, ANCHOR))
    draw = np.random.default_rng(0)
    return Measured(
        inputs=result.inputs,
        logp_sampler=result.samples.logp,
        logp_old=old.logp,
        logp_anchor=anchor.logp,
        values=draw.normal(size=(12, 5)).astype(np.float32) * result.samples.mask,
        entropy=old.entropy,
        reward=draw.normal(size=12).astype(np.float32),
        reference_reward=draw.normal(size=12).astype(np.float32),
        reference_length=np.full(12, 3.0, np.float32),
        finished=result.samples.finished,
    )


MEASURED = _measured()
MASK = np.asarray(MEASURED.inputs.response_segments) > 0


def _penalised(config: RlConfig) -> np.ndarray:
    reward = MEASURED.reward - config.no_eos_penalty * ~MEASURED.finished
    return reward - BETA * ((MEASURED.logp_old - MEASURED.logp_anchor) * MASK).sum(1)


def test_micro_batches_do_not_change_scores() -> None:
    whole = LM.logprobs(PARAMS, MEASURED.inputs)
    for name, part in token_scores(LM, PARAMS, MEASURED.inputs, 4)._asdict().items():
        np.testing.assert_allclose(part, whole._asdict()[name], atol=1e-6)
    with pytest.raises(ConfigError, match="= 5 must divide the 12 samples"):
        token_scores(LM, PARAMS, MEASURED.inputs, 5)


def test_the_kl_and_the_missing_eos_are_part_of_the_reward() -> None:
    config = RlConfig(samples_per_prompt=GROUP, no_eos_penalty=1.5)
    assert 0 < MEASURED.finished.sum() < 12
    experience, stats = build(config, MEASURED, BETA, None)
    rewards = _penalised(config).reshape(-1, GROUP)
    others = (rewards.sum(1, keepdims=True) - rewards) / (GROUP - 1)
    expected = (rewards - others).reshape(-1, 1) * MASK
    np.testing.assert_allclose(experience.advantage, expected, atol=1e-5)
    np.testing.assert_allclose(metric.values(stats)["reward/with_kl"], rewards.mean(), atol=1e-5)
    per_sequence = np.asarray(experience.advantage)[:, 0].reshape(-1, GROUP)
    np.testing.assert_allclose(per_sequence.sum(1), 0.0, atol=1e-5)


def test_group_and_running_baseline() -> None:
    config = RlConfig(estimator="group", samples_per_prompt=GROUP)
    rewards = _penalised(config).reshape(-1, GROUP)
    experience, _ = build(config, MEASURED, BETA, None)
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(experience.advantage)[:, 0], expected.reshape(-1), atol=1e-4)
    config = RlConfig(estimator="reinforce", samples_per_prompt=1)
    for baseline, zero in ((None, rewards.mean()), (0.7, 0.7)):
        experience, _ = build(config, MEASURED, BETA, baseline)
        np.testing.assert_allclose(np.asarray(experience.advantage)[:, 0], rewards.reshape(-1) - zero, atol=1e-5)


def test_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    config = RlConfig(samples_per_prompt=GROUP, whiten=True)
    sequence = np.asarray(build(config, MEASURED, BETA, None)[0].advantage)[:, 0]
    np.testing.assert_allclose([sequence.mean(), sequence.std()], [0.0, 1.0], atol=1e-5)
    config = RlConfig(estimator="ppo", policy=PPO, whiten=True)
    stats = metric.values(build(config, MEASURED, BETA, None)[1])
    np.testing.assert_allclose([stats["advantage/mean"], stats["advantage/std"]], [0.0, 1.0], atol=1e-5)


def test_ppo_returns_are_the_rewards_to_go() -> None:
    config = RlConfig(estimator="ppo", policy=PPO, gamma=1.0, lam=1.0)
    experience, _ = build(config, MEASURED, BETA, None)
    reward = MEASURED.reward - config.no_eos_penalty * ~MEASURED.finished
    per_token = -BETA * (MEASURED.logp_old - MEASURED.logp_anchor) * MASK
    per_token = np.array(per_token)
    per_token[np.arange(12), MASK.sum(1) - 1] += reward
    to_go = np.cumsum(per_token[:, ::-1], axis=1)[:, ::-1] * MASK
    np.testing.assert_allclose(experience.returns, to_go, atol=1e-5)
    np.testing.assert_allclose(experience.advantage, (to_go - MEASURED.values) * MASK, atol=1e-5)


def test_statistics_are_what_they_say() -> None:
    moved = MEASURED._replace(logp_sampler=MEASURED.logp_sampler + 0.25 * MASK)
    config = RlConfig(samples_per_prompt=GROUP, no_eos_penalty=0.5)
    experience, stats = build(config, moved, BETA, None)
    reward, length = MEASURED.reward - 0.5 * ~MEASURED.finished, MASK.sum(1)
    difference = np.asarray((MEASURED.logp_old - MEASURED.logp_anchor) * MASK)
    advantage = np.asarray(experience.advantage)[MASK]
    expected = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(),
        "reward/with_kl": _penalised(config).mean(),
        "gap/mean": (MEASURED.reward - MEASURED.reference_reward).mean(),
        "kl/mean": difference.sum(1).mean(),
        "kl/k3": ((np.exp(-difference) - 1 + difference) * MASK).sum(1).mean(),
        "entropy": np.asarray(MEASURED.entropy)[MASK].mean(),
        "length/mean": length.mean(),
        "length/reference": 3.0,
        "eos_rate": MEASURED.finished.mean(),
        "advantage/mean": advantage.mean(),
        "advantage/std": advantage.std(),
        "reward_length_correlation": np.corrcoef(reward, length)[0, 1],
        "sampler_delta/mean": 0.25,
        "sampler_delta/max": 0.25,
    }
    values = metric.values(stats)
    assert set(values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, atol=2e-5, err_msg=name)


def test_a_constant_length_correlates_with_nothing() -> None:
    one = MEASURED.inputs
    segments = np.zeros_like(one.response_segments)
    segments[:, 0] = 1
    inputs = dataclasses.replace(one, response_segments=segments)
    _, stats = build(RlConfig(samples_per_prompt=GROUP), MEASURED._replace(inputs=inputs), BETA, None)
    assert metric.values(stats)["reward_length_correlation"] == 0.0


def test_the_expected_gradient_is_that_of_reward_minus_beta_kl() -> None:
    """Sum over every response, weighted by its probability: the score-function gradient against jax.grad."""
    every = conditional([3, 5], all_responses(2, (EOS, OTHER_EOS)), 2, 2)
    reward = np.random.default_rng(1).normal(size=len(every.response)).astype(np.float32)

    def sequence(params: dict) -> jax.Array:
        return jnp.sum(LM.logprobs(params, every).logp, axis=1)

    def exact(params: dict) -> jax.Array:
        logp = sequence(params)
        return -jnp.sum(jnp.exp(logp) * (reward - BETA * (logp - sequence(ANCHOR))))

    old, anchor = LM.logprobs(PARAMS, every), LM.logprobs(ANCHOR, every)
    config = RlConfig(estimator="reinforce", samples_per_prompt=1, no_eos_penalty=0.0)
    finished = np.isin(np.asarray(every.response), (EOS, OTHER_EOS)).any(1)
    zeros = np.zeros(len(reward), np.float32)
    measured = Measured(
        every, old.logp, old.logp, anchor.logp, jnp.zeros_like(old.logp), old.entropy, reward, zeros, zeros, finished
    )
    experience, _ = build(config, measured, BETA, 0.4)
    probability = np.exp(np.asarray(sequence(PARAMS)))[:, None]
    weighted = dataclasses.replace(experience, advantage=experience.advantage * probability)
    gradient = jax.grad(lambda params: objective(LM, config)(params, weighted, jax.random.key(0))[0].total)(PARAMS)
    for name, leaf in jax.grad(exact)(PARAMS).items():
        np.testing.assert_allclose(gradient[name], leaf, atol=2e-6)


def test_batches_cover_every_sample_once_an_epoch() -> None:
    experience, _ = build(RlConfig(samples_per_prompt=GROUP), MEASURED, BETA, None)
    numbered = dataclasses.replace(experience, returns=np.arange(12.0)[:, None] * np.ones((1, 5)))
    one = list(batches(numbered, RlConfig(), 2, jax.random.key(0), MESH))
    assert [part.returns.shape for part in one] == [(2, 6, 5)]
    np.testing.assert_array_equal(one[0].returns[..., 0].reshape(-1), np.arange(12))
    config = RlConfig(estimator="ppo", policy=PPO, epochs=2, minibatches=3)
    parts = [np.asarray(part.returns[..., 0]) for part in batches(numbered, config, 2, jax.random.key(0), MESH)]
    assert [part.shape for part in parts] == [(2, 2)] * 6
    for epoch in (parts[:3], parts[3:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch).reshape(-1)), np.arange(12))
    assert not np.array_equal(np.concatenate(parts[:3]), np.concatenate(parts[3:]))
    with pytest.raises(ConfigError, match="= 5 must divide the 12 samples"):
        list(batches(numbered, RlConfig(), 5, jax.random.key(0), MESH))


def _nano_experience(lm: object, params: dict) -> Experience:
    draw = np.random.default_rng(2)
    inputs = Conditional(
        prompt=draw.integers(3, 12, (4, 3)),
        prompt_segments=np.ones((4, 3), np.int32),
        prompt_reference=np.zeros((4, 3), bool),
        response=draw.integers(3, 12, (4, 5)),
        response_segments=(np.arange(5)[None, :] < np.array([5, 2, 4, 1])[:, None]).astype(np.int32),
    )
    logp = token_scores(lm, params["trunk"], inputs, 2).logp
    values = token_values(ValueModel(lm), params, inputs, 2)
    config = RlConfig(estimator="ppo", policy=PPO)
    reward, zeros = draw.normal(size=4).astype(np.float32), np.zeros(4, np.float32)
    measured = Measured(inputs, logp, logp, logp - 0.1, values, logp, reward, zeros, zeros, zeros > 1)
    return build(config, measured, BETA, None)[0]


def test_the_ppo_loss_adds_values_and_does_not_depend_on_micro_batches() -> None:
    lm = language_model(preset("nano", vocab_size=12, width=16, heads=2, kv_heads=2, head_dim=8, mlp=24, layers=1))
    params = ValueModel(lm).init(jax.random.key(0))
    experience = _nano_experience(lm, params)
    mask = np.asarray(experience.inputs.response_segments) > 0
    for normalisation, units in (("sequence", 4), ("token", mask.sum())):
        policy = PolicyLoss(kind="ppo_clip", normalisation=normalisation)
        config = RlConfig(estimator="ppo", policy=policy, value_weight=0.5)
        loss = jax.jit(objective(lm, config))
        whole, _ = loss(params, experience, jax.random.key(0))
        # Before the first update ratios are 1 and values are the old ones.
        error = 0.5 * np.square(experience.values_old - experience.returns)[mask].sum()
        np.testing.assert_allclose(whole.total, 0.5 * error - np.asarray(experience.advantage)[mask].sum(), rtol=1e-4)
        assert whole.weight == units
        halves = split(experience, 2)
        parts = [loss(params, jax.tree.map(lambda leaf, i=i: leaf[i], halves), jax.random.key(0))[0] for i in (0, 1)]
        np.testing.assert_allclose(parts[0].merge(parts[1]).value(), whole.value(), rtol=1e-5)


def test_the_running_baseline_goes_through_json_exactly() -> None:
    baseline = Baseline().updated(1.0 / 3.0, 0.9)
    assert baseline == Baseline(mean=1.0 / 3.0)
    baseline = baseline.updated(1.0, 0.9)
    assert baseline.mean == 0.9 * (1.0 / 3.0) + (1.0 - 0.9) * 1.0
    assert Baseline(**json.loads(json.dumps(dataclasses.asdict(baseline)))) == baseline


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"estimator": "grpo"}, "RlConfig.estimator"),
        ({"beta": -0.1}, "RlConfig.beta"),
        ({"samples_per_prompt": 1}, "RlConfig.samples_per_prompt"),
        ({"gamma": 1.5}, "RlConfig.gamma"),
        ({"epochs": 0}, "RlConfig.epochs"),
        ({"value_clip": 0.0}, "RlConfig.value_clip"),
        ({"epochs": 2}, "PolicyLoss.kind"),
        ({"estimator": "ppo"}, "PolicyLoss.kind"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RlConfig(**bad)
