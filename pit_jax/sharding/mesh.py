"""Meshes of devices with four named axes: data, fsdp, tensor, sequence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from pit_jax.core.errors import invalid

REST = -1
"""Size of the one mesh axis that takes all devices the others leave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; at most one may be -1 = all the rest.

    data: copies of the parameters, each with its own rows of the batch.
    fsdp: rows of the batch as well, but parameters are cut along their model width.
    tensor: heads, mlp and vocabulary are cut; every device sees the same rows.
    sequence: activations are cut along the length.
    """

    data: int = REST
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        """Check every size.

        Raises:
          ConfigError: a size is neither positive nor -1, or more than one is -1.
        """
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != REST:
                raise invalid(f"MeshConfig.{name}", size, "be positive or -1", "Give the number of devices.")
        if list(dataclasses.asdict(self).values()).count(REST) > 1:
            raise invalid("MeshConfig", dataclasses.asdict(self), "have at most one -1", "Give the other sizes.")

    def sizes(self, devices: int) -> dict[str, int]:
        """Return the size of every axis for a number of devices.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices.
        """
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != REST)
        sizes = {name: devices // fixed if size == REST else size for name, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            fix = "Change the sizes, use -1 for one of them, or start with another number of devices."
            raise invalid("MeshConfig", dataclasses.asdict(self), f"multiply to the {devices} devices there are", fix)
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over the given devices, by default over all devices of all processes.

    Its axes are automatic (the compiler propagates shardings): jax makes explicit ones by default.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    automatic = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic, devices=devices)
