"""Metrics as (total, weight) pairs that are divided once, at the very end.

Sums are additive over micro-batches, devices and packed rows while means are not, so a loss written as a
pair has the same value and gradient however its batch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Metric(NamedTuple):
    """A sum and the weight it is to be divided by."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def merge(self, other: Metric) -> Metric:
        """Return the metric of both parts together (`+` of a tuple would concatenate)."""
        return Metric(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Array, ""]:
        """Return total / weight, and 0 where there is no weight."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


Metrics = dict[str, Metric]


def mean(values: Float[Array, "..."], weights: Float[Array, "..."] | None = None) -> Metric:
    """Return the metric of `values`, each counted `weights` times (once by default).

    Entries of weight zero do not count even when they are not finite.
    """
    values = values.astype(jnp.float32)
    if weights is None:
        return Metric(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
    weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    return Metric(jnp.sum(jnp.where(weights != 0, values, 0.0) * weights), jnp.sum(weights))


def scalar(value: Float[Array, ""] | float) -> Metric:
    """Return a single number as a metric of weight one."""
    return Metric(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))


def merge(left: Metrics, right: Metrics) -> Metrics:
    """Add two sets of metrics that have the same names."""
    return {name: left[name].merge(right[name]) for name in left}


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Fetch metrics from the device and divide, as `Metric.value` does; nothing is compiled for it."""
    fetched: dict[str, Metric] = jax.device_get(dict(metrics))
    return {name: float(total / weight) if weight > 0 else 0.0 for name, (total, weight) in fetched.items()}
