"""Whole RL steps on the toy model: rollout, reward, experience, update."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pit_jax.core import metric
from pit_jax.core.rng import key_for
from pit_jax.decode.batches import Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.losses.policy import PolicyLoss
from pit_jax.rl.config import RlConfig
from pit_jax.rl.experience import Baseline, Measured, batches, build, objective, token_scores
from pit_jax.rl.reward import policy_reward
from pit_jax.rl.rollout import rollout, rollout_keys
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM, ToyReward, toy_codec, worth
from pit_jax.train.optim import Optimizer
from pit_jax.train.optim import build as build_optimizer
from pit_jax.train.state import create
from pit_jax.train.step import make_step

LM = ToyLM()
MESH = make_mesh(MeshConfig(), devices=jax.devices()[:1])
CODEC = toy_codec(inputs=4, targets=5)
SAMPLER = Sampler(lm=LM, sampling=Sampling(), width=4, max_new=5, eos_ids=(EOS, OTHER_EOS), pad_id=PAD, batch_size=64)
SCORER = Scorer(model=ToyReward(), width=4, length=5, eos_id=EOS, pad_id=PAD, batch_size=64)
PROMPTS = [(3, 4), (5,), (4, 4, 3), (5, 5)] * 4


def _train(config: RlConfig, steps: int) -> list[dict[str, float]]:
    optimizer = Optimizer(learning_rate=0.1)
    anchor = LM.init(jax.random.key(7))
    state = create(anchor, build_optimizer(optimizer, steps))
    update = make_step(objective(LM, config), optimizer, steps=steps * config.updates)
    rows = [CODEC.policy_prompt(prompt) for prompt in PROMPTS]
    repeated = [prompt for prompt in PROMPTS for _ in range(config.samples_per_prompt)]
    history, baseline = [], Baseline()
    for step in range(steps):
        result = rollout(SAMPLER, state.params, rows, config.samples_per_prompt, rollout_keys(0, step, len(repeated)))
        old = token_scores(LM, state.params, result.inputs, 2)
        zeros = np.zeros(len(repeated), np.float32)
        measured = Measured(
            inputs=result.inputs,
            logp_sampler=result.samples.logp,
            logp_old=old.logp,
            logp_anchor=token_scores(LM, anchor, result.inputs, 2).logp,
            values=np.zeros_like(result.samples.logp),
            entropy=old.entropy,
            reward=policy_reward(SCORER, worth(3), CODEC, repeated, result.responses)(),
            reference_reward=zeros,
            reference_length=zeros,
            finished=result.samples.finished,
        )
        experience, stats = build(config, measured, config.beta, baseline.mean)
        for number, batch in enumerate(batches(experience, config, 2, key_for(0, "minibatches", step), MESH)):
            state, _ = update(state, batch, key_for(0, "update", step * config.updates + number))
        history.append(metric.values(stats))
        baseline = baseline.updated(history[-1]["reward/with_kl"], config.baseline_decay)
    return history


CONFIGS = {
    "rloo": RlConfig(beta=0.02),
    "group": RlConfig(estimator="group", beta=0.02),
    "reinforce": RlConfig(estimator="reinforce", beta=0.02, whiten=True),
    "clipped": RlConfig(beta=0.02, epochs=2, minibatches=2, policy=PolicyLoss(kind="ppo_clip")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reward_rises_and_sampler_and_trainer_agree(name: str) -> None:
    history = _train(CONFIGS[name], 12)
    first, last = (np.mean([step["reward/mean"] for step in part]) for part in (history[:2], history[-2:]))
    assert last > first + 2.0 * history[0]["reward/std"] / np.sqrt(len(PROMPTS))
    assert history[0]["kl/mean"] == 0.0 < history[-1]["kl/mean"]
    assert max(step["sampler_delta/max"] for step in history) < 1e-4


def test_a_larger_beta_stays_closer_to_the_anchor() -> None:
    near, far = (_train(RlConfig(beta=beta), 12)[-1]["kl/k3"] for beta in (2.0, 0.02))
    assert near < 0.5 * far
