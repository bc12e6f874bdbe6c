"""Checkpoints: exact, atomic, pruned only when a newer one is good, and clear about what does not fit."""

from __future__ import annotations

import logging
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core.errors import CheckpointError
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.train import state as states
from pit_jax.train.optim import Optimizer, build

TRANSFORM = build(Optimizer(learning_rate=1e-3), 10)


def make_state(seed=0, width=6):
    kernel = jax.random.normal(jax.random.key(seed), (4, width))
    return states.create({"trunk": {"kernel": kernel, "half": kernel.astype(jnp.bfloat16)}}, TRANSFORM)


def shapes(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def data_files(path):
    return [file for file in pathlib.Path(path).glob("state/**/d/*") if file.is_file()]


def cut(path):
    """Cut every data file of a checkpoint in half, as a power failure might."""
    for file in data_files(path):
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_and_meta_come_back_bit_by_bit(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path, keep=None, asynchronous=asynchronous)
    state, meta = make_state(), {"source": {"next": 7}, "mean": 0.1 + 0.2}
    checkpoints.save(5, state, meta)
    got, got_meta = Checkpoints(tmp_path, keep=None).restore(checkpoints.latest(), shapes(state))
    assert_equal(got, state)
    assert got_meta == meta == checkpoints.meta(5)


def test_a_state_donated_right_after_an_asynchronous_save_is_saved_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=None)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    state = {"params": jnp.arange(1 << 20, dtype=jnp.float32)}
    expected = jax.device_get(state)
    for step in (1, 2, 3):
        state = jax.device_put(expected)
        state = jax.tree.map(jnp.copy, state)
        checkpoints.save(step, state, {})
        jax.block_until_ready(overwrite(state))
        assert_equal(
            checkpoints.restore(step, shapes(expected | {"params": jnp.asarray(expected["params"])}))[0], expected
        )


def test_only_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, make_state(), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 100]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_10", "checkpoint_100"]


def test_half_written_checkpoints_are_never_seen_and_can_be_removed(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=None)
    assert checkpoints.latest() is None and checkpoints.restore_latest(shapes(make_state())) is None
    checkpoints.save(5, make_state(), {})
    checkpoints.wait()
    (tmp_path / "checkpoint_6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint_7" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint_best").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == 5
    assert "checkpoint_7 is not complete" in caplog.text
    checkpoints.remove_leftovers()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_5", "checkpoint_7", "checkpoint_best"]
    checkpoints.save(7, make_state(1), {})
    assert checkpoints.latest() == 7


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=None)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()
    cut(checkpoints.path(2))
    with pytest.raises(CheckpointError, match="checkpoint_2 cannot be read"):
        checkpoints.restore(2, shapes(make_state()))
    with caplog.at_level(logging.WARNING):
        step, state, meta = checkpoints.restore_latest(shapes(make_state()))
    assert (step, meta) == (1, {"step": 1})
    assert checkpoints.latest() == 1
    assert "checkpoint_2 cannot be read" in caplog.text
    assert_equal(state, make_state(1))
    cut(checkpoints.path(1))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 1\] can be read"):
        checkpoints.restore_latest(shapes(make_state()))


