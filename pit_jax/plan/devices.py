"""Devices of a machine that is not there, for the compiler alone. Imports jax; run by the worker."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from pit_jax.core.errors import ConfigError
from pit_jax.plan.gpu import target_config
from pit_jax.plan.topology import Target
from pit_jax.sharding.mesh import MeshConfig, make_mesh


def environment(machine: Target) -> Mapping[str, str]:
    """Return the environment variables of a process that compiles for a machine."""
    common = {
        "JAX_PLATFORMS": "cpu",
        # Programs are compiled once each, and what is compiled for devices that are not there cannot be kept.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if machine.platform == "tpu":
        # Without the last one, a second process with libtpu ends at a lock file.
        return common | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    if machine.platform == "gpu":
        return common | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    return common | {"JAX_NUM_CPU_DEVICES": str(machine.devices)}


def mesh_on(config: MeshConfig, machine: Target) -> Mesh:
    """Return a mesh over the devices of a machine that need not be there.

    Raises:
      ConfigError: the compiler for it is not installed, or it has no such shape.
    """
    return make_mesh(config, _devices(machine))


def _devices(machine: Target) -> list[Any]:
    if machine.platform == "cpu":
        return jax.devices("cpu")
    try:
        if machine.platform == "gpu":
            found = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=target_config(machine.chip),
                topology=f"1x{machine.devices}x1",
            )  # fmt: skip
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=machine.layout, **_options(machine))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(_advice(machine, error)) from error
    return list(found.devices)


def _options(machine: Target) -> dict[str, Any]:
    options: dict[str, Any] = {} if machine.slices == 1 else {"num_slices": machine.slices}
    if machine.chip.config is not None:
        options["chip_config_name"] = machine.chip.config
    if len(machine.shape) < 3 and 1 in machine.shape or machine.shape == (1, 1, 1):
        bounds = (*machine.shape, 1, 1)[:3]  # less than the 2x2 of a usual host
        options["chips_per_host_bounds"] = bounds
    return options


def _advice(machine: Target, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    extra, package = ("plan", "libtpu") if machine.platform == "tpu" else ("cuda", "jax[cuda13]")
    if "libtpu" in reason.lower() or "plugin" in reason.lower() or "Unknown backend" in reason:
        return (
            f"Planning for {machine} needs the compiler in {package}, which is not installed here ({reason}). "
            f"Install it: pip install 'pit_jax[{extra}]'; no such device is needed. Python: {sys.executable}"
        )
    return f"The compiler knows no {machine} ({reason}). Give another shape."
