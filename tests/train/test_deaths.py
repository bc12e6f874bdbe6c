"""Deaths at chosen moments, and several processes: whatever happens, the end is that of a run in peace."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pit_jax.io.checkpoint import Checkpoints
from pit_jax.io.writers import read_metrics, without_timing

SCRIPT = pathlib.Path(__file__).with_name("toy_program.py")
MOMENTS = ["evaluation", "before name", "after name", "before sizes", "after sizes"]


def start(directory, *flags, count=1):
    """Start the toy as so many processes of one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPT), str(directory), "--count", str(count), "--port", str(port), *flags]
    return [
        subprocess.Popen([*command, "--process", str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(count)
    ]


def ends(processes, status=0):
    """Wait for processes to end with a status; return what they said."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(said)
    return said


def wait_for_lines(path, lines):
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (path.exists() and path.read_text().count("\n") >= lines):
        time.sleep(0.01)
    assert path.exists(), "the process wrote nothing"


def left_by(directory):
    """Return what two runs must have in common: records, `done.json` and what the last checkpoint is made of."""
    steps = sorted(int(path.name.rpartition("_")[2]) for path in directory.glob("checkpoint_*"))
    saved = json.loads((directory / f"checkpoint_{steps[-1]}" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    records = [without_timing(record) for record in read_metrics(directory / "metrics.jsonl")]
    return steps, records, json.loads((directory / "done.json").read_text()), saved["digests"], saved["meta"]


def assert_close(one, several):
    """Check that two lists of records are the same but for rounding."""
    assert [list(record) for record in one] == [list(record) for record in several]
    for left, right in zip(one, several, strict=True):
        numbers = [[v for v in record.values() if isinstance(v, int | float)] for record in (left, right)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    ends(start(directory, "--steps", "9"))
    return directory


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(tmp_path, alone, moment):
    ends(start(tmp_path, "--steps", "9", "--die", moment), -signal.SIGKILL)
    assert not (tmp_path / "done.json").exists()
    ends(start(tmp_path, "--steps", "9"))
    assert left_by(tmp_path) == left_by(alone)
    assert not list(tmp_path.glob("*tmp*"))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    directory = tmp_path_factory.mktemp("together")
    ends(start(directory, "--steps", "40", count=2))
    return directory


@pytest.mark.slow
def test_several_processes_train_what_one_does(tmp_path, together):
    ends(start(tmp_path, "--steps", "40"))
    _, one, *_ = left_by(tmp_path)
    _, several, *_ = left_by(together)
    assert_close(one, several)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_damage_is_met_by_all(tmp_path, together):
    # Slow steps: the first run must be under way for as long as two processes take to start on a busy machine.
    running = start(tmp_path, "--steps", "40", "--pause", "4.0", count=2)
    wait_for_lines(tmp_path / "metrics.jsonl", 2)
    refused = start(tmp_path, "--steps", "40", count=2)
    for said in ends(refused, 1):
        assert f"in use by process {running[0].pid}" in said
    running[1].send_signal(signal.SIGTERM)
    for said in ends(running, 143):
        assert "stopped by SIGTERM after step" in said and "run the same command again to continue" in said
    checkpoints = Checkpoints(tmp_path, keep=None)
    newest, before = checkpoints.steps()[-1], checkpoints.steps()[-2]
    for file in (tmp_path / f"checkpoint_{newest}").glob("state/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
    for said in ends(start(tmp_path, "--steps", "40", count=2)):
        assert f"checkpoint_{newest} cannot be read" in said and f"checkpoint_{before} cannot" not in said
    assert left_by(tmp_path) == left_by(together)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(tmp_path, together):
    running = start(tmp_path, "--steps", "40", "--pause", "0.2", count=2)
    wait_for_lines(tmp_path / "metrics.jsonl", 3)
    for process in running:
        process.kill()
    ends(running, -signal.SIGKILL)
    ends(start(tmp_path, "--steps", "40"))
    _, one, done, *_ = left_by(tmp_path)
    _, several, expected, *_ = left_by(together)
    assert_close(one, several)
    assert done["eval"]["norm"] == pytest.approx(expected["eval"]["norm"], rel=1e-6)
    assert np.isfinite(done["train"]["loss"])
