"""Estimates of KL(policy || anchor) from the log-probabilities of sampled tokens.

With y drawn from the policy and d = log policy(y) - log anchor(y), all three are per token and in nats. Which one
to differentiate matters: the expectation's gradient of `k1` is 0, of `k2` it is the KL's; the KL therefore enters
policy gradients through the reward (`advantage.penalise`), and `k3` is for reading.

Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def k1(logp: Float[Array, "..."], logp_anchor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return d: unbiased, of high variance, negative for half of the samples where the two are close."""
    return logp - logp_anchor


def k2(logp: Float[Array, "..."], logp_anchor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return d ** 2 / 2: never negative, biased a little, and of low variance."""
    return 0.5 * jnp.square(logp - logp_anchor)


def k3(logp: Float[Array, "..."], logp_anchor: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return exp(-d) - 1 + d: unbiased and never negative."""
    difference = logp_anchor - logp
    return jnp.expm1(difference) - difference
