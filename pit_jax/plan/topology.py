"""Machines to plan for, by name: how many devices they have, and what one device can do.

v5p:4x4x4  v5e:16x16  v6e-256  v5p-128  tpu7x:2x2x1     TPU slices; v4-N, v5p-N and tpu7x-N count cores, the
                                                        others chips
2*v5p:4x4x4                                             two slices
gpu:h200  gpu:h100:8  gpu:a100:8                        GPUs of one host
cpu  cpu:8                                              this machine, as so many devices
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re

from pit_jax.core.errors import ConfigError, invalid, nearest
from pit_jax.sharding.mesh import REST, MeshConfig
from pit_jax.sharding.rules import MESH_AXES

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device (as JAX counts them) can do.

    memory: bytes that programs can use: what the compiler says is available, a little less than is built in.
    flops: most bfloat16 operations a second. bandwidth: bytes a second of its memory. link: bytes a second that it can
    send to its neighbours, over all links; network: to other slices. None where there is no such number.
    dimensions: of a slice's shape. cores: that names such as v5p-128 count for each chip. devices: JAX's, of each chip.
    host_chips: chips that share a host. most: chips of a slice. config: libtpu's name of how cores work together.
    """

    name: str
    memory: int | None
    flops: float | None
    bandwidth: float | None
    link: float | None
    network: float | None
    dimensions: int = 0
    cores: int = 1
    devices: int = 1
    host_chips: int = 4
    most: int = 4096
    config: str | None = None


