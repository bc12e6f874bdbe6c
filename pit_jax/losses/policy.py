"""The policy-gradient loss: REINFORCE form (RLOO, group-normalised, running baseline) and PPO's clipped form."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pit_jax.core import metric
from pit_jax.core.errors import invalid
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.types import Experience
from pit_jax.losses import kl

_KINDS = ("reinforce", "ppo_clip")
_NORMALISATIONS = ("sequence", "token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """What is maximised.

    Attributes:
      kind: "reinforce" for samples of the current parameters, "ppo_clip" for several updates on one batch.
      clip_range: how far PPO's probability ratio counts, to both sides of 1.
      normalisation: "sequence" sums over a sequence's tokens and averages over sequences, which is the gradient of
        the expected reward (PIT, RLOO); "token" averages over all tokens, so that long sequences weigh more per
        batch and each token the same.
      truncation: the most that a response of older parameters may weigh ("reinforce" off policy).
    """

    kind: str = "reinforce"
    clip_range: float = 0.2
    normalisation: str = "sequence"
    truncation: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise invalid("PolicyLoss.kind", self.kind, f"be one of {_KINDS}", "Choose one of them.")
        if self.normalisation not in _NORMALISATIONS:
            rule = f"be one of {_NORMALISATIONS}"
            raise invalid("PolicyLoss.normalisation", self.normalisation, rule, "Choose one of them.")
        if not 0.0 < self.clip_range < 1.0:
            raise invalid("PolicyLoss.clip_range", self.clip_range, "lie between 0 and 1", "0.2 is usual.")
        if not self.truncation >= 1.0:
            raise invalid("PolicyLoss.truncation", self.truncation, "be at least 1", "2 is usual; inf does not cut.")


class Constants(NamedTuple):
    """What the loss of a sampled token reads beside its log-probability; 0 at padding."""

    mask: Bool[Array, "*N"]
    logp_old: Float[Array, "*N"]
    advantage: Float[Array, "*N"]


def constants(experience: Experience) -> Constants:
    """Return the constants of all tokens of a micro-batch, `[B, T]` each."""
    mask = experience.inputs.response_segments != 0
    return Constants(mask, _constant(experience.logp_old, mask), _constant(experience.advantage, mask))


def per_token(logp: Float[Array, "*N"], tokens: Constants, config: PolicyLoss) -> Float[Array, "*N"]:
    """Return the loss of each token as `policy_gradient` sums them up, 0 at padding."""
    logp = jnp.where(tokens.mask, logp, 0.0)
    if config.kind == "ppo_clip":
        return -jnp.minimum(*_ratios(logp, tokens, config))
    return -tokens.advantage * logp


def _ratios(logp: Array, tokens: Constants, config: PolicyLoss) -> tuple[Array, Array]:
    """Return ratio_t A_t, and the same of the clipped ratio."""
    ratio = jnp.exp(logp - tokens.logp_old)
    limited = jnp.clip(ratio, 1.0 - config.clip_range, 1.0 + config.clip_range)
    return ratio * tokens.advantage, limited * tokens.advantage


def policy_gradient(
    logp: Float[Array, "B T"],
    experience: Experience,
    config: PolicyLoss,
    entropy: Float[Array, "B T"] | None = None,
    *,
    off_policy: bool = False,
) -> tuple[Metric, Metrics]:
    """Return the policy-gradient loss of sampled responses.

        reinforce:  loss_t = -w A_t logp_t,   w = 1, or off policy w = min(exp(sum_t logp_t - logp_old_t), truncation)
        ppo_clip:   loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - c, 1 + c) A_t),   ratio_t = exp(logp_t - logp_old_t)

    "sequence": sum_bt loss / number of sequences that have tokens; "token": sum_bt loss / number of tokens.
    Advantages and all recorded log-probabilities are constants. Padding may hold anything, NaN included.

    Args:
      logp: `[B, T]` log-probabilities of the sampled tokens under the parameters being trained.
      experience: with `[B, T]` arrays (one micro-batch).
      config: which loss.
      entropy: `[B, T]` entropy of the token distributions in nats, only reported.
      off_policy: whether other parameters than those before the update have sampled. Without truncation the weight of a
        response makes the expected gradient that of its present policy; "ppo_clip" has a ratio of its own.

    Returns:
      The loss, and metrics per token: `kl_old` (k3 of old against new policy), `ratio/mean`, `ratio/square`,
      `clip_fraction` (PPO only: share of tokens whose gradient the clip cut off), `entropy` if given, and of
      |logp_sampler - logp_old|, by which sampler and trainer disagree, `sampler_delta/mean` and
      `sampler_delta/max`. Sums cannot carry a maximum over micro-batches: `max` is the largest of a micro-batch,
      averaged over micro-batches. Off policy with "reinforce": `weight/mean`, the mean w of a response, and
      `weight/truncated`, the share of those that were cut.

    Source: arXiv 2310.00898, section 3.4; Ahmadian et al. 2024 (arXiv 2402.14740); PPO: Schulman et al. 2017
    (arXiv 1707.06347), equation 7; truncated importance weights: Ionides 2008, J. Comput. Graph. Stat. 17(2).
    """
    mask = experience.inputs.response_segments != 0
    tokens = constants(experience)
    logp = jnp.where(mask, logp, 0.0)
    metrics = _diagnostics(jax.lax.stop_gradient(logp), tokens.logp_old, experience, mask)
    loss = per_token(logp, tokens, config)
    if config.kind == "ppo_clip":
        free, limited = _ratios(logp, tokens, config)
        metrics["clip_fraction"] = metric.mean((limited < free).astype(jnp.float32), mask)
    elif off_policy:
        weight, more = _importance(jax.lax.stop_gradient(logp), tokens.logp_old, mask, config.truncation)
        loss, metrics = weight[:, None] * loss, metrics | more
    if entropy is not None:
        metrics["entropy"] = metric.mean(jax.lax.stop_gradient(entropy), mask)
    units = mask if config.normalisation == "token" else jnp.any(mask, axis=1)
    return Metric(jnp.sum(loss), jnp.sum(units.astype(jnp.float32))), metrics


def _importance(
    logp: Float[Array, "B T"], old: Float[Array, "B T"], mask: Bool[Array, "B T"], truncation: float
) -> tuple[Float[Array, " B"], Metrics]:
    """Return the truncated weight of every response, and how many were cut."""
    ratio = jnp.exp(jnp.sum(logp - old, axis=1))
    weight, real = jnp.minimum(ratio, truncation), jnp.any(mask, axis=1)
    cut = (ratio > truncation).astype(jnp.float32)
    return weight, {"weight/mean": metric.mean(weight, real), "weight/truncated": metric.mean(cut, real)}


def _constant(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return jax.lax.stop_gradient(jnp.where(mask, values, 0.0))


def _diagnostics(
    logp: Float[Array, "B T"], old: Float[Array, "B T"], experience: Experience, mask: Bool[Array, "B T"]
) -> Metrics:
    ratio = jnp.exp(logp - old)
    return sampler_delta(experience.logp_sampler, old, mask) | {
        "kl_old": metric.mean(kl.k3(old, logp), mask),
        "ratio/mean": metric.mean(ratio, mask),
        "ratio/square": metric.mean(jnp.square(ratio), mask),
    }


def sampler_delta(sampler: Float[Array, "B T"], trainer: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Metrics:
    """Return mean and maximum over tokens of |logp of the sampler - logp of the trainer|, of the same parameters."""
    delta = jnp.abs(_constant(sampler, mask) - _constant(trainer, mask))
    return {
        "sampler_delta/mean": metric.mean(delta, mask),
        "sampler_delta/max": metric.scalar(jnp.max(delta)),
    }
