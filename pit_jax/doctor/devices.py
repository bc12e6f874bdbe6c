"""What can be seen only with jax running: hosts, devices, the mesh over them, a timed collective, clocks, one storage.

Every host runs `examine` at the same time; whatever they do together has a time limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from pit_jax.core.errors import ConfigError
from pit_jax.doctor import storage, versions
from pit_jax.doctor.machine import Accelerators
from pit_jax.doctor.report import Check, from_dict, ok, problem, warning
from pit_jax.sharding import processes
from pit_jax.sharding.mesh import MeshConfig, make_mesh

REDUCED_BYTES = {"cpu": 2**20}
"""Bytes a device that the collective sums, by platform; REDUCED_ELSEWHERE on those not named."""

REDUCED_ELSEWHERE = 64 * 2**20
SLOW_BYTES_PER_SECOND = 10**9
"""Below this, accelerators talk through something that was not meant for it."""

REPEATS = 5
SKEW_WARNING, SKEW_PROBLEM = 5.0, 60.0
"""Seconds between the clocks of two hosts; certificates and access tokens fail of minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examination:
    """What to examine.

    cluster: the other processes, None without any. mesh: compared with the devices. storage: MODEL_DIR, if it could
    be written. versions, checks: what this host has found without jax. timeout: seconds the hosts wait for each other.
    """

    cluster: processes.Cluster | None
    mesh: MeshConfig | None
    storage: str | None
    accelerators: Accelerators
    versions: Mapping[str, str]
    checks: tuple[Check, ...]
    timeout: float


def examine(what: Examination) -> Iterator[str | Check | dict[str, int]]:
    """Yield the name of each step before it begins, and what it has found.

    After the hosts have come together, {"process": number, "processes": how many} comes once; process 0 also yields
    what the others have found without jax.
    """
    if what.cluster is not None:
        yield "hosts"
        processes.join(dataclasses.replace(what.cluster, start=what.timeout))
    yield "devices"
    devices = jax.devices()
    yield {"process": jax.process_index(), "processes": jax.process_count()}
    yield describe(devices)
    if devices[0].platform == "cpu" and os.environ.get("JAX_PLATFORMS", "").lower() != "cpu":
        yield from _unused(what.accelerators)
    if jax.process_count() > 1:
        yield "hosts"
        yield from compare_hosts(what, devices)
        yield "clocks"
        yield from compare_clocks(what.timeout)
    if what.mesh is not None:
        yield "mesh"
        yield check_mesh(what.mesh, devices)
    yield "collective"
    yield collective(devices)
    if jax.process_count() > 1:
        yield "shared storage"
        # A host that could not write it has said so already, and must not keep the others waiting.
        places = processes.gather("doctor storage", what.storage, what.timeout)
        if what.storage is not None and None not in places:
            yield check_shared(epath.Path(what.storage), what.timeout)


def describe(devices: Sequence[jax.Device]) -> Check:
    """Report number, kind and memory of the devices."""
    kinds = sorted({device.device_kind for device in devices})
    stats = devices[0].memory_stats() if devices[0].process_index == jax.process_index() else None
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB each" if stats and "bytes_limit" in stats else ""
    slices = {device.slice_index for device in devices if device.platform == "tpu"}
    several = f", in {len(slices)} slices" if len(slices) > 1 else ""
    found = f"{len(devices)} x {' and '.join(kinds)} ({devices[0].platform}){memory}{several}"
    return ok("devices", f"{found}; {len(jax.local_devices())} on this host" if jax.process_count() > 1 else found)


def _unused(there: Accelerators) -> Iterator[Check]:
    if there.tpus or there.gpus:
        fix = "Check that jax[tpu] or jax[cuda13] is installed here, that the driver works, and JAX_PLATFORMS."
        yield problem("devices", f"this machine has {there}, but jax found only the CPU", fix)


def compare_hosts(what: Examination, devices: Sequence[jax.Device]) -> Iterator[Check]:
    """Exchange what every host has found; process 0 yields the faults of the others, and where they differ."""
    mine = {
        "host": socket.gethostname(),
        "versions": dict(what.versions),
        "checks": [dataclasses.asdict(check) for check in what.checks if check.status != "ok"],
    }
    reports = processes.gather("doctor reports", mine, what.timeout)
    names = [report["host"] for report in reports]
    yield ok("hosts", f"{len(reports)} processes ({_few(names)}), this is process {jax.process_index()}")
    yield from versions.differing({number: report["versions"] for number, report in enumerate(reports)})
    local = [sum(device.process_index == number for device in devices) for number in range(len(reports))]
    if len(set(local)) > 1:
        found = f"the processes have {local} devices, in their order"
        yield problem("devices", found, "Give every process the same number of devices.")
    for number, report in enumerate(reports):
        if number != jax.process_index() and jax.process_index() == 0:
            yield from (dataclasses.replace(from_dict(check), host=number) for check in report["checks"])