# Memory: what libtpu 0.0.42 reports as available. The rest: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where
# links are given in both directions together (half of it is here) and for a whole chip (tpu7x: two devices).
TPUS: dict[str, Chip] = {
    "v4": Chip(
        name="v4", memory=int(30.75 * _GIB), flops=275e12, bandwidth=1.228e12, link=150e9, network=3.125e9,
        dimensions=3, cores=2, config="megacore",
    ),
    "v5e": Chip(
        name="v5e", memory=int(15.75 * _GIB), flops=197e12, bandwidth=0.819e12, link=200e9, network=3.125e9,
        dimensions=2, most=256,
    ),
    "v5p": Chip(
        name="v5p", memory=int(95.74 * _GIB), flops=459e12, bandwidth=2.765e12, link=600e9, network=6.25e9,
        dimensions=3, cores=2,
    ),
    "v6e": Chip(
        name="v6e", memory=int(31.25 * _GIB), flops=918e12, bandwidth=1.638e12, link=400e9, network=12.5e9,
        dimensions=2, most=256,
    ),
    "tpu7x": Chip(
        name="tpu7x", memory=int(94.75 * _GIB), flops=1153e12, bandwidth=3.69e12, link=300e9, network=6.25e9,
        dimensions=3, cores=2, devices=2,
    ),
}  # fmt: skip
# NVIDIA's data sheets (SXM, dense); link: NVLink in one direction. Memory: XLA takes 75 % of a GPU's unless told
# otherwise (XLA_PYTHON_CLIENT_MEM_FRACTION), here all of what the driver leaves.
GPUS: dict[str, Chip] = {
    "a100": Chip(
        name="a100", memory=int(79.1 * _GIB), flops=312e12, bandwidth=2.039e12, link=300e9, network=25e9, host_chips=8
    ),
    "h100": Chip(
        name="h100", memory=int(79.1 * _GIB), flops=989e12, bandwidth=3.35e12, link=450e9, network=50e9, host_chips=8
    ),
    "h200": Chip(
        name="h200", memory=int(139.8 * _GIB), flops=989e12, bandwidth=4.8e12, link=450e9, network=50e9, host_chips=8
    ),
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v5": "v5p", "v7x": "tpu7x", "tpu7": "tpu7x"}
_MOST_SLICES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A machine: `slices` slices (1 but for several TPU slices) of shape `shape` (for GPU and CPU the devices)."""

    platform: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_devices(self) -> int:
        """JAX devices of one slice."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.slice_devices * self.slices

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return max(math.prod(self.shape) // self.chip.host_chips, 1) * self.slices

    @property
    def layout(self) -> str:
        """The shape as libtpu writes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        """Return the name that `target` reads."""
        if self.platform == "cpu":
            return f"cpu:{self.devices}"
        if self.platform == "gpu":
            return f"gpu:{self.chip.name}:{self.devices}"
        return self.layout if self.slices == 1 else f"{self.slices}*{self.layout}"


def target(text: str, slices: int | None = None) -> Target:
    """Return the machine of a name; see the module for the spellings.

    Args:
      text: the name.
      slices: number of slices, where the name does not say it.
    Raises:
      ConfigError: there is no such machine, or it has no such shape.
    """
    counted = re.fullmatch(r"(\d+)\*(.+)", text.strip())
    name = counted[2] if counted else text.strip()
    if counted and slices is not None and slices != int(counted[1]):
        raise invalid("--slices", slices, f"agree with {text}", "Leave one of the two out.")
    count = int(counted[1]) if counted else slices or 1
    if not 1 <= count <= _MOST_SLICES:
        raise invalid("--slices", count, f"lie in 1..{_MOST_SLICES}", "Give the number of slices.")
    kind, _, rest = name.lower().partition(":")
    if kind in ("cpu", "gpu", "cuda"):
        if count > 1:
            raise invalid("--topology", text, "be a TPU to have several slices", "Leave the slices out.")
        return _host(kind, rest, text)
    found = re.fullmatch(r"(?:tpu-?)?(v?[a-z0-9]+?)(?:[:\-](.+))?", name.lower().replace("tpu7x", "v7x"))
    chip = TPUS.get(_OTHER_NAMES.get(found[1], found[1])) if found else None
    if found is None or chip is None or not found[2]:
        known = ", ".join([f"{name}:SHAPE" for name in TPUS] + [f"gpu:{name}" for name in GPUS] + ["cpu:N"])
        hint = nearest(name.split(":")[0].split("-")[0], TPUS)
        raise invalid("--topology", text, f"name a machine: {known}", f"For example v5p:4x4x4 or v5e-16.{hint}")
    shape = _shape(chip, found[2], text)
    return Target(platform="tpu", chip=chip, shape=shape, slices=count)


def _host(kind: str, rest: str, text: str) -> Target:
    words = [word for word in rest.split(":") if word]
    if kind == "cpu":
        devices = words[0] if words else "1"
        chip = Chip(name="cpu", memory=_host_memory(), flops=None, bandwidth=None, link=None, network=None)
    else:
        name = words[0] if words else ""
        if name not in GPUS:
            fix = f"For example gpu:h200:8.{nearest(name, GPUS)}"
            raise invalid("--topology", text, f"name a GPU: {', '.join(GPUS)}", fix)
        chip, devices = GPUS[name], words[1] if len(words) > 1 else "1"
    if not devices.isdigit() or not 1 <= int(devices) <= 4096:
        raise invalid("--topology", text, "end with a number of devices", "For example cpu:8 or gpu:h200:8.")
    if kind == "cpu" and chip.memory is not None:  # the devices are threads of one process, which share it
        chip = dataclasses.replace(chip, memory=chip.memory // int(devices), host_chips=int(devices))
    return Target(platform="cpu" if kind == "cpu" else "gpu", chip=chip, shape=(int(devices),))


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _shape(chip: Chip, text: str, whole: str) -> tuple[int, ...]:
    """Return the shape of a slice, written out or as the number of its chips or cores."""
    if re.fullmatch(r"\d+(x\d+)+", text):
        shape = tuple(int(size) for size in text.split("x"))
        if len(shape) != chip.dimensions or min(shape) < 1:
            example = "16x16" if chip.dimensions == 2 else "4x4x4"
            fix = f"For example {chip.name}:{example}."
            raise invalid("--topology", whole, f"have {chip.dimensions} dimensions", fix)
        return shape
    chips = int(text) / chip.cores if text.isdigit() else 0
    if chips < 1 or chips != int(chips) or int(chips) & (int(chips) - 1):
        rule = "be a power of two of " + ("cores, two for each chip" if chip.cores == 2 else "chips")
        raise invalid("--topology", whole, rule, f"Write the shape instead, such as {chip.name}:AxB.")
    return _usual_shape(int(chips), chip.dimensions)


def _usual_shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """Return the shape in which so many chips are rented: as square as it can be, 2x2x1 for four."""
    power = chips.bit_length() - 1
    if dimensions == 3 and power < 3:
        return (2 if power > 0 else 1, 2 if power > 1 else 1, 1)
    least, more = divmod(power, dimensions)
    return tuple(2 ** (least + (n >= dimensions - more)) for n in range(dimensions))


def larger(machine: Target, factor: int) -> Target | None:
    """Return the machine of the same kind with `factor` times as many devices, None where there is none to rent."""
    chips = math.prod(machine.shape) * factor
    if machine.platform == "cpu" or (machine.platform == "gpu" and chips > machine.chip.host_chips):
        return None
    if machine.platform == "gpu":
        return dataclasses.replace(machine, shape=(chips,))
    if chips > machine.chip.most or chips & (chips - 1):
        return None
    return dataclasses.replace(machine, shape=_usual_shape(chips, machine.chip.dimensions))


def resize(config: MeshConfig, machine: Target) -> MeshConfig:
    """Return a recipe's mesh on another machine.

    A mesh that suits it stays. Else `tensor` and `sequence` stay as far as they divide the devices of a slice. A recipe
    that copies its parameters (`data` = -1) goes on doing so; else `data` runs across slices and `fsdp` takes all that
    is left.
    """
    with contextlib.suppress(ConfigError):
        check_devices(config, machine)
        return config
    free = machine.slice_devices
    tensor = math.gcd(config.tensor, free) if config.tensor != REST else 1
    sequence = math.gcd(config.sequence, free // tensor) if config.sequence != REST else 1
    free //= tensor * sequence
    if config.data == REST and config.fsdp != REST:
        fsdp = math.gcd(config.fsdp, free)
        data = machine.slices * (free // fsdp)
    else:
        data, fsdp = machine.slices, free
    if REST in (config.tensor, config.sequence) and REST not in (config.data, config.fsdp):
        fsdp = math.gcd(config.fsdp, free)
        rest = free // fsdp
        tensor, sequence = (rest, sequence) if config.tensor == REST else (tensor, rest)
    return dataclasses.replace(config, data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)


def parse_mesh(text: str, config: MeshConfig) -> MeshConfig:
    """Return a mesh with the sizes of `AXIS=N,AXIS=N,...`; axes that are not named get size 1, unless one is -1.

    Raises:
      ConfigError: an axis does not exist or a size is no number.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in sizes or not re.fullmatch(r"-1|\d+", size):
            hint = nearest(axis, MESH_AXES)
            rule = f"be AXIS=NUMBER,... with axes {', '.join(MESH_AXES)}"
            raise invalid("--mesh", text, rule, f"For example --mesh=fsdp=64,tensor=4.{hint}")
        sizes[axis] = int(size)
    return dataclasses.replace(config, **sizes)


def describe(machine: Target) -> str:
    """Return a machine in words."""
    if machine.platform == "cpu":
        return f"{machine}: {machine.devices} device(s) of this machine"
    slices = f"{machine.slices} slices of " if machine.slices > 1 else ""
    chips = math.prod(machine.shape)
    what = (
        f"{slices}{chips} chip(s), {machine.devices} JAX devices"
        if machine.chip.devices > 1
        else f"{slices}{chips} chip(s)"
    )
    memory = f"{machine.chip.memory / _GIB:.2f} GiB a device" if machine.chip.memory else "memory unknown"
    return f"{machine}: {what}, {machine.hosts} host(s), {memory}"


def check_devices(config: MeshConfig, machine: Target) -> dict[str, int]:
    """Return the sizes of a mesh on a machine.

    Raises:
      ConfigError: they do not multiply to its devices, or `data` does not run across its slices.
    """
    sizes = config.sizes(machine.devices)
    if sizes["data"] % machine.slices:
        rule = f"be a multiple of the {machine.slices} slices"
        raise ConfigError(f"MeshConfig.data = {sizes['data']} must {rule}. Only it runs across slices.")
    return sizes
