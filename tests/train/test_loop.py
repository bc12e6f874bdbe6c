"""The loop: a run that is stopped in any way and started again is the run that was never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pit_jax.core.errors import CheckpointError, ConfigError, TrainingError
from pit_jax.io.writers import read_metrics, without_timing
from pit_jax.train.loop import Interrupted, Loop, RunFiles, finished, fit
from pit_jax.train.stopping import EXIT_SIGINT, EXIT_SIGTERM

SCRIPT = pathlib.Path(__file__).with_name("toy_program.py")
_spec = importlib.util.spec_from_file_location("toy_program", SCRIPT)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

LOOP = Loop(steps=12, log_every=4, eval_every=5, checkpoint_every=3)


def run_files(directory):
    return RunFiles(directory=directory, name="toy", tensorboard=False)


def train(directory, *, loop=LOOP, **settings):
    program = toy.Toy(loop.steps, **settings)
    return fit(program, toy.start(loop.steps), loop, run_files(directory)), program


def records(directory):
    return [without_timing(record) for record in read_metrics(pathlib.Path(directory) / "metrics.jsonl")]


def assert_same_run(one, two):
    assert records(one) == records(two)
    assert finished(one) == finished(two)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An uninterrupted run: its directory and final state."""
    directory = tmp_path_factory.mktemp("plain")
    return directory, train(directory)[0]


def test_a_run_leaves_its_records_checkpoints_and_mark(plain):
    directory, state = plain
    assert [(r["step"], r["kind"]) for r in records(directory)] == [
        (4, "train"), (5, "eval"), (8, "train"), (10, "eval"), (12, "train"), (12, "eval"),
    ]  # fmt: skip
    assert sorted(os.listdir(directory)) == ["checkpoint_12", "checkpoint_9", "done.json", "metrics.jsonl"]
    assert int(state.step) == 12
    done = finished(directory)
    assert done["step"] == 12 and done["eval"]["undefined"] is None
    assert done["train"] == {k: v for k, v in records(directory)[-2].items() if k not in ("step", "kind")}


def test_records_average_over_the_steps_since_the_last(plain):
    directory, _ = plain
    every = Loop(steps=12, log_every=1)
    train(directory / "single", loop=every)
    single = [r["loss"] for r in records(directory / "single") if r["kind"] == "train"]
    windows = [r["loss"] for r in records(directory) if r["kind"] == "train"]
    np.testing.assert_allclose(windows, np.reshape(single, (3, 4)).mean(axis=1), rtol=1e-12)


def test_timing_is_kept_apart(plain):
    record = read_metrics(plain[0] / "metrics.jsonl")[0]
    assert record["timing/tokens_per_second"] > 0 and record["timing/steps_per_second"] > 0
    assert record["tokens"] == 4.0  # a micro-batch of four rows
    assert 0 < record["timing/data_share"] < 1
    assert record["timing/data_seconds"] + record["timing/update_seconds"] < record["timing/seconds"]


def test_the_time_to_the_first_step_and_of_compiling_is_in_the_first_record(plain, tmp_path):
    first, *others = (r for r in read_metrics(plain[0] / "metrics.jsonl") if r["kind"] == "train")
    assert 0 < first["timing/compile_seconds"] < first["timing/first_step_seconds"] < first["timing/seconds"]
    assert not any("timing/first_step_seconds" in record for record in others)
    began = time.monotonic() - 1000
    run = RunFiles(directory=tmp_path, name="toy", tensorboard=False, began=began)
    fit(toy.Toy(2), toy.start(2), Loop(steps=2), run)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["timing/first_step_seconds"] > 1000


def test_evaluation_and_saving_belong_to_no_phase(tmp_path):
    class Slow(toy.Toy):
        def evaluate(self, state):
            time.sleep(0.5)
            return super().evaluate(state)

    fit(Slow(4), toy.start(4), Loop(steps=4, log_every=4, eval_every=1), run_files(tmp_path))
    record = next(r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train")
    assert 4 * record["timing/update_seconds"] <= record["timing/seconds"] - 3 * 0.5


def test_a_complete_run_is_only_loaded(plain):
    directory, state = plain
    before = {path: path.stat().st_mtime_ns for path in directory.glob("checkpoint_*")}
    again, program = train(directory)
    assert_equal(again, state)
    assert program.evaluated == []
    assert before == {path: path.stat().st_mtime_ns for path in directory.glob("checkpoint_*")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 3, 4, 8])  # with nothing, a record, an evaluation, a checkpoint due
def test_a_signal_saves_and_the_next_run_continues_exactly(tmp_path, plain, number, step):
    def strike(done):
        if done == step:
            signal.raise_signal(number)

    old = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=rf"after step {step + 1} of 12. .*checkpoint_{step + 1} is complete"
    ) as caught:
        train(tmp_path, on_step=strike)
    assert caught.value.exit_status == {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}[number]
    assert signal.getsignal(number) is old
    assert finished(tmp_path) is None
    state, _ = train(tmp_path)
    assert_equal(state, plain[1])
    assert_same_run(tmp_path, plain[0])


def test_records_owed_at_a_stop_are_written_once_even_if_the_next_run_dies_after_them(tmp_path, plain):
    def strike(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    def fail(step):
        if step == 4:
            raise RuntimeError("out of luck")

    with pytest.raises(Interrupted):
        train(tmp_path, on_step=strike)
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, on_step=fail)
    assert [r["step"] for r in records(tmp_path)] == [4]
    train(tmp_path)
    assert_same_run(tmp_path, plain[0])


