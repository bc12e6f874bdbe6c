"""What of a machine breaks runs: accelerators that jax will not see, limits, memory, folders, encodings.

Nothing here imports jax, so that the doctor has something to say even where jax does not start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import locale
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from pit_jax.doctor.report import Check, ok, problem, warning

_GIB = 2**30
_GOOGLE = "0x1ae0"
_TPUS: Mapping[str, str] = {
    "0x0027": "v3",
    "0x0056": "plc",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
}
"""PCI device numbers of TPU chips, as jax looks for them."""

MINIMUM_FILES = 1024
"""Open files: a checkpoint or a set of ArrayRecord shards opens hundreds at once."""

MINIMUM_SHARED = 512 * 2**20
"""Bytes of /dev/shm: NCCL puts its buffers between GPUs there, and Docker's default of 64 MB is too small."""

MINIMUM_LOCKED = 64 * _GIB
"""Bytes of locked memory that libtpu asks for; the guides for TPU containers set 68719476736."""

TPU_LOCK = Path("/tmp/libtpu_lockfile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerators:
    """What the machine holds, whatever jax thinks of it: TPU chips on the PCI bus, and whether there are GPUs."""

    tpus: int = 0
    tpu: str = ""
    gpus: bool = False

    def __str__(self) -> str:
        parts = [f"{self.tpus} TPU chips ({self.tpu})"] if self.tpus else []
        return " and ".join([*parts, *(["NVIDIA GPUs"] if self.gpus else [])]) or "no accelerators"


def find_accelerators(root: Path = Path("/")) -> Accelerators:
    """Look for TPU chips among the PCI devices, and for the device files of NVIDIA's driver."""
    kinds = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() == _GOOGLE:
                kind = _TPUS.get((vendor.parent / "device").read_text().strip())
                kinds += [kind] if kind else []
    gpus = any((root / "dev" / name).exists() for name in ("nvidia0", "nvidiactl", "dxg"))
    return Accelerators(tpus=len(kinds), tpu=kinds[0] if kinds else "", gpus=gpus)


def check_platform(there: Accelerators, versions: Collection[str], environment: Mapping[str, str]) -> list[Check]:
    """Compare the accelerators of the machine with what jax is able and allowed to use.

    Args:
      there: what the machine holds.
      versions: names of installed distributions.
      environment: variables of the environment.
    """
    asked = environment.get("JAX_PLATFORMS", "").lower()
    plugins = {name for name in versions if name.startswith("jax-cuda")}
    checks = []
    if there.tpus and "libtpu" not in versions:
        checks.append(problem("platform", f"{there}, but libtpu is not installed", "pip install 'jax[tpu]'"))
    if there.gpus and not plugins and not there.tpus:
        fix = "pip install 'jax[cuda13]' (or cuda12, for a driver before 580); JAX_PLATFORMS=cpu if you want the CPU."
        make = warning if asked == "cpu" else problem
        checks.append(make("platform", f"{there}, but jax is installed for the CPU only", fix))
    if asked == "cpu" and (there.tpus or there.gpus) and not checks:
        checks.append(warning("platform", f"{there}, but JAX_PLATFORMS=cpu hides them", "unset JAX_PLATFORMS"))
    for name, present, package in (("tpu", there.tpus > 0, "libtpu"), ("cuda", there.gpus, "a CUDA plugin")):
        if name in asked.split(",")[:1] and not present:
            found = f"JAX_PLATFORMS={asked}, but this machine has {there}"
            checks.append(problem("platform", found, f"unset JAX_PLATFORMS, or use a machine that needs {package}."))
    fake = [word for word in environment.get("XLA_FLAGS", "").split() if "host_platform_device_count" in word]
    if fake or "JAX_NUM_CPU_DEVICES" in environment:
        found = f"fake CPU devices are asked for ({', '.join(fake) or 'JAX_NUM_CPU_DEVICES'})"
        checks.append(warning("platform", found, "They are for tests; unset it for a real run."))
    if there.gpus and environment.get("LD_LIBRARY_PATH"):
        found = f"LD_LIBRARY_PATH={environment['LD_LIBRARY_PATH']} may put other CUDA libraries before jax's own"
        checks.append(warning("platform", found, "unset LD_LIBRARY_PATH if jax finds no GPU or cuDNN fails to load."))
    return checks or [ok("platform", f"{there}{f', JAX_PLATFORMS={asked}' if asked else ''}")]


def check_tensorflow(there: Accelerators, versions: Collection[str], environment: Mapping[str, str]) -> list[Check]:
    """Say how TensorFlow and jax share GPUs: TensorFlow takes all of their memory wherever it may see them."""
    if not there.gpus or "tensorflow" not in versions:
        return []
    if environment.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "true":
        return [ok("TensorFlow", "installed beside GPUs, and takes memory as it needs")]
    fix = (
        "Nothing to do for SeqIO tasks: pit_jax hides the GPUs from TensorFlow. "
        "Task modules that import TensorFlow themselves must not touch a GPU before."
    )
    return [ok("TensorFlow", f"installed beside GPUs. {fix}")]


def check_limits(there: Accelerators) -> list[Check]:
    """Check the limits of this process that break runs: open files, locked memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    checks = [ok("open files", f"limit {_limit(files)}")]
    if files != resource.RLIM_INFINITY and files < MINIMUM_FILES:
        checks = [warning("open files", f"limit {files}", f"ulimit -n {MINIMUM_FILES * 64} (checkpoints open many)")]
    if there.tpus:
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked != resource.RLIM_INFINITY and locked < MINIMUM_LOCKED:
            fix = f"In a container: docker run --privileged --ulimit memlock={MINIMUM_LOCKED}:{MINIMUM_LOCKED} ..."
            checks.append(warning("locked memory", f"limit {_size(locked)}, libtpu may fail to start", fix))
    return checks


def check_memory(there: Accelerators) -> list[Check]:
    """Report the machine's memory, and check /dev/shm where NCCL needs it."""
    checks = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        available = kib["MemAvailable"] * 1024
        found = f"{_size(available)} of {_size(kib['MemTotal'] * 1024)} free"
        small = available < 2 * _GIB
        checks.append(warning("memory", found, "Even the demo needs 2 GB.") if small else ok("memory", found))
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").total
        if there.gpus and shared < MINIMUM_SHARED:
            fix = "In a container: docker run --shm-size=8g ... (NCCL passes data between GPUs there)"
            checks.append(warning("shared memory", f"/dev/shm has {_size(shared)}", fix))
    return checks


def check_folders(cache: str | None) -> list[Check]:
    """Check the folder for temporary files, libtpu's lock, and where compiled programs are kept.

    Args:
      cache: folder of jax's compilation cache, None where it is off or could not be made.
    """
    checks = []
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"pit_jax")
        free = shutil.disk_usage(tempfile.gettempdir()).free
        found = f"{tempfile.gettempdir()}, {_size(free)} free"
        full = free < _GIB
        checks.append(warning("temporary files", found, "Free some space.") if full else ok("temporary files", found))
    except OSError as error:
        checks.append(problem("temporary files", str(error), "Set TMPDIR to a folder that can be written."))
    if TPU_LOCK.exists() and not os.access(TPU_LOCK, os.W_OK):
        found = f"{TPU_LOCK} belongs to another user: jax will say that the TPU is already in use"
        checks.append(problem("TPU lock", found, f"sudo rm -f {TPU_LOCK}, once nobody else uses the TPU"))
    if cache is None:
        fix = "Name a folder: --compilation_cache=DIR, or make the user's cache directory writable (XDG_CACHE_HOME)."
        checks.append(warning("compilation cache", "off: every start compiles everything anew", fix))
    elif "://" not in cache and not os.access(cache, os.W_OK):
        checks.append(
            warning("compilation cache", f"{cache} cannot be written", "Name another: --compilation_cache=DIR")
        )
    else:
        checks.append(ok("compilation cache", cache))
    return checks


def check_encoding() -> Check:
    """Check that texts are read and printed as UTF-8."""
    names = {
        "files": locale.getpreferredencoding(False),
        "output": sys.stdout.encoding,
        "names": sys.getfilesystemencoding(),
    }
    other = {what: name for what, name in names.items() if name and name.lower().replace("-", "") != "utf8"}
    if not other:
        return ok("encoding", "UTF-8")
    found = ", ".join(f"{what}: {name}" for what, name in other.items())
    return warning("encoding", found, "export LC_ALL=C.UTF-8 (or PYTHONUTF8=1): other texts than ASCII will fail")


def _limit(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else str(value)


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"
