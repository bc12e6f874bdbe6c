"""Test set-up: four fake CPU devices, strict JAX, warnings as errors, and a compilation cache between runs."""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Fake devices share few cores. XLA ends the process when one of them is 40 s late, as on a machine that swaps.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        "--xla_cpu_collective_timeout_seconds=300",
    ]
).strip()

import jax
import pytest
from jaxtyping import install_import_hook

# Shells start background processes, and so some CI runs, with Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Nearly every program of the tests runs once or twice: what a compiler's optimisations cost is never earned back.
jax.config.update("jax_disable_most_optimizations", True)
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pit_jax" / "test-compilations"
# Each process of pytest-xdist has a cache of its own: one may read an entry that the other has not finished.
CACHE /= os.environ.get("PYTEST_XDIST_WORKER", "alone")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Shapes and dtypes of the mathematics are checked at every call; elsewhere annotations also name protocols, configs and
# placeholders (trees of shapes or shardings), which a run-time check would refuse.
install_import_hook(["pit_jax.ops", "pit_jax.losses"], "beartype.beartype")

STATUS = pathlib.Path("/proc/self/statm")
MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 20_000
MOST_MEMORY = 2 << 30
"""Bytes; two processes of tests should run beside each other on a machine of 8 GiB."""

MARKS = {
    "slow": "takes minutes; run with `-m slow`",
    "parity": "needs other software (torch, transformers, ...); run with `-m parity`",
    "browser": "needs a browser and playwright; run with `-m browser`",
}
# Third-party code that warns on import or in its own internals; a warning caused by pit_jax stays an error.
IGNORED_WARNINGS = (
    "ignore::DeprecationWarning",
    "error::DeprecationWarning:pit_jax",
    "ignore::PendingDeprecationWarning",
    "ignore::FutureWarning:tensorflow",
    "ignore::ResourceWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks and turn warnings into errors."""
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    config.addinivalue_line("filterwarnings", "error")
    for line in IGNORED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forget compiled programs between files before they use up memory, or the mappings that a process may have.

    Every program on a CPU is mapped memory; at Linux's limit of 65,530 mappings the next one ends the process.
    """
    if nextitem is None or nextitem.path == item.path or not MAPPINGS.exists():
        return
    resident = int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MOST_MEMORY or len(MAPPINGS.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow, parity and browser tests unless `-m` says what is wanted."""
    if config.getoption("-m"):
        return
    left_out = [item for item in items if any(mark in item.keywords for mark in MARKS)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
