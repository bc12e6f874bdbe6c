"""The lock: one run a directory; what was left behind is taken over; no clock is trusted."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from pit_jax.core.errors import CheckpointError
from pit_jax.io import files
from pit_jax.io.lock import LOCK, Lock

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOLD = "import sys, time; from pit_jax.io.lock import Lock; Lock(sys.argv[1]).acquire(); print('held', flush=True)"


def quick(directory):
    return Lock(directory, beat=0.05, stale=0.5)


@contextlib.contextmanager
def held(directory):
    """Hold the lock inside of a `with`."""
    lock = Lock(directory)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD + "; time.sleep(60)", str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(directory):
    """Make a lock look as if another machine held it."""
    content = files.read_json(directory / LOCK) | {"host": "far", "boot": "another", "token": "another"}
    files.write_json(directory / LOCK, content)
    return content


def test_it_is_there_while_it_is_held_and_gone_afterwards(tmp_path):
    with held(tmp_path / "run"):
        content = files.read_json(tmp_path / "run" / LOCK)
        assert content["pid"] == os.getpid()
    assert os.listdir(tmp_path / "run") == []
    with held(tmp_path / "run"):
        pass


def test_a_second_run_is_refused_at_once_and_named(tmp_path, other):
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"in use by process {other.pid} on .*use another MODEL_DIR"):
        quick(tmp_path).acquire()
    assert time.monotonic() - begin < 0.5
    assert files.read_json(tmp_path / LOCK)["pid"] == other.pid


def test_a_lock_whose_process_was_killed_is_taken_over_at_once(tmp_path, other, caplog):
    other.send_signal(signal.SIGKILL)
    other.wait()
    begin = time.monotonic()
    lock = quick(tmp_path)
    lock.acquire()
    assert time.monotonic() - begin < 0.5
    assert f"left behind by process {other.pid}" in caplog.text
    lock.release()


def test_a_number_used_again_by_another_process_is_not_the_holder(tmp_path, other):
    content = files.read_json(tmp_path / LOCK)
    files.write_json(tmp_path / LOCK, content | {"started": str(int(content["started"]) - 1)})
    lock = quick(tmp_path)
    lock.acquire()
    assert files.read_json(tmp_path / LOCK)["pid"] == os.getpid()
    lock.release()


def test_on_another_machine_a_holder_that_beats_lives(tmp_path):
    with held(tmp_path):
        first = elsewhere(tmp_path)
    ended = threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.05):
            number += 1
            files.write_json(tmp_path / LOCK, first | {"beat": number})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="in use by process .* on far"):
            Lock(tmp_path, beat=0.05, stale=10.0).acquire()
    finally:
        ended.set()
        thread.join()


def test_on_another_machine_a_holder_that_is_silent_is_dead(tmp_path):
    with held(tmp_path):
        elsewhere(tmp_path)
    assert (tmp_path / LOCK).exists()  # it was no longer the own one, so it was left alone
    begin = time.monotonic()
    lock = quick(tmp_path)
    lock.acquire()
    assert 0.5 <= time.monotonic() - begin < 2.0
    lock.release()


def test_clocks_do_not_count(tmp_path, monkeypatch):
    ticks = iter(range(10**9, 0, -3600))  # an hour back at every look
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    with held(tmp_path):
        elsewhere(tmp_path)
        os.utime(tmp_path / LOCK, (0, 0))
    lock = quick(tmp_path)
    lock.acquire()
    assert files.read_json(tmp_path / LOCK)["host"] != "far"
    lock.release()


def test_a_holder_whose_lock_was_taken_finds_out_and_leaves_the_new_one_alone(tmp_path):
    lock = quick(tmp_path)
    lock.acquire()
    lock.check()
    taken = elsewhere(tmp_path)
    limit = time.monotonic() + 10
    with pytest.raises(CheckpointError, match="in use by process .* on far"):
        while time.monotonic() < limit:
            lock.check()
            time.sleep(0.01)
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text()) == taken


def test_two_that_start_at_the_same_moment_do_not_both_get_it(tmp_path):
    locks, errors = [quick(tmp_path) for _ in range(4)], []
    together = threading.Barrier(len(locks))

    def acquire(lock):
        together.wait()
        try:
            lock.acquire()
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=acquire, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(locks) - 1
    os.remove(tmp_path / LOCK)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/run cannot be written: .*use another MODEL_DIR"):
        Lock(tmp_path / "file" / "run").acquire()
