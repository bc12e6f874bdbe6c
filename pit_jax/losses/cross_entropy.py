"""Token cross-entropy: the SFT and language-model loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pit_jax.core import metric
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.types import TokenScores


def per_token(scores: TokenScores, mask: Bool[Array, "*N"], *, z_loss: float) -> Float[Array, "*N"]:
    """Return -logp + z_loss log_z ** 2 of each token, and 0 outside of the mask."""
    logp = jnp.where(mask, scores.logp, 0.0)
    return z_loss * jnp.square(jnp.where(mask, scores.log_z, 0.0)) - logp


def cross_entropy(scores: TokenScores, mask: Bool[Array, "B T"], z_loss: float) -> tuple[Metric, Metrics]:
    """Return the loss per token, and what else the head says of the tokens.

        loss = sum_t mask_t (-logp_t + z_loss log_z_t ** 2) / sum_t mask_t

    Args:
      scores: of the target tokens, each `[B, T]`; padding may hold anything, NaN included.
      mask: `[B, T]`, true at tokens that are trained on.
      z_loss: weight of the term that keeps the softmax normaliser near 1; 0 turns it off.

    Returns:
      The loss, and the metrics `nll` (nats per token), `log_z`, `entropy` (nats) and `token_accuracy`.

    Source: arXiv 2310.00898, section 3.2 (SFT); z-loss: Chowdhery et al. 2022 (arXiv 2204.02311), section 5.
    """
    logp = jnp.where(mask, scores.logp, 0.0)
    log_z = jnp.where(mask, scores.log_z, 0.0)
    loss = metric.mean(per_token(scores, mask, z_loss=z_loss), mask)
    still_logp, still_log_z = jax.lax.stop_gradient((logp, log_z))
    return loss, {
        "nll": metric.mean(-still_logp, mask),
        "log_z": metric.mean(still_log_z, mask),
        "entropy": metric.mean(scores.entropy, mask),
        "token_accuracy": metric.mean(scores.correct, mask),
    }
