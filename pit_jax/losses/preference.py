"""Losses on comparisons: the Bradley-Terry reward model, PIT's gap reward model, and DPO.

Every comparison has the loss -log sigmoid(higher - lower) = softplus(lower - higher). Records of weight 0 are
filler: their scores may be anything, NaN included, and get zero gradient.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pit_jax.core import metric
from pit_jax.core.errors import invalid, nearest
from pit_jax.core.metric import Metric, Metrics

COMPARISONS = ("wl_ww", "wl_ll", "wl_lw", "ww_lw", "ll_lw")
"""The gap model's comparisons; "ab_cd" asks that r_gap(a, b | x) be larger than r_gap(c, d | x)."""


def _accuracy(difference: Float[Array, " B"], weight: Float[Array, " B"]) -> Metric:
    """Return the share of positive differences; a tie counts one half, so that a constant model scores 0.5."""
    return metric.mean(0.5 * (1.0 + jnp.sign(jax.lax.stop_gradient(difference))), weight)


def _spread(name: str, values: Float[Array, " B"], weight: Float[Array, " B"]) -> Metrics:
    """Return mean and mean square: the standard deviation is sqrt(square - mean ** 2), after merging."""
    still = jax.lax.stop_gradient(values)
    return {f"{name}/mean": metric.mean(still, weight), f"{name}/square": metric.mean(jnp.square(still), weight)}


def bradley_terry(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], weight: Float[Array, " B"]
) -> tuple[Metric, Metrics]:
    """Return the loss of a scalar reward model per preference record.

        loss = -sum_b weight_b log sigmoid(R(x_b, y_w) - R(x_b, y_l)) / sum_b weight_b

    Args:
      chosen: `[B]` scores of the preferred responses.
      rejected: `[B]` scores of the others.
      weight: `[B]`, 0 for filler records.

    Returns:
      The loss, and the metrics `accuracy` (ties count half), `margin/mean`, `margin/square`, `reward/mean` and
      `reward/square` (over both responses), from which standard deviations follow.

    Source: arXiv 2310.00898, section 3.3.1; Bradley and Terry 1952.
    """
    chosen, rejected = (jnp.where(weight != 0, scores.astype(jnp.float32), 0.0) for scores in (chosen, rejected))
    margin = chosen - rejected
    both, weights = jnp.concatenate([chosen, rejected]), jnp.concatenate([weight, weight])
    metrics = {"accuracy": _accuracy(margin, weight)} | _spread("margin", margin, weight)
    return metric.mean(jax.nn.softplus(-margin), weight), metrics | _spread("reward", both, weights)


def gap(
    wl: Float[Array, " B"],
    ww: Float[Array, " B"],
    ll: Float[Array, " B"],
    lw: Float[Array, " B"],
    weight: Float[Array, " B"],
    terms: Collection[str] = COMPARISONS,
) -> tuple[Metric, Metrics]:
    """Return PIT's loss of the gap reward model per preference record.

        loss = -sum_b weight_b [ log s(wl - ww) + log s(wl - ll) + log s(wl - lw) + log s(ww - lw) + log s(ll - lw) ]_b
               / sum_b weight_b

    with s the sigmoid and ab = r_gap(y_a, y_b | x), candidate first. `ww` and `ll` are never compared.

    Args:
      wl: `[B]` gaps of the preferred response over the other one.
      ww: `[B]` gaps of the preferred response over itself.
      ll: `[B]` gaps of the dispreferred response over itself.
      lw: `[B]` gaps of the dispreferred response over the preferred one.
      weight: `[B]`, 0 for filler records.
      terms: which of `COMPARISONS` are trained; the accuracies are of all of them in any case.

    Returns:
      The loss, and the metrics `accuracy/<comparison>` for all five (ties count half), and `gap/<name>/mean` and
      `gap/<name>/square` of the four gaps.

    Raises:
      ConfigError: `terms` is empty or has an unknown name.

    Source: arXiv 2310.00898, section 3.3.2, equation of L_PIT^RM.
    """
    _check(terms)
    scores = {"wl": wl, "ww": ww, "ll": ll, "lw": lw}
    scores = {name: jnp.where(weight != 0, value.astype(jnp.float32), 0.0) for name, value in scores.items()}
    differences = {name: scores[name[:2]] - scores[name[3:]] for name in COMPARISONS}
    loss = sum(
        (jax.nn.softplus(-differences[name]) for name in COMPARISONS if name in terms), jnp.zeros_like(scores["wl"])
    )
    metrics = {f"accuracy/{name}": _accuracy(value, weight) for name, value in differences.items()}
    for name, value in scores.items():
        metrics |= _spread(f"gap/{name}", value, weight)
    return metric.mean(loss, weight), metrics


def _check(terms: Collection[str]) -> None:
    unknown = [name for name in terms if name not in COMPARISONS]
    if unknown or not terms or isinstance(terms, str):
        hint = "".join(nearest(name, COMPARISONS) for name in unknown[:1])
        raise invalid("gap.terms", terms, f"be a non-empty selection of {COMPARISONS}", f"Name comparisons.{hint}")


def dpo(
    policy: tuple[Float[Array, " B"], Float[Array, " B"]],
    anchor: tuple[Float[Array, " B"], Float[Array, " B"]],
    weight: Float[Array, " B"],
    beta: float,
) -> tuple[Metric, Metrics]:
    """Return the loss of direct preference optimisation per preference record.

        loss = -sum_b weight_b log sigmoid(margin_b) / sum_b weight_b
        margin = beta [ log pi(y_w | x) / pi_anchor(y_w | x) - log pi(y_l | x) / pi_anchor(y_l | x) ]

    Args:
      policy: log-probabilities of the (chosen, rejected) responses, each `[B]`, summed over tokens.
      anchor: the same by the frozen reference model; gets no gradient.
      weight: `[B]`, 0 for filler records.
      beta: strength of the implied KL penalty.

    Returns:
      The loss, and the metrics of `bradley_terry` for the implied rewards beta log pi / pi_anchor.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    chosen, rejected = (
        beta * (ours - jax.lax.stop_gradient(theirs)) for ours, theirs in zip(policy, anchor, strict=True)
    )
    return bradley_terry(chosen, rejected, weight)
