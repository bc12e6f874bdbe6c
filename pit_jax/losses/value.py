"""PPO's loss of the value head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pit_jax.core import metric
from pit_jax.core.metric import Metric, Metrics


def clipped_value_loss(
    values: Float[Array, "B T"],
    values_old: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_range: float,
) -> tuple[Metric, Metrics]:
    """Return the squared error of value estimates per token, pessimistic about large moves.

        loss_t = max((V_t - R_t) ** 2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t) ** 2) / 2

    Args:
      values: `[B, T]` under the parameters being trained.
      values_old: `[B, T]` when the responses were sampled; constant.
      returns: `[B, T]` targets (`advantage.gae`); constant.
      mask: `[B, T]`, true at tokens; padding may hold anything, NaN included.
      clip_range: c, in units of reward.

    Returns:
      The loss, and the metrics `value/mean`, `value/error` (mean squared error without clip), `value/clip_fraction`
      (share of tokens whose gradient the clip cut off), `return/mean` and `return/square`; the explained variance is
      1 - error / (square - mean ** 2).

    Source: the PPO implementation of arXiv 1707.06347 (OpenAI baselines, ppo2); used for RLHF in arXiv 2009.01325.
    """
    values = jnp.where(mask, values, 0.0)
    old, returns = jax.lax.stop_gradient((jnp.where(mask, values_old, 0.0), jnp.where(mask, returns, 0.0)))
    limited = jnp.clip(values, old - clip_range, old + clip_range)
    error, limited_error = jnp.square(values - returns), jnp.square(limited - returns)
    loss = metric.mean(0.5 * jnp.maximum(error, limited_error), mask)
    still, still_error, cut_off = jax.lax.stop_gradient((values, error, limited_error > error))
    return loss, {
        "value/mean": metric.mean(still, mask),
        "value/error": metric.mean(still_error, mask),
        "value/clip_fraction": metric.mean(cut_off.astype(jnp.float32), mask),
        "return/mean": metric.mean(returns, mask),
        "return/square": metric.mean(jnp.square(returns), mask),
    }
