"""What XLA needs to know of a GPU to compile for it without one."""

from __future__ import annotations

from typing import Any

from pit_jax.plan.topology import Chip

_GIB = 2**30
# Fields of XLA's GpuTargetConfigProto, from NVIDIA's data sheets and `cudaGetDeviceProperties`.
_HOPPER: dict[str, Any] = {
    "shared_memory_per_core": 233472, "core_count": 132, "fpus_per_core": 128, "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98, "shared_memory_per_block_optin": 232448, "capability": (9, 0),
}  # fmt: skip
_AMPERE: dict[str, Any] = {
    "shared_memory_per_core": 167936, "core_count": 108, "fpus_per_core": 64, "l2_cache_size": 41943040,
    "clock_rate_ghz": 1.41, "shared_memory_per_block_optin": 166912, "capability": (8, 0),
}  # fmt: skip
_FIELDS = {"h200": _HOPPER, "h100": _HOPPER, "a100": _AMPERE}
_NAMES = {"h200": "NVIDIA H200", "h100": "NVIDIA H100 80GB HBM3", "a100": "NVIDIA A100-SXM4-80GB"}


def target_config(chip: Chip) -> str:
    """Return the text form of XLA's description of a GPU (`GpuTargetConfigProto`)."""
    fields = dict(_FIELDS[chip.name])
    major, minor = fields.pop("capability")
    numbers = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "memory_bandwidth": int(chip.bandwidth or 0),
        "device_memory_size": int(chip.memory or 0), "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64, "device_address_bits": 64, "pcie_bandwidth": 32 * _GIB,
    } | fields  # fmt: skip
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    info = "\n".join(f"  {name}: {value}" for name, value in numbers.items())
    return f"""\
gpu_device_info {{
{info}
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
  device_vendor: "NVIDIA Corporation"
  ecc_enabled: true
  name: "{_NAMES[chip.name]}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{_NAMES[chip.name]}"
"""
