"""From sampled and scored responses to what the policy gradient trains on, and the statistics of an RL step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from pit_jax.core import metric
from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.types import Conditional, Experience, Params, TokenScores
from pit_jax.losses import advantage, kl, policy
from pit_jax.losses.value import clipped_value_loss
from pit_jax.models.api import ConditionalLM
from pit_jax.models.heads import ValueModel
from pit_jax.models.output import summed_loss
from pit_jax.rl.config import RlConfig
from pit_jax.sharding.place import batch_shardings, check_rows, in_turn
from pit_jax.train.step import Objective

_EPS = 1e-6


class Measured(NamedTuple):
    """All that is known of the N = X * G responses of a step before advantages are computed.

    inputs: prompts are there N times, or X times where models are to compute them once.

    logp_sampler, logp_old, logp_anchor, values: as in `Experience` (`values` are 0 without a value head). `logp_old` is
      of the parameters that sampled, one update older than the others with `RlConfig.one_step_off`; without
      `RlConfig.rescore` it is `logp_sampler`.
    entropy: of the token distributions under the old policy, nats; None without `rescore`.
    reward: what the reward model says, without KL or penalty; reference_reward: the same of the reference
      answer, R_P(x, y_w) or r_gap(y_ref, y_ref | x), so that the difference is the improvement.
    reference_length: tokens of that reference with its EOS.
    finished: whether the response ended with an EOS.
    """

    inputs: Conditional
    logp_sampler: Float[Array, "N T"]
    logp_old: Float[Array, "N T"]
    logp_anchor: Float[Array, "N T"]
    values: Float[Array, "N T"]
    entropy: Float[Array, "N T"] | None
    reward: Float[Array, " N"]
    reference_reward: Float[Array, " N"]
    reference_length: Float[Array, " N"]
    finished: Bool[Array, " N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """Running mean of the KL-penalised reward for "reinforce"; a plain number, so that resuming is exact."""

    mean: float | None = None

    def updated(self, reward: float, decay: float) -> Baseline:
        """Return the baseline after a step with this mean reward: mean <- decay mean + (1 - decay) reward."""
        return Baseline(mean=reward if self.mean is None else decay * self.mean + (1.0 - decay) * reward)


@functools.partial(jax.jit, static_argnames=("lm", "microbatches"))
def token_scores(lm: ConditionalLM, params: Params, inputs: Conditional, microbatches: int) -> TokenScores:
    """Return the trainer's scores `[N, T]` of sampled tokens, without dropout, `N / microbatches` rows at a time.

    Prompts that samples share are computed once.
    """
    parts = split(inputs, microbatches)
    return _join(jax.lax.map(lambda part: lm.logprobs(params, part), parts))


@functools.partial(jax.jit, static_argnames=("model", "microbatches"))
def token_values(model: ValueModel, params: Params, inputs: Conditional, microbatches: int) -> Float[Array, "N T"]:
    """Return the value head's estimates `[N, T]` before each sampled token; `params` has trunk and head."""
    parts = split(inputs, microbatches)
    return _join(jax.lax.map(lambda part: model.values(params, part), parts))


def split(tree: Any, parts: int) -> Any:
    """Return every leaf `[N, ...]` as `[parts, N / parts, ...]`: the micro-batches of `train.step`.

    Where samples share prompts, `[X, ...]` leaves are cut as evenly, and whole prompts stay together.

    Raises:
      ConfigError: `parts` does not divide N.
    """
    rows = jax.tree.leaves(tree)[0].shape[0]  # of prompts, where samples share them
    _check_parts(rows, parts)
    return jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), tree)


def _check_parts(rows: int, parts: int) -> None:
    if rows % parts:
        fix = "Change the prompts per step, the samples per prompt, the minibatches or the micro-batches."
        raise invalid("micro-batches x minibatches", parts, f"divide the {rows} samples of a step", fix)


