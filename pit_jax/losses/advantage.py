"""From rewards to advantages: leave-one-out, group-normalised, running baseline, and GAE.

X is the number of contexts (prompts), G of samples per context, B = X G of sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pit_jax.core.errors import invalid


def _needs_group(rewards: Float[Array, "X G"], estimator: str) -> None:
    if rewards.shape[1] < 2:
        rule = f"be at least 2, because {estimator} compares the samples of one prompt"
        raise invalid("samples per prompt", rewards.shape[1], rule, "Draw more samples or use `reinforce`.")


def rloo(rewards: Float[Array, "X G"]) -> Float[Array, "X G"]:
    """Return each reward minus the mean of the other samples' rewards for the same prompt.

        A_i = r_i - sum_{j != i} r_j / (G - 1)

    The baseline is independent of sample i, so the policy gradient stays unbiased. Raises ConfigError if G < 2.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.2; Kool et al. 2019.
    """
    _needs_group(rewards, "rloo")
    samples = rewards.shape[1]
    return (rewards - jnp.mean(rewards, axis=1, keepdims=True)) * (samples / (samples - 1))


def group_normalised(rewards: Float[Array, "X G"], eps: float) -> Float[Array, "X G"]:
    """Return rewards standardised within their prompt, with the population's standard deviation.

        A_i = (r_i - mean_j r_j) / (std_j r_j + eps)

    Raises ConfigError if G < 2. Source: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.
    """
    _needs_group(rewards, "group_normalised")
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return centred / (jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True)) + eps)


def reinforce(rewards: Float[Array, "X G"], baseline: Float[Array, ""] | float) -> Float[Array, "X G"]:
    """Return rewards minus one baseline, which must not depend on them (a running mean of earlier steps).

    Source: Williams 1992.
    """
    return rewards - baseline


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return (advantages, returns) by generalised advantage estimation; both are 0 at padding.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    V and A are 0 after a sequence's last token: a sequence that was cut off counts as ended.

    Args:
      rewards: `[B, T]` per token.
      values: `[B, T]`, V_t as estimated before token t is drawn.
      mask: `[B, T]`, true at tokens; padding on the right may hold anything, NaN included.
      gamma: discount per token, in [0, 1].
      lam: 0 takes the one-step estimate, 1 the whole sequence.

    Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16.
    """
    rewards, values = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (rewards, values))
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def back(later: Float[Array, " B"], delta: Float[Array, " B"]) -> tuple[Array, Array]:
        now = delta + gamma * lam * later
        return now, now

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def whiten(values: Float[Array, "B T"], mask: Bool[Array, "B T"], eps: float) -> Float[Array, "B T"]:
    """Return values shifted and scaled to mean 0 and standard deviation 1 over all tokens; 0 at padding.

    (x - mean) / (std + eps), with the population's standard deviation
    """
    weights = mask.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    centred = (values - jnp.sum(values) / count) * weights
    return centred / (jnp.sqrt(jnp.sum(jnp.square(centred)) / count) + eps)


class Penalised(NamedTuple):
    """Rewards with the KL penalty in them, per token and summed over each sequence."""

    token: Float[Array, "B T"]
    sequence: Float[Array, " B"]


def penalise(
    reward: Float[Array, " B"],
    logp: Float[Array, "B T"],
    logp_anchor: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    beta: Float[Array, ""] | float,
) -> Penalised:
    """Return rewards from which the KL to the anchor, estimated on the sampled tokens, is taken off.

        token_t = -beta (logp_t - logp_anchor_t) + [t is the last token] reward
        sequence = sum_t token_t = reward - beta sum_t k1_t

    The score-function gradient of E[sequence] is then the exact gradient of E[reward] - beta KL(policy || anchor).
    These are constants: no gradient flows into the log-probabilities.

    Args:
      reward: `[B]`, of the whole sequence.
      logp: `[B, T]` log-probabilities of the sampled tokens under the policy that drew them.
      logp_anchor: `[B, T]`, the same under the frozen anchor.
      mask: `[B, T]`, true at tokens, padding on the right; a row without tokens gets 0.
      beta: weight of the penalty, in units of reward per nat.

    Source: arXiv 2310.00898, section 3.4; per-token form: Stiennon et al. 2020 (arXiv 2009.01325).
    """
    penalty = jax.lax.stop_gradient(jnp.where(mask, beta * (logp - logp_anchor), 0.0))
    last = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
    token = jnp.where(last, jax.lax.stop_gradient(reward)[:, None], 0.0) - penalty
    return Penalised(token, jnp.sum(token, axis=1))
