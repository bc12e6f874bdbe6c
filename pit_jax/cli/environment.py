"""What the command line sets up before jax and TensorFlow are imported: quiet logs and a compilation cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import time
import warnings
from pathlib import Path

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
