"""Meshes over the chips of TPU slices, described by the TPU compiler's own topologies; no TPU is needed."""

from __future__ import annotations

import os

import pytest

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
