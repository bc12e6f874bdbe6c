"""How the tensors of another project's checkpoint lie in ours, as data that serves both directions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a foreign checkpoint and its place in our parameters.

    With x the foreign tensor, ours is `x.reshape(split).transpose(order)`: views only, so that reading a slice of
    ours reads a part of theirs. Norm offsets and other numbers are the configs' affair; values never change.

    name: in the foreign checkpoint, such as "model.layers.3.self_attn.q_proj.weight".
    path: of our leaf, such as "layers/attention/query/kernel".
    layer: its index on our leaf's leading axis of stacked layers; None for the whole leaf.
    shape: of the foreign tensor.
    split: the foreign shape with axes taken apart, such as (H, E, D) for (H E, D).
    order: permutation of `split`'s axes that gives ours.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    layer: int | None = None

    def __post_init__(self) -> None:
        """Check that nothing is lost."""
        assert math.prod(self.shape) == math.prod(self.split), self
        assert sorted(self.order) == list(range(len(self.split))), self

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our leaf (of one layer of it)."""
        return tuple(self.split[axis] for axis in self.order)

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """Return the foreign tensor as ours."""
        return theirs.reshape(self.split).transpose(self.order)

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Return our leaf (one layer of it) as the foreign tensor."""
        inverse = tuple(int(axis) for axis in np.argsort(self.order))
        return np.ascontiguousarray(ours.transpose(inverse)).reshape(self.shape)


def same(name: str, path: str, shape: tuple[int, ...], layer: int | None = None) -> Tensor:
    """Return a tensor that lies in ours as it is."""
    order = tuple(range(len(shape)))
    return Tensor(name=name, path=path, layer=layer, shape=shape, split=shape, order=order)


def transposed(name: str, path: str, shape: tuple[int, ...], layer: int | None = None) -> Tensor:
    """Return a matrix (outputs, inputs) that is (inputs, outputs) in ours."""
    return Tensor(name=name, path=path, layer=layer, shape=shape, split=shape, order=(1, 0))


def into_heads(name: str, path: str, heads: tuple[int, int], width: int, layer: int | None = None) -> Tensor:
    """Return a projection (H E, D) into heads, which is (D, H, E) in ours; `heads` is (H, E)."""
    shape = (math.prod(heads), width)
    return Tensor(name=name, path=path, layer=layer, shape=shape, split=(*heads, width), order=(2, 0, 1))


def from_heads(name: str, path: str, heads: tuple[int, int], width: int, layer: int | None = None) -> Tensor:
    """Return a projection (D, H E) out of heads, which is (H, E, D) in ours."""
    shape = (width, math.prod(heads))
    return Tensor(name=name, path=path, layer=layer, shape=shape, split=(width, *heads), order=(1, 2, 0))
