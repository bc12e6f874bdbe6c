"""What the command line sets up before jax and TensorFlow are imported: quiet logs and a compilation cache."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pit_jax.sharding.processes import Cluster

# Programs below this many seconds of compilation are not worth a file.
MIN_COMPILE_SECONDS = "0.5"
# jax neither limits the folder nor replaces an entry that a killed run left half written.
KEEP_SECONDS = 30 * 24 * 3600


def set_up_logging() -> None:
    """Show what pit_jax has to say and silence the libraries' chatter; the user's own environment wins."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("ABSL_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for every new attempt at a download
    ours = logging.getLogger("pit_jax")
    if not ours.handlers:
        ours.addHandler(_Stderr())
        ours.setLevel(logging.INFO)
        ours.propagate = False


def leave_absent_tpus_alone() -> None:
    """Keep jax from looking for a TPU at every start where only the compiler for it is there; JAX_PLATFORMS wins."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    if "JAX_PLATFORMS" in os.environ or find_spec("libtpu") is None or any(map(find_spec, plugins)):
        return
    if not Path("/dev/accel0").exists() and not any(Path("/dev/vfio").glob("[0-9]*")):
        os.environ["JAX_PLATFORMS"] = "cpu"


def cluster(args: argparse.Namespace) -> Cluster | None:
    """Return which processes run together with this one, from the flags of `arguments` and the environment.

    Raises:
      ConfigError: what they say is wrong or incomplete.
    """
    from pit_jax.sharding import processes  # imports jax

    settings = processes.Cluster(
        coordinator=args.coordinator_address,
        count=args.process_count,
        process=args.process_id,
        silence=args.process_timeout,
    )
    return processes.cluster(settings, os.environ)


def speak_as(process: int) -> None:
    """Leave talking to process 0: the others say only what is wrong, with their number before it."""
    if process == 0:
        return
    ours = logging.getLogger("pit_jax")
    ours.setLevel(logging.WARNING)
    for handler in ours.handlers:
        handler.setFormatter(logging.Formatter(f"process {process}: %(message)s"))


class _Stderr(logging.Handler):
    """Writes plain lines to what is the standard error at that moment: progress bars redirect it to stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def use_compilation_cache(choice: str) -> None:
    """Keep compiled programs between runs.

    Compiled code is tied to the processor, so machines that share a home directory get a folder each. jax's
    own settings (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`) win, and where the folder
    cannot be written the run goes on without.

    Args:
      choice: "auto" (below the user's cache directory), "off", or a directory.
    """
    if choice == "off":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if choice == "auto":
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pit_jax"
    else:
        base = Path(choice)
    directory = base / f"xla-{_processor()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _forget_old(directory)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", MIN_COMPILE_SECONDS)
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _forget_old(directory: Path) -> None:
    for entry in directory.iterdir():
        if time.time() - entry.stat().st_mtime > KEEP_SECONDS:
            entry.unlink(missing_ok=True)


def _processor() -> str:
    """Return a short name of this machine's processor and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))} or lines[:1])
    digest = hashlib.blake2s("\n".join(features).encode(), digest_size=4).hexdigest()
    return f"{platform.machine()}-{digest}"
