"""Names of machines, and a recipe's mesh on another machine."""

from __future__ import annotations

import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.plan.topology import check_devices, larger, parse_mesh, resize, target
from pit_jax.sharding.mesh import MeshConfig


@pytest.mark.parametrize(
    ("text", "shown", "devices", "hosts"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 16),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v5p-64", "v5p:2x4x4", 32, 8),
        ("v5p-512", "v5p:4x8x8", 256, 64),
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v5e:16x16", "v5e:16x16", 256, 64),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("v5litepod-16", "v5e:4x4", 16, 4),
        ("V6E-32", "v6e:4x8", 32, 8),
        ("v6e-1", "v6e:1x1", 1, 1),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8, 1),
        ("tpu7x-16", "tpu7x:2x2x2", 16, 2),
        ("2*v5p:4x4x4", "2*v5p:4x4x4", 128, 32),
        ("cpu", "cpu:1", 1, 1),
        ("cpu:8", "cpu:8", 8, 1),
        ("gpu:h200", "gpu:h200:1", 1, 1),
        ("gpu:h100:8", "gpu:h100:8", 8, 1),
    ],
)
def test_spellings(text: str, shown: str, devices: int, hosts: int) -> None:
    machine = target(text)
    assert (str(machine), machine.devices, machine.hosts) == (shown, devices, hosts)
    assert target(str(machine)) == machine


def test_slices_are_a_flag_too() -> None:
    assert target("v5p:4x4x4", 2) == target("2*v5p:4x4x4") == target("2*v5p:4x4x4", 2)
    assert target("2*v5p-128").slice_devices == 64


@pytest.mark.parametrize(
    "text",
    ["v5", "v9:4", "v5p:4x4", "v5e:4x4x4", "v5p-100", "v5p-1", "gpu", "gpu:h20", "cpu:x", "v5e", "0*v5e-4", "v5e:"],
)
def test_what_is_no_machine_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--topology|--slices"):
        target(text)


def test_slices_must_agree_and_belong_to_tpus() -> None:
    with pytest.raises(ConfigError, match="--slices"):
        target("2*v5p:4x4x4", 3)
    with pytest.raises(ConfigError, match="TPU"):
        target("cpu:4", 2)


@pytest.mark.parametrize(
    ("config", "machine", "sizes"),
    [
        (MeshConfig(data=1, fsdp=-1, tensor=4), "v5e:16x16", (1, 64, 4, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=4), "2*v5p:4x4x4", (2, 16, 4, 1)),
        (MeshConfig(data=2, fsdp=16, tensor=4), "v5p:4x4x4", (1, 16, 4, 1)),
        (MeshConfig(data=-1), "v6e:4x8", (32, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=8), "v6e:4x8", (4, 8, 1, 1)),
        (MeshConfig(data=1), "v5e:4x4", (1, 16, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=3, sequence=2), "v5e:4x4", (1, 8, 1, 2)),
        (MeshConfig(data=4, fsdp=4), "v5e:4x4", (4, 4, 1, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=-1), "v5e:4x4", (1, 2, 8, 1)),
    ],
)
def test_a_mesh_is_resized(config: MeshConfig, machine: str, sizes: tuple[int, ...]) -> None:
    there = target(machine)
    assert tuple(check_devices(resize(config, there), there).values()) == sizes


def test_a_mesh_can_be_given() -> None:
    mesh = parse_mesh("fsdp=64, tensor=4", MeshConfig(data=2, sequence=2))
    assert (mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence) == (1, 64, 4, 1)
    for wrong in ("fdsp=4", "fsdp", "fsdp=x"):
        with pytest.raises(ConfigError, match="--mesh"):
            parse_mesh(wrong, MeshConfig())
    with pytest.raises(ConfigError, match="slices"):
        check_devices(parse_mesh("fsdp=128", MeshConfig()), target("2*v5p:4x4x4"))


def test_larger_machines() -> None:
    assert str(larger(target("v5p:4x4x4"), 2)) == "v5p:4x4x8"
    assert larger(target("v5e:16x16"), 2) is None
    assert str(larger(target("gpu:h200:2"), 4)) == "gpu:h200:8"
    assert larger(target("gpu:h200:8"), 2) is None
    assert larger(target("cpu:4"), 2) is None
