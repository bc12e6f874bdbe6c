"""Frozen kernels as int8 with one float32 scale per output channel: W = q s, a quarter of float32's bytes.

For networks of which adapters alone are trained (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, with int8). Beside a
leaf `kernel` lies then `kernel_scale`, of the same number of axes, those of the inputs having length 1. Such a pair
is what `qwix.QArray` calls `qvalue` and `scale`.

The float weights stay what they are wherever they were read from: merging adapters and exporting them take those.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int8

from pit_jax.core.types import Params
from pit_jax.models import products
from pit_jax.models.trained import Network

KERNEL, SCALE = "kernel", "kernel_scale"
LARGEST = 127
"""Of |q|: -128 is not used, so that W and -W are stored alike."""


class Quantised(NamedTuple):
    """A kernel as integers, and the size of 1 for each output channel."""

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*channels"]


def quantise_kernel(kernel: Float[Array, "*shape"], axes: tuple[int, ...]) -> Quantised:
    """Return the nearest integers q = round(W / s) with s = max |W| / 127.

    An error of a weight is at most s / 2. A channel that is 0 everywhere gets s = 1; one that is not finite stays so.

    Args:
      kernel: W.
      axes: of the inputs, over which a channel's maximum is taken; the scale keeps them with length 1.
    """
    weights = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weights), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Quantised(jnp.round(weights / scale).astype(jnp.int8), scale)


# Without the checkpoint the backward pass would keep what the product is taken with: a float copy of every kernel.
@functools.partial(jax.checkpoint, static_argnums=2)
def product(x: Float[Array, "B L *ins"], kernel: Quantised, inputs: int) -> Float[Array, "B L *outs"]:
    """Return x W = (x q) s in the dtype of `x`; q is exact in bfloat16, and s is multiplied in float32.

    Args:
      x: what is projected.
      kernel: W, its first `inputs` axes those of the inputs.
      inputs: how many last axes of `x` are contracted.
    """
    y = products.product(x, kernel.values.astype(x.dtype), inputs)
    return (y * kernel.scale.reshape(1, 1, *y.shape[2:])).astype(x.dtype)


def quantise(params: Params, network: Network, *, donate: bool) -> Params:
    """Return float parameters, or a part of them, as a network with a quantised base has them.

    One leaf after the other: beside the parameters there is never more than the integers. Leaves of any other kind,
    and those that are quantised already, are shared, not copied.

    Args:
      params: as `network` has them but with float kernels, on any devices; adapters may be missing.
      network: whose config has `quantised`.
      donate: delete each float kernel as soon as it is done with, which makes `params` useless.
    """
    return _quantise(params, network.abstract(), donate)


def _quantise(params: Params, wanted: Params, donate: bool) -> Params:
    done: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            done[name] = _quantise(value, wanted[name], donate)
        elif name == KERNEL and SCALE in wanted and SCALE not in params:
            done[KERNEL], done[SCALE] = _quantise_leaf(value, wanted[SCALE].shape)
            if donate:
                jax.block_until_ready(done[KERNEL])
                value.delete()
        else:
            done[name] = value
    return done


def _quantise_leaf(kernel: jax.Array, channels: tuple[int, ...]) -> Quantised:
    """Return a kernel of which the scale is to have the shape `channels`, cut over the devices as it is now."""
    axes = tuple(axis for axis, size in enumerate(channels) if size == 1)
    places = Quantised(kernel.sharding, _without(kernel.sharding, axes))
    return jax.jit(quantise_kernel, static_argnums=1, out_shardings=places)(kernel, axes)


def _without(sharding: Sharding, axes: tuple[int, ...]) -> Sharding:
    """Return a sharding that does not cut these axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    kept = [None if axis in axes else name for axis, name in enumerate(sharding.spec)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def dequantise(params: Params) -> Params:
    """Return quantised parameters as float32 W = q s: what the network really computes with."""
    done: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            done[name] = dequantise(value)
        elif name == KERNEL and SCALE in params:
            done[name] = value.astype(jnp.float32) * params[SCALE]
        elif name != SCALE:
            done[name] = value
    return done
