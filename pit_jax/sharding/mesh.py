"""Meshes of devices with four named axes: data, fsdp, tensor, sequence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from pit_jax.core.errors import invalid
from pit_jax.sharding import rules as sharding_rules
from pit_jax.sharding.rules import DEFAULT_RULES, MESH_AXES, Rules

REST = -1
"""Size of the one mesh axis that takes all devices the others leave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis, of which at most one may be -1 = all the rest, and what they cut.

    data: copies of the parameters, each with its own rows of the batch. The only axis between slices, whose network
      is slow: gradients cross it once a step, parameters never.
    fsdp: rows of the batch as well, but parameters are cut along their model width.
    tensor: heads, mlp and vocabulary are cut; every device sees the same rows.
    sequence: activations and caches are cut along the length.
    rules: which axes of arrays are cut over which mesh axes.
    """

    data: int = REST
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    rules: Rules = DEFAULT_RULES

    def __post_init__(self) -> None:
        """Check every size and rule; make lists from gin hashable.

        Raises:
          ConfigError: a size is neither positive nor -1, more than one is -1, or a rule names what does not exist.
        """
        object.__setattr__(self, "rules", _as_tuples(self.rules))
        sharding_rules.check(self.rules)
        for name, size in self._given.items():
            if size < 1 and size != REST:
                raise invalid(f"MeshConfig.{name}", size, "be positive or -1", "Give the number of devices.")
        if list(self._given.values()).count(REST) > 1:
            raise invalid("MeshConfig", self._given, "have at most one -1", "Give the other sizes.")

    @property
    def _given(self) -> dict[str, int]:
        return {name: vars(self)[name] for name in MESH_AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Return the size of every axis for a number of devices.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices.
        """
        fixed = math.prod(size for size in self._given.values() if size != REST)
        sizes = {name: devices // fixed if size == REST else size for name, size in self._given.items()}
        if math.prod(sizes.values()) != devices:
            fix = "Change the sizes, use -1 for one of them, or start with another number of devices."
            raise invalid("MeshConfig", self._given, f"multiply to the {devices} devices there are", fix)
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over the given devices, by default over all devices of all processes.

    With several slices, `data` runs across them and every other axis stays inside of one. The axes are automatic (the
    compiler propagates shardings): jax makes explicit ones by default.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or `data` cannot be shared out over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    automatic = (AxisType.Auto,) * len(sizes)
    slices = len({_slice_of(device) for device in devices})
    # A 2D torus of 16 x 16 has no axis of 4 to give: one of its own is split where whole ones do not fit.
    split = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(tuple(sizes.values()), **split), tuple(sizes), axis_types=automatic)
    if sizes["data"] % slices:
        fix = "Raise data, lower the other sizes, or use one slice."
        raise invalid("MeshConfig.data", sizes["data"], f"be a multiple of the {slices} slices", fix)
    inner, outer = {**sizes, "data": sizes["data"] // slices}, {**dict.fromkeys(sizes, 1), "data": slices}
    grid = mesh_utils.create_hybrid_device_mesh(tuple(inner.values()), tuple(outer.values()), **split)
    return Mesh(grid, tuple(sizes), axis_types=automatic)


def _slice_of(device: Any) -> int:
    """Return the number of a device's slice; TPUs have them, but for those of a single slice that is not there."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