def test_a_signal_in_the_last_step_stops_after_the_run_is_finished(tmp_path, plain):
    with pytest.raises(Interrupted, match=r"after step 12 of 12. .*checkpoint_12 is complete") as caught:
        train(tmp_path, on_step=lambda step: signal.raise_signal(signal.SIGTERM) if step == 11 else None)
    assert caught.value.exit_status == EXIT_SIGTERM  # what comes after this run is not to begin
    assert_same_run(tmp_path, plain[0])
    state, _ = train(tmp_path)
    assert_equal(state, plain[1])


def test_a_second_ctrl_c_stops_at_once(tmp_path, plain):
    def strike(step):
        if step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step=strike)
    train(tmp_path)
    assert_same_run(tmp_path, plain[0])


def test_an_error_in_the_program_loses_nothing_before_the_last_checkpoint(tmp_path, plain):
    def fail(step):
        if step == 7:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, on_step=fail)
    state, program = train(tmp_path)
    assert program.next == 3 * 12 and program.evaluated == [10, 12]  # 5 was before the checkpoint at 6
    assert_equal(state, plain[1])
    assert_same_run(tmp_path, plain[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(tmp_path, plain):
    with pytest.raises(TrainingError, match=r"loss of step 8 is not finite \(loss = nan.*checkpoint_6 is good"):
        train(tmp_path, poison=7)
    assert finished(tmp_path) is None
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == ["checkpoint_3", "checkpoint_6"]
    state, _ = train(tmp_path)  # the data were mended
    assert_equal(state, plain[1])
    assert_same_run(tmp_path, plain[0])


def test_evaluation_at_the_start_is_a_record_of_step_zero(tmp_path):
    train(tmp_path, loop=Loop(steps=2, log_every=1, eval_at_start=True))
    assert [(r["step"], r["kind"]) for r in records(tmp_path)] == [
        (0, "eval"), (1, "train"), (2, "train"), (2, "eval")
    ]  # fmt: skip


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path):
    train(tmp_path, loop=Loop(steps=2, log_every=1))
    state, _ = train(tmp_path, loop=Loop(steps=3, log_every=1))
    assert int(state.step) == 3 and finished(tmp_path)["step"] == 3
    with pytest.raises(ConfigError, match=r"Loop.steps = 2 must be at least 3"):
        train(tmp_path, loop=Loop(steps=2, log_every=1))


def test_a_checkpoint_of_another_model_is_refused_and_kept(plain):
    directory, _ = plain
    before = (directory / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"has shape \(5, 6\), expected is \(5, 7\)"):
        fit(toy.Toy(12), toy.start(12, width=7), LOOP, run_files(directory))
    assert (directory / "metrics.jsonl").read_text() == before and finished(directory) is not None


def test_a_run_goes_on_with_other_numbers_of_devices(tmp_path):
    def train_on(directory, devices, on_step=None):
        placement = toy.places(LOOP.steps, 8, devices)
        program = toy.Toy(LOOP.steps, on_step=on_step, placement=placement)
        state = fit(program, toy.start(LOOP.steps, 8, placement), LOOP, run_files(directory))
        assert jax.tree.leaves(state.params)[0].sharding.num_devices == devices
        return state

    def strike(moment):
        return lambda step: signal.raise_signal(signal.SIGTERM) if step == moment else None

    expected = train_on(tmp_path / "four", 4)
    for devices, moment in ((4, 3), (1, 6), (2, 9)):
        with pytest.raises(Interrupted):
            train_on(tmp_path / "any", devices, strike(moment))
    got = train_on(tmp_path / "any", 4)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    losses = [[record.get("loss") for record in records(tmp_path / run)] for run in ("any", "four")]
    assert losses[0] == [loss and pytest.approx(loss, rel=1e-5) for loss in losses[1]]


@pytest.mark.parametrize("field", ["steps", "log_every", "eval_every", "checkpoint_every", "keep"])
def test_bad_settings_are_named(field):
    with pytest.raises(ConfigError, match=rf"Loop.{field} = -1 must be at least"):
        Loop(**({"steps": 5} | {field: -1}))


def process(directory, pause=0.0):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPT), str(directory), "--pause", str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_line(path, lines):
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (path.exists() and path.read_text().count("\n") >= lines):
        time.sleep(0.01)
    assert path.exists(), "the process wrote nothing"


def test_kill_nine_at_random_moments_changes_neither_parameters_nor_metrics(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = process(whole)
    moments = random.Random(int.from_bytes(os.urandom(4), "little"))
    said = []
    for lines in (2, 6, 10):
        child = process(killed, pause=0.03)
        wait_for_line(killed / "metrics.jsonl", lines)
        delay = moments.uniform(0.0, 0.3)  # within and between steps, saves and evaluations
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        said.append((lines, delay, child.wait()))
        child.stderr.close()
    last = process(killed)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    _, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0, errors
    assert records(whole) == records(killed), said
    assert json.loads((whole / "done.json").read_text()) == json.loads((killed / "done.json").read_text())
    with np.load(whole / "final.npz") as left, np.load(killed / "final.npz") as right:
        assert left.files == right.files
        for name in left.files:
            np.testing.assert_array_equal(left[name], right[name])


def test_a_process_stopped_by_sigterm_says_how_to_continue(tmp_path):
    child = process(tmp_path, pause=0.05)
    wait_for_line(tmp_path / "metrics.jsonl", 2)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == EXIT_SIGTERM
    assert "run the same command again to continue" in errors
    assert list(tmp_path.glob("checkpoint_*"))
