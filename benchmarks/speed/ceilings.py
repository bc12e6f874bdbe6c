"""What this machine reaches in the two things that everything is made of: products of matrices, and copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.speed.shapes import Shape
from pit_jax.plan.topology import GPUS

_SIZES = {"cpu": (1536, 2**27), "gpu": (8192, 2**31), "tpu": (8192, 2**30)}
"""Rows of square matrices and bytes of an array that suit a platform."""


class Ceilings(NamedTuple):
    """matmul: operations a second of large square products; copy: bytes read and written a second.

    peak: operations a second that the maker of the chip states, None where it is not known.
    """

    matmul: float
    copy: float
    peak: float | None


def measure(shape: Shape, repeats: int = 7) -> Ceilings:
    """Measure products in the shape's dtype of computation, and copies, on the first device."""
    platform = jax.default_backend()
    size, bytes_ = _SIZES[platform]
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(shape.compute))
    product = jax.jit(lambda left, right: left @ right)
    array = jnp.zeros(bytes_ // 4, jnp.float32)
    copied = jax.jit(lambda array: array + 1)
    return Ceilings(
        matmul=2 * size**3 / _best(lambda: product(left, right), repeats),
        copy=2 * bytes_ / _best(lambda: copied(array), repeats),
        peak=_stated(jax.devices()[0].device_kind),
    )


def _best(function: Callable[[], jax.Array], repeats: int) -> float:
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds) if repeats < 5 else statistics.quantiles(seconds, n=10)[0]


def _stated(kind: str) -> float | None:
    return next((chip.flops for name, chip in GPUS.items() if name in kind.lower()), None)