def _join(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


@functools.partial(jax.jit, static_argnames="config")
def build(
    config: RlConfig, measured: Measured, beta: Float[Array, ""] | float, baseline: Float[Array, ""] | float | None
) -> tuple[Experience, Metrics]:
    """Return the experience of a step, `[N, T]` per token, and the statistics of `statistics`.

    The KL (k1 on the sampled tokens) is part of the reward: r' = reward - penalty [no EOS] - beta sum_t k1_t.
    "rloo", "group" and "reinforce" turn r' into one advantage for all tokens of a response; "ppo" spreads
    -beta k1_t over the tokens, puts the rest on the last one, and uses GAE.

    Args:
      config: which estimator; its `beta` is only where beta starts.
      measured: N = X * G responses, the G of a prompt in successive rows.
      beta: the KL coefficient of this step (the monitor may have adapted it).
      baseline: of "reinforce", from earlier steps; None at the first, which uses its own mean.
    """
    mask = measured.inputs.response_segments > 0
    reward = measured.reward - config.no_eos_penalty * (~measured.finished).astype(jnp.float32)
    penalised = advantage.penalise(reward, measured.logp_old, measured.logp_anchor, mask, beta)
    if config.estimator == "ppo":
        per_token, returns = advantage.gae(penalised.token, measured.values, mask, config.gamma, config.lam)
        if config.whiten:
            per_token = advantage.whiten(per_token, mask, _EPS)
    else:
        grouped = _grouped(config, penalised.sequence.reshape(-1, config.samples_per_prompt), baseline)
        per_token = jnp.where(mask, grouped.reshape(-1)[:, None], 0.0)
        returns = jnp.zeros_like(per_token)
    experience = Experience(
        inputs=measured.inputs,
        logp_sampler=measured.logp_sampler,
        logp_old=measured.logp_old,
        logp_anchor=measured.logp_anchor,
        advantage=per_token,
        returns=returns,
        values_old=measured.values,
    )
    return experience, statistics(measured, reward, penalised.sequence, per_token)


def _grouped(
    config: RlConfig, rewards: Float[Array, "X G"], baseline: Float[Array, ""] | float | None
) -> Float[Array, "X G"]:
    if config.estimator == "rloo":
        result = advantage.rloo(rewards)
    elif config.estimator == "group":
        result = advantage.group_normalised(rewards, _EPS)
    else:
        result = advantage.reinforce(rewards, jnp.mean(rewards) if baseline is None else baseline)
    return advantage.whiten(result, jnp.ones_like(result, bool), _EPS) if config.whiten else result


def statistics(
    measured: Measured,
    reward: Float[Array, " N"],
    penalised: Float[Array, " N"],
    per_token: Float[Array, "N T"],
) -> Metrics:
    """Return everything that is logged of an RL step's samples.

    reward/mean, reward/std: with the penalty for a missing EOS, without KL; reward/with_kl: with both.
    gap/mean: reward of the response minus that of its reference, without penalty. kl/mean: sum of k1 over a
    response, nats; kl/k3: the same with the k3 estimate, never negative. entropy: nats per token.
    length/mean, length/reference: tokens, EOS included. eos_rate: share of finished responses.
    advantage/mean, advantage/std: over tokens. reward_length_correlation: Pearson's, over responses.
    sampler_delta/mean, sampler_delta/max: |logp of the sampler - logp of the trainer| over tokens. Without
    `RlConfig.rescore` the update says these two and the entropy.
    """
    mask = measured.inputs.response_segments > 0
    length = jnp.sum(mask, axis=1).astype(jnp.float32)
    k1 = jnp.where(mask, kl.k1(measured.logp_old, measured.logp_anchor), 0.0)
    k3 = jnp.where(mask, kl.k3(measured.logp_old, measured.logp_anchor), 0.0)
    rescored: Metrics = {}
    if measured.entropy is not None:
        rescored = {"entropy": metric.mean(measured.entropy, mask)}
        rescored |= policy.sampler_delta(measured.logp_sampler, measured.logp_old, mask)
    return rescored | {
        "reward/mean": metric.mean(reward),
        "reward/std": metric.scalar(jnp.std(reward)),
        "reward/with_kl": metric.mean(penalised),
        "gap/mean": metric.mean(measured.reward - measured.reference_reward),
        "kl/mean": metric.mean(jnp.sum(k1, axis=1)),
        "kl/k3": metric.mean(jnp.sum(k3, axis=1)),
        "length/mean": metric.mean(length),
        "length/reference": metric.mean(measured.reference_length),
        "eos_rate": metric.mean(measured.finished.astype(jnp.float32)),
        "advantage/mean": metric.mean(per_token, mask),
        "advantage/std": metric.scalar(_std(per_token, mask)),
        "reward_length_correlation": metric.scalar(_correlation(reward, length)),
    }


def _std(values: Float[Array, "N T"], mask: Bool[Array, "N T"]) -> Float[Array, ""]:
    mean = metric.mean(values, mask).value()
    return jnp.sqrt(metric.mean(jnp.square(values - mean), mask).value())


def _correlation(x: Float[Array, " N"], y: Float[Array, " N"]) -> Float[Array, ""]:
    """Return Pearson's correlation, 0 where one of the two does not vary."""
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    scale = jnp.sqrt(jnp.sum(jnp.square(x)) * jnp.sum(jnp.square(y)))
    return jnp.where(scale > 0, jnp.sum(x * y) / jnp.where(scale > 0, scale, 1.0), 0.0)


def batches(
    experience: Experience, config: RlConfig, microbatches: int, key: Key[Array, ""], mesh: Mesh
) -> Iterator[Experience]:
    """Yield the batch of every update of a step, on the mesh's devices: leaves `[A, B, ...]` with A = `microbatches`.

    Each epoch is a new permutation of the samples, cut into minibatches; a single update takes all in order. Where
    samples share prompts it is one of the prompts: a prompt is computed once only for samples of the same minibatch.
    Nothing is waited for.

    Raises:
      ConfigError: the samples cannot be cut evenly, or an update's rows not be shared out over the mesh.
    """
    cut, rows = _cutter(mesh), experience.inputs.prompt.shape[0]
    parts = config.minibatches * microbatches
    _check_parts(rows, parts)
    check_rows(rows // parts, mesh)
    for epoch in range(config.epochs):
        order = None if config.updates == 1 else jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        for number in range(config.minibatches):
            yield in_turn(cut(experience, order, number, config.minibatches, microbatches))


@functools.lru_cache(maxsize=64)
def _cutter(mesh: Mesh) -> Callable[[Experience, Array | None, int, int, int], Experience]:
    """Return the program that cuts one update's micro-batches out of a step's samples, taken in an order."""

    def cut(tree: Experience, order: Array | None, number: Array, minibatches: int, microbatches: int) -> Experience:
        ordered = tree if order is None else jax.tree.map(functools.partial(_reordered, order=order), tree)
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number * microbatches, microbatches),
            split(ordered, minibatches * microbatches),
        )

    # The places are those that `put_batch` names: a step that was compiled ahead is found by them.
    return jax.jit(cut, static_argnums=(3, 4), out_shardings=batch_shardings(0, mesh, row_axis=1))