def compare_clocks(timeout: float) -> Iterator[Check]:
    """Compare the clocks of all hosts, as they are read right after a barrier."""
    processes.barrier("doctor clocks", timeout)
    before = time.time()
    processes.barrier("doctor clocks", timeout)
    reading = (before + time.time()) / 2  # The barrier falls between the two on every host.
    readings = processes.gather("doctor clock", reading, timeout)
    yield judge_clocks(readings)


def judge_clocks(readings: Sequence[float]) -> Check:
    """Return the check for what the hosts' clocks showed at one moment, in seconds."""
    middle = statistics.median(readings)
    worst = max(range(len(readings)), key=lambda number: abs(readings[number] - middle))
    skew = max(readings) - min(readings)
    found = f"at most {skew:.2f} s apart"
    if skew < SKEW_WARNING:
        return ok("clocks", found)
    found = f"{found}; process {worst} differs most"
    fix = "Let NTP set the clocks (timedatectl set-ntp true): access tokens, locks and logs go by them."
    return problem("clocks", found, fix) if skew >= SKEW_PROBLEM else warning("clocks", found, fix)


def check_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Check:
    """Build the mesh over the devices."""
    try:
        mesh = make_mesh(config, devices)
    except ConfigError as error:
        return problem("mesh", str(error), "`pit-jax plan` shows what fits; gin/meshes has one for many machines.")
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return ok("mesh", f"{shape} over {len(devices)} devices" if shape else "one device")


def collective(devices: Sequence[jax.Device]) -> Check:
    """Sum an array over all devices, check the sum and time it.

    The bandwidth is that of the links, 2 (n - 1) / n bytes / seconds, as NCCL's tests count it.
    """
    count, size = len(devices), REDUCED_BYTES.get(devices[0].platform, REDUCED_ELSEWHERE)
    mesh = Mesh(np.asarray(devices), ("all",))
    cut, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())

    def rows(index: tuple[slice, ...]) -> Float32[np.ndarray, "1 n"]:
        return np.full((1, size // 4), (index[0].start or 0) + 1, np.float32)

    numbers = jax.make_array_from_callback((count, size // 4), cut, rows)
    add = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole)
    total = jax.block_until_ready(add(numbers))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(add(numbers))
        times.append(time.perf_counter() - start)
    return judge_collective(count, size, min(times), np.asarray(total.addressable_data(0)), devices[0].platform)


def judge_collective(count: int, size: int, seconds: float, total: Float32[np.ndarray, " n"], platform: str) -> Check:
    """Return the check for a sum of 1, 2 ... `count`, `size` bytes a device."""
    expected = count * (count + 1) / 2
    if not np.all(total == expected):
        found = f"the sum over {count} devices is {float(total.min())} to {float(total.max())}, not {expected}"
        return problem("collective", found, "A device or a link is broken: take other machines.")
    if count == 1:
        return ok("collective", "one device: nothing to exchange; it computes")
    bandwidth = 2 * (count - 1) / count * size / seconds
    found = f"sum of {size / 2**20:.0f} MiB over {count} devices in {seconds * 1e3:.2f} ms, {bandwidth / 1e9:.2f} GB/s"
    if platform != "cpu" and bandwidth < SLOW_BYTES_PER_SECOND:
        fix = "Check that the devices are of one slice or one host (NVLink, ICI), not joined by a plain network."
        return warning("collective", f"{found}: slow", fix)
    return ok("collective", found)


def check_shared(directory: epath.Path, timeout: float) -> Check:
    """Let process 0 write a file that all others must see."""
    name = processes.gather("doctor file", uuid.uuid4().hex, timeout)[0]
    path = directory / f".doctor-{name}"
    with storage.there(directory) if processes.is_first() else contextlib.nullcontext():
        if processes.is_first():
            path.write_text(name)
        processes.barrier("doctor file written", timeout)
        seen: list[bool] = processes.gather("doctor file seen", path.exists(), timeout)
        if processes.is_first():
            path.unlink()
    blind = [str(number) for number, sees in enumerate(seen) if not sees]
    if blind:
        found = f"{directory}: process {', '.join(blind)} does not see what process 0 writes"
        return problem("shared storage", found, "MODEL_DIR must be one place for all hosts: a bucket (gs://) or NFS.")
    return ok("shared storage", f"all {len(seen)} processes see {directory}")


def _few(names: Sequence[str]) -> str:
    different = sorted(set(names))
    return ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
