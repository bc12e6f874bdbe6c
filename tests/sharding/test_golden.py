"""Nobody moves a parameter to other devices without noticing: partitions of large models on the shipped meshes."""

from __future__ import annotations

import functools

import pytest

from pit_jax.cli import shipped
from pit_jax.sharding.mesh import MeshConfig

from . import golden


@functools.cache
def _meshes() -> dict[str, MeshConfig]:
    return {name: golden.mesh(name) for name in golden.DEVICES}


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_partitions_are_as_recorded(name: str) -> None:
    """After a change that is meant, record them anew: `python tests/sharding/golden.py`."""
    found = "".join(f"{line}\n" for line in golden.lines(golden.NETWORKS[name], _meshes()))
    assert found == (golden.GOLDEN / f"{name}.txt").read_text()


def test_every_golden_file_is_compared() -> None:
    assert {path.stem for path in golden.GOLDEN.glob("*.txt")} == set(golden.NETWORKS)


def test_every_mesh_of_an_accelerator_is_in_the_dumps() -> None:
    shipped_meshes = {path.stem for path in shipped.gin_directory().glob("meshes/*.gin")}
    assert shipped_meshes - set(golden.DEVICES) == {"data_parallel", "fsdp"}  # they name no machine
    assert set(golden.DEVICES) <= shipped_meshes