def _reordered(leaf: Array, order: Array) -> Array:
    """Return the leaf with the rows of each prompt kept together and prompts in another order."""
    return leaf.reshape(len(order), -1, *leaf.shape[1:])[order].reshape(leaf.shape)


def objective(lm: ConditionalLM, config: RlConfig) -> Objective:
    """Return the RL loss for `train.step.make_step`, on micro-batches of `Experience`.

    Dropout is off (the key is not used): the probability ratio compares the same network with itself.
    With "ppo" the parameters are {"trunk": of `lm`, "head": of the value head} and

        loss = policy loss + value_weight * value loss,

    both divided by what `PolicyLoss.normalisation` counts.
    """
    if config.estimator != "ppo":
        return functools.partial(_policy_objective, lm, config)
    return functools.partial(_ppo_objective, lm, config)


def _policy_objective(
    lm: ConditionalLM, config: RlConfig, params: Params, batch: Experience, key: Key[Array, ""]
) -> tuple[Metric, Metrics]:
    if config.one_step_off and config.policy.kind == "reinforce":
        # The weight of a response depends on all of its tokens, so no function of one token gives its loss.
        scores = lm.logprobs(params, batch.inputs)
        return policy.policy_gradient(scores.logp, batch, config.policy, scores.entropy, off_policy=True)

    def per_token(scores: TokenScores, tokens: policy.Constants) -> Array:
        return policy.per_token(scores.logp, tokens, config.policy)

    total, scores = summed_loss(lm, params, batch.inputs, per_token, policy.constants(batch))
    loss, metrics = policy.policy_gradient(scores.logp, batch, config.policy, scores.entropy)
    if not config.rescore:
        mask = batch.inputs.response_segments > 0
        metrics |= policy.sampler_delta(batch.logp_sampler, jax.lax.stop_gradient(scores.logp), mask)
    return loss._replace(total=total), metrics


def _ppo_objective(
    lm: ConditionalLM, config: RlConfig, params: Params, batch: Experience, key: Key[Array, ""]
) -> tuple[Metric, Metrics]:
    loss, metrics = _policy_objective(lm, config, params["trunk"], batch, key)
    values = ValueModel(lm).values(params, batch.inputs)
    mask = batch.inputs.response_segments > 0
    value_loss, value_metrics = clipped_value_loss(values, batch.values_old, batch.returns, mask, config.value_clip)
    return Metric(loss.total + config.value_weight * value_loss.total, loss.weight), metrics | value_metrics
