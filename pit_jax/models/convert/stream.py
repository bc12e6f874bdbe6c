"""Parameters from and to foreign tensors, a few megabytes at a time: the host never holds a second copy of a model.

Every device's part of a leaf is allocated once and filled in place, from pieces of the foreign tensors that hold what
that device needs of them; numbers are converted on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from pit_jax.core.errors import CheckpointError
from pit_jax.core.tree import named_leaves
from pit_jax.core.types import Params
from pit_jax.models.convert.layout import Tensor

PIECE = 4 * 2**20
"""Bytes of a foreign tensor that are on the host at once; a device holds as much beside the parameters, and a copy."""


class Rows(Protocol):
    """What can be read by rows of its first axis: an array, or a tensor in a file."""

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Return some rows."""
        ...


Region = tuple[tuple[int, int], ...]
"""From where to where along each axis."""


def load(tensors: Sequence[Tensor], read: Callable[[Tensor], Rows], abstract: Params) -> Params:
    """Return parameters filled from foreign tensors, where and of the dtype that `abstract` says.

    Args:
      tensors: which fill every leaf, each layer of it once.
      read: gives a tensor, or something that reads its rows when asked for them. Only rows that this process's devices
        have a part of are asked for.
      abstract: shapes and dtypes, with shardings (without: the default device).
    Raises:
      CheckpointError: a leaf has no tensor or too many, or another shape; nothing is allocated then.
    """
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_path.setdefault(tensor.path, []).append(tensor)
    leaves = dict(named_leaves(abstract))
    _check(by_path, leaves)
    filled = [_fill(leaf, by_path[path], read) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def unload(params: Params, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield each tensor with its values on the host, of the leaf's dtype, one at a time.

    Args:
      params: on any devices; every process has to take part.
      tensors: what is wanted, in this order.
    """
    leaves = dict(named_leaves(params))
    for tensor in tensors:
        yield tensor, tensor.theirs(_fetch(leaves[tensor.path], tensor))


def _check(by_path: dict[str, list[Tensor]], leaves: dict[str, Any]) -> None:
    """Check that the tensors fill the leaves, each once."""
    without = sorted(leaves.keys() - by_path.keys())
    if without:
        raise CheckpointError(f"No tensor of the checkpoint's format holds {', '.join(without)}. Use another format.")
    for path, tensors in by_path.items():
        if path not in leaves:
            raise CheckpointError(f"Tensor {tensors[0].name} belongs to {path}, which the model does not have.")
        shape = leaves[path].shape
        whole = tensors[0].layer is None
        wanted = [None] if whole else list(range(shape[0]))
        if [tensor.layer for tensor in sorted(tensors, key=lambda one: one.layer or 0)] != wanted:
            raise CheckpointError(f"{path} has {len(wanted)} layers, and {len(tensors)} tensors are to fill it.")
        for tensor in tensors:
            if tensor.our_shape != (shape if whole else shape[1:]):
                raise CheckpointError(f"Tensor {tensor.name} becomes {tensor.our_shape} and {path} is {shape}.")


def _fill(leaf: jax.ShapeDtypeStruct, tensors: Sequence[Tensor], read: Callable[[Tensor], Rows]) -> jax.Array:
    """Return one leaf."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    parts: list[_Part] = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        ranges = [cut.indices(size) for cut, size in zip(index, leaf.shape, strict=True)]
        where = tuple((first, last) for first, last, _ in ranges)
        shape = tuple(last - first for first, last in where)
        parts.append(_Part(device, where, jnp.zeros(shape, leaf.dtype, device=device)))
    # A piece goes to one device, and jax runs nothing on one alone where a mesh of several has been set.
    with jax.set_mesh(None):  # pyright: ignore[reportArgumentType]
        for tensor in tensors:
            rows = read(tensor)
            for first, last in _pieces(tensor.split, tensor.shape[0]):
                _write_piece(parts, tensor, rows, first, last)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [part.values for part in parts])


@dataclasses.dataclass
class _Part:
    """What one device holds of a leaf: from where to where along each axis, and the values so far."""

    device: jax.Device
    where: Region
    values: jax.Array


def _pieces(shape: tuple[int, ...], rows: int) -> list[tuple[int, int]]:
    """Return ranges of the first axis that cover it, all of one length (so that one program writes them all).

    Args:
      shape: whose first axis is cut.
      rows: how many there are to read; where the axis is not a grouping of these, there is one piece.
    """
    length = shape[0]
    if length == 0 or rows % length:
        return [(0, length)]
    # Four bytes a number, whatever it is; then pieces of even size, so that the last overlaps little.
    size = max(PIECE // max(4 * math.prod(shape[1:]), 1), 1)
    size = math.ceil(length / math.ceil(length / size))
    starts = dict.fromkeys(min(start, length - size) for start in range(0, length, size))
    return [(start, start + size) for start in starts]


def _write_piece(parts: list[_Part], tensor: Tensor, rows: Rows, first: int, last: int) -> None:
    """Read `first` to `last` of the foreign tensor's first axis (of `split`), and write it wherever it belongs."""
    along = [(0, size) for size in tensor.split]
    along[0] = (first, last)
    layer = () if tensor.layer is None else ((tensor.layer, tensor.layer + 1),)
    region = (*layer, *(along[axis] for axis in tensor.order))
    shared = [(part, common) for part in parts if (common := _common(region, part.where)) is not None]
    if not shared:
        return
    unit = max(tensor.shape[0] // max(tensor.split[0], 1), 1)
    end = tensor.shape[0] if last == tensor.split[0] else last * unit
    piece = rows[first * unit : end].reshape([stop - start for start, stop in along])
    for part, common in shared:
        inside: list[slice] = [slice(None)] * len(along)
        for axis, (start, stop) in zip(tensor.order, common[len(layer) :], strict=True):
            inside[axis] = slice(start - along[axis][0], stop - along[axis][0])
        starts = tuple(np.int32(cut[0] - own[0]) for cut, own in zip(common, part.where, strict=True))
        # The runtime exchanges axes on the way, several times faster than XLA's loops on a CPU do.
        here = jax.device_put(piece[tuple(inside)].transpose(tensor.order), part.device)
        part.values = _written(part.values, here, starts)
    # Otherwise pieces would pile up on the host faster than devices take them.
    jax.block_until_ready([part.values for part, _ in shared])


def _common(left: Region, right: Region) -> Region | None:
    """Return where two regions meet, None if they do not."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return both if all(first < last for first, last in both) else None


@functools.partial(jax.jit, donate_argnums=0)
def _written(part: jax.Array, piece: jax.Array, starts: tuple[jax.Array, ...]) -> jax.Array:
    """Return `part`, in place, with a piece (of one layer, or of the whole) written at `starts`."""
    piece = piece.astype(part.dtype).reshape((1,) * (part.ndim - piece.ndim) + piece.shape)
    return jax.lax.dynamic_update_slice(part, piece, starts)


def _fetch(leaf: jax.Array, tensor: Tensor) -> np.ndarray:
    """Return one tensor's part of a leaf, in our layout.

    An array keeps what was fetched of it on the host; so pieces are cut out on the devices, and those are dropped.
    """
    values = np.empty(tensor.our_shape, leaf.dtype)
    layer = () if tensor.layer is None else (tensor.layer,)
    everywhere = leaf.sharding
    if isinstance(everywhere, NamedSharding):
        everywhere = NamedSharding(everywhere.mesh, PartitionSpec())
    for first, last in _pieces(values.shape, values.shape[0]):
        starts = (*layer, first, *[0] * (values.ndim - 1))
        sizes = (*[1] * len(layer), last - first, *values.shape[1:])
        piece = _cut_out(sizes, everywhere)(leaf, tuple(np.int32(start) for start in starts))
        values[first:last] = np.asarray(piece).reshape(last - first, *values.shape[1:])
    return values


@functools.lru_cache(maxsize=64)
def _cut_out(sizes: tuple[int, ...], sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """Return the program that cuts a piece of such sizes out of a leaf."""
    return jax.jit(lambda leaf, starts: jax.lax.dynamic_slice(leaf, starts, sizes), out_shardings=sharding)
