"""Streaming of foreign tensors into parameters and back: any layout, dtype, mesh and size of pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core.errors import CheckpointError
from pit_jax.models.convert import stream
from pit_jax.models.convert.layout import Tensor
from pit_jax.sharding.mesh import MeshConfig, make_mesh

MESH = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
SPECS = {
    "embedding": PartitionSpec("tensor", "fsdp"),
    "kernel": PartitionSpec(None, "fsdp", "tensor"),
    "scale": PartitionSpec(),
}


def tensors() -> list[Tensor]:
    """Two layers of heads (H E, D) -> (D, H, E), an embedding, and a vector."""
    layers = [
        Tensor(name=f"q{n}", path="kernel", shape=(4 * 6, 8), split=(4, 6, 8), order=(2, 0, 1), layer=n)
        for n in range(2)
    ]
    embedding = Tensor(name="e", path="embedding", shape=(10, 8), split=(10, 8), order=(0, 1))
    scale = Tensor(name="s", path="scale", shape=(1, 7), split=(7,), order=(0,))
    return [*layers, embedding, scale]


def foreign(dtype: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {one.name: random.standard_normal(one.shape, np.float32).astype(jnp.dtype(dtype)) for one in tensors()}


def abstract(dtype: str, *, cut: bool) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {"embedding": (10, 8), "kernel": (2, 8, 4, 6), "scale": (7,)}
    place = {name: NamedSharding(MESH, SPECS[name]) if cut else None for name in shapes}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place[name]) for name, shape in shapes.items()}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("piece", [2**20, 200, 1])
def test_a_round_trip_gives_back_every_bit(cut: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", piece)
    theirs = foreign("float32")
    params = stream.load(tensors(), lambda one: theirs[one.name], abstract("float32", cut=cut))
    kernel = np.stack([theirs[f"q{n}"].reshape(4, 6, 8).transpose(2, 0, 1) for n in range(2)])
    np.testing.assert_array_equal(params["kernel"], kernel)
    np.testing.assert_array_equal(params["embedding"], theirs["e"])
    np.testing.assert_array_equal(params["scale"], theirs["s"][0])
    if cut:
        assert {name: leaf.sharding.spec for name, leaf in params.items()} == SPECS
    back = {one.name: values for one, values in stream.unload(params, tensors())}
    assert list(back) == [one.name for one in tensors()]
    for name, values in theirs.items():
        np.testing.assert_array_equal(back[name], values)
        assert back[name].flags.c_contiguous


def test_a_stage_loads_under_the_mesh_it_has_set() -> None:
    theirs = foreign("float32")
    with jax.set_mesh(MESH):
        params = stream.load(tensors(), lambda one: theirs[one.name], abstract("float32", cut=True))
    np.testing.assert_array_equal(params["embedding"], theirs["e"])
    assert {name: leaf.sharding.spec for name, leaf in params.items()} == SPECS


@pytest.mark.parametrize(("stored", "ours"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")])
def test_numbers_are_converted_as_numpy_does(stored: str, ours: str) -> None:
    theirs = foreign(stored)
    params = stream.load(tensors(), lambda one: theirs[one.name], abstract(ours, cut=False))
    np.testing.assert_array_equal(params["embedding"], theirs["e"].astype(jnp.dtype(ours)))


def test_only_pieces_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 4 * 8 * 3)
    theirs, sizes = foreign("float32"), []

    class Spy:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values

        def __getitem__(self, rows: slice) -> np.ndarray:
            sizes.append(self.values[rows].size)
            return self.values[rows]

    params = stream.load(tensors(), lambda one: Spy(theirs[one.name]), abstract("float32", cut=True))
    np.testing.assert_array_equal(params["embedding"], theirs["e"])
    # Heads are not taken apart: one of them is the least there can be.
    assert max(sizes) == 6 * 8


def test_one_program_serves_all_layers_and_pieces_of_a_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 4 * 6 * 8 * 2)
    theirs = foreign("float32")
    stream._written.clear_cache()
    stream.load(tensors(), lambda one: theirs[one.name], abstract("float32", cut=False))
    assert stream._written._cache_size() == len(SPECS)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 50), width=st.integers(1, 9), piece=st.integers(1, 400))
def test_pieces_cover_an_axis_with_one_length(length: int, width: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", piece)
        pieces = stream._pieces((length, width), length)
    assert len({last - first for first, last in pieces}) == 1
    assert set().union(*(range(first, last) for first, last in pieces)) == set(range(length))
    size = pieces[0][1] - pieces[0][0]
    assert size == 1 or 4 * size * width <= max(piece, 4 * width)


def test_leaves_without_tensors_and_tensors_without_leaves_are_named() -> None:
    theirs = foreign("float32")
    whole, leaves = tensors(), abstract("float32", cut=False)
    cases = [
        ([one for one in whole if one.path != "scale"], leaves, "holds scale"),
        (whole, {name: leaf for name, leaf in leaves.items() if name != "scale"}, "s belongs to scale"),
        (whole[1:], leaves, "kernel has 2 layers, and 1 tensors"),
        (whole, leaves | {"embedding": jax.ShapeDtypeStruct((11, 8), "float32")}, r"e becomes \(10, 8\)"),
    ]
    for given_tensors, given_leaves, message in cases:
        with pytest.raises(CheckpointError, match=message):
            stream.load(given_tensors, lambda one: theirs[one.name], given_leaves)