def test_contents_that_are_spoilt_are_noticed_when_they_are_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=None)
    for step in (1, 2):
        checkpoints.save(step, {"params": jnp.arange(64.0) * step}, {})
    checkpoints.wait()
    for file in data_files(checkpoints.path(2)):
        file.write_bytes(bytes(file.stat().st_size))
    # In a process of its own: after a failed read Orbax's event loop prints errors at any later moment.
    code = (
        "import jax; from pit_jax.io.checkpoint import Checkpoints;"
        "shape = {'params': jax.ShapeDtypeStruct((64,), 'float32')};"
        f"step, state, _ = Checkpoints({str(tmp_path)!r}, keep=None).restore_latest(shape);"
        "print(step, float(state['params'].sum()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "2016.0"], done.stderr
    assert "checkpoint_2 cannot be read" in done.stderr


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_one_flipped_bit_is_noticed(tmp_path, caplog, place):
    checkpoints = Checkpoints(tmp_path, keep=None)
    for step in (1, 2):
        checkpoints.save(step, {"params": jax.random.normal(jax.random.key(step), (64, 64))}, {})
    checkpoints.wait()
    file = max(data_files(checkpoints.path(2)), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    abstract = {"params": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    with pytest.raises(CheckpointError, match="checkpoint_2 cannot be read: the values of params were changed"):
        checkpoints.restore_params(2, abstract["params"])
    step, _, _ = checkpoints.restore_latest(abstract)
    assert step == 1
    assert "checkpoint_2 cannot be read: the values of params were changed" in caplog.text


SPOIL = """
import logging, pathlib, sys
logging.disable(logging.CRITICAL)  # Orbax's event loop prints errors of failed reads at any later moment
import jax, jax.numpy as jnp, numpy as np
from pit_jax.io.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=None)
state = {"params": {"a": jax.random.normal(jax.random.key(0), (40, 40)), "b": jnp.arange(5)}}
shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
for step in (1, 2):
    checkpoints.save(step, state, {"step": step})
checkpoints.wait()
ways = {
    "half": lambda c: c[: len(c) // 2], "empty": lambda c: b"",
    "zeros": lambda c: bytes(len(c)), "gone": lambda c: None,
    "flip": lambda c: c[: len(c) // 2] + bytes([c[len(c) // 2] ^ 1]) + c[len(c) // 2 + 1 :],
}
tried = 0
files = pathlib.Path(checkpoints.path(2)).rglob("*")
for path in sorted(path for path in files if path.is_file() and path.stat().st_size):
    content = path.read_bytes()
    for way, spoil in ways.items():
        new = spoil(content)
        path.unlink() if new is None else path.write_bytes(new)
        step, got, meta = checkpoints.restore_latest(shapes)
        same = all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(state)))
        tried += 1
        if not same or meta != {"step": step}:
            print("WRONG", path, way, step, meta)
        path.write_bytes(content)
print("tried", tried, checkpoints.restore_latest(shapes)[0])
"""


def test_whichever_file_is_spoilt_in_whichever_way_what_is_restored_is_right(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SPOIL, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert re.fullmatch(r"tried [4-9]\d 2", done.stdout.strip()), done.stdout + done.stderr


def test_changed_metadata_are_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, {"params": jnp.ones(3)}, {"index": 31})
    checkpoints.wait()
    file = checkpoints.path(1) / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"index": 31', '"index": 13'))
    with pytest.raises(CheckpointError, match="its metadata were changed"):
        checkpoints.meta(1)


def test_what_the_caller_changes_after_a_save_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=None)
    meta = {"last": {"loss": 1.0}}
    checkpoints.save(1, make_state(), meta)
    meta["last"]["loss"] = 2.0
    assert checkpoints.latest() == 1 and checkpoints.meta(1) == {"last": {"loss": 1.0}}


def test_protected_checkpoints_stay_until_they_lose_that(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, protected in ((1, [1]), (2, [1]), (3, [1, 2]), (4, [3])):
        checkpoints.save(step, make_state(), {})
        checkpoints.protect(protected)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]


@pytest.mark.parametrize("case", ["shape", "missing", "extra", "dtype"])
def test_another_model_is_refused_naming_the_first_difference(tmp_path, case):
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, make_state(), {})
    wanted = shapes(make_state(width=8 if case == "shape" else 6))
    params = wanted.params["trunk"]
    if case == "missing":
        params["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    if case == "extra":
        del params["half"]
    if case == "dtype":
        params["half"] = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    message = {
        "shape": r"half has shape \(4, 6\), expected is \(4, 8\)",
        "missing": r"has no params/trunk/bias, which is expected with shape \(3,\)",
        "extra": r"holds params/trunk/half of shape \(4, 6\), which is not expected",
        "dtype": "params/trunk/half has dtype bfloat16, expected is float32",
    }[case]
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore_latest(wanted)


def test_parameters_alone_in_another_precision(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(3, make_state(), {})
    wanted = {"trunk": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)}}
    got = checkpoints.restore_params(3, wanted)
    assert_equal(got, {"trunk": {"kernel": make_state().params["trunk"]["kernel"].astype(jnp.bfloat16)}})
    with pytest.raises(CheckpointError, match=r"has no params/head, which is expected"):
        checkpoints.restore_params(3, {"head": jax.ShapeDtypeStruct((1,), jnp.float32)})
    with pytest.raises(CheckpointError, match=r"checkpoint_4 does not exist. There is: \[3\]"):
        checkpoints.restore_params(4, wanted)


def test_one_device_to_four_and_back(tmp_path):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("model"))
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    one, four = {"params": jnp.asarray(values)}, {"params": jax.device_put(values, split)}
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, one, {})
    checkpoints.save(2, four, {})
    got, _ = checkpoints.restore(1, shapes(four))
    assert got["params"].sharding == split
    assert_equal(got, jax.device_get(four))
    assert_equal(checkpoints.restore(2, shapes(one))[0], one)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    small = {"params": jnp.ones(8)}
    checkpoints.save(1, small, {"step": 1})
    checkpoints.wait()
    rng = np.random.default_rng(0)
    large = {"params": jnp.asarray(rng.normal(size=1 << 19), jnp.float32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))  # no file above half a megabyte
    try:
        with pytest.raises(
            CheckpointError, match=r"checkpoint_2 could not be written: .*File too large.*checkpoint_1 is intact"
        ):
            checkpoints.save(2, large, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["checkpoint_1"]
    step, state, meta = checkpoints.restore_latest(shapes(small))
    assert (step, meta) == (1, {"step": 1})
    assert_equal(state, small)
    checkpoints.save(2, large, {})
    assert checkpoints.latest() == 2


def test_a_step_is_not_written_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(1, make_state(), {})
    with pytest.raises(CheckpointError, match="checkpoint_1 exists already"):
        checkpoints.save(1, make_state(1), {})


def test_a_small_save_takes_a_fraction_of_a_second(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=False)
    state = make_state()
    seconds = []
    for step in range(4):
        begin = time.monotonic()
        checkpoints.save(step, state, {})
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 0.5


def test_a_relative_directory_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    Checkpoints("runs/a", keep=None, asynchronous=False).save(1, state, {"n": 1})
    monkeypatch.chdir(tmp_path / "runs")
    restored, meta = Checkpoints("a", keep=None).restore(1, jax.eval_shape(lambda: state))
    assert meta == {"n": 1}
    kernel = restored.params["trunk"]["kernel"]
    np.testing.assert_array_equal(kernel, state.params["trunk"]["kernel"])
