"""Meshes over the chips of TPU slices, described by the TPU compiler's own topologies; no TPU is needed."""

from __future__ import annotations

import os
import re

import pytest

from pit_jax.cli import shipped
from pit_jax.core.errors import ConfigError
from pit_jax.sharding.mesh import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def chips() -> list:
    """Two slices of 2x2x1 chips each."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices


def test_data_runs_across_slices_and_nothing_else_does(chips: list) -> None:
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), chips)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert {chip.id for chip in mesh.devices.flat} == {chip.id for chip in chips}
    slices = [[chip.slice_index for chip in row.flat] for row in mesh.devices]
    assert all(len(set(row)) == 1 for row in slices)
    assert [row[0] for row in slices] == [0, 0, 1, 1]


def test_parameters_are_not_cut_across_slices(chips: list) -> None:
    with pytest.raises(ConfigError, match=r"MeshConfig.data = 1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=-1), chips)


@pytest.mark.parametrize("name", ["v5e_4x4", "v5e_16x16", "v5p_4x4x4", "v5p_4x8x8", "v6e_16x16"])
def test_every_shipped_mesh_fits_its_slice(name: str) -> None:
    """Also where an axis of the mesh is no axis of the torus."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    kind, _, shape = name.partition("_")
    there = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}").devices
    text = (shipped.gin_directory() / "meshes" / f"{name}.gin").read_text()
    sizes = {axis: int(size) for axis, size in re.findall(r"^mesh\.MeshConfig\.(\w+) = (-?\d+)$", text, re.M)}
    mesh = make_mesh(MeshConfig(**sizes), there)
    assert {chip.id for chip in mesh.devices.flat} == {chip.id for chip in there}
    assert all(mesh.shape[axis] == size for axis, size in sizes.items() if size > 0)
