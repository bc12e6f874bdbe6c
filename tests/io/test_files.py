"""Small files: written whole or not at all, and read with errors that say where the fault is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pit_jax.core.errors import CheckpointError, DataError
from pit_jax.io import files


def test_json_comes_back_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "data.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"b": [0.1, None, "é"]})
    assert files.read_json(path) == {"b": [0.1, None, "é"]}
    assert os.listdir(path.parent) == ["data.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    files.write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["data.json"]


@pytest.mark.parametrize(
    ("content", "named"),
    [(b'{"a": 1,\n "b" 2}', "line 2, column 6"), (b"\xff\xfe", r"not UTF-8 \(byte 0\)"), (b"", "line 1, column 1")],
)
def test_a_file_that_is_not_json_is_named_with_the_place(tmp_path, content, named):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(DataError, match=named):
        files.read_json(tmp_path / "bad.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        files.read_json(tmp_path / "gone.json")


def test_the_hash_of_json_does_not_depend_on_the_order_of_keys():
    assert files.json_hash({"a": 1, "b": 2}) == files.json_hash({"b": 2, "a": 1})
    assert files.json_hash({"a": 1}) != files.json_hash({"a": 2})


def test_a_disk_without_room_is_refused_beforehand(tmp_path):
    files.require_free(tmp_path / "not" / "there", 1)
    with pytest.raises(CheckpointError, match=r"MB free and 1000000000000\.0 MB are needed"):
        files.require_free(tmp_path, 10**18)


def test_paths_behind_a_scheme_are_not_local(tmp_path):
    assert files.is_local(tmp_path) and not files.is_local("gs://bucket/run")
    assert files.free_bytes("gs://bucket/run") is None


@pytest.mark.parametrize("module", ["files", "writers", "progress"])
def test_import_needs_neither_jax_nor_anything_heavy(module):
    heavy = ["jax", "flax", "orbax", "tensorflow", "tensorboardX", "rich", "wandb", "numpy"]
    code = f"import sys, json, pit_jax.io.{module}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == []
