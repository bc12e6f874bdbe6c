"""Reading safetensors files that the library wrote, and refusing broken ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pit_jax.core.errors import CheckpointError, DataError, PitError
from pit_jax.io import safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((5, 3), np.float32)
    return {"a": matrix, "b": matrix.astype(jnp.bfloat16), "c": matrix[0].astype(np.float16), "d": np.ones(2, np.int64)}


def test_shapes_dtypes_and_values_are_the_librarys(tmp_path: Path) -> None:
    save_file(values(), tmp_path / SINGLE, metadata={"format": "pt"})
    stored = safetensors.open_directory(tmp_path)
    assert stored.keys() == values().keys()
    for name in "abc":
        expected = values()[name]
        assert (stored[name].shape, stored[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(stored[name].read(), expected)
        for rows in (slice(1, 3), slice(None), slice(2, 100), slice(3, 3)):
            np.testing.assert_array_equal(stored[name][rows], expected[rows])


def test_other_dtypes_are_listed_and_not_read(tmp_path: Path) -> None:
    save_file(values(), tmp_path / SINGLE)
    number = safetensors.open_directory(tmp_path)["d"]
    assert number.shape == (2,)
    with pytest.raises(CheckpointError, match=r"tensor d has dtype I64; F32, BF16, F16 can be read"):
        number.read()


def shards(directory: Path, places: dict[str, str]) -> None:
    save_file({"a": values()["a"]}, directory / "one.safetensors")
    save_file({"b": values()["b"]}, directory / "two.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    stored = safetensors.open_directory(tmp_path)
    np.testing.assert_array_equal(stored["b"][1:2], values()["b"][1:2])
    assert stored["b"].file.name == "two.safetensors"


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, r"lacks three.safetensors, which .* \(1 of 2 shards\)"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"one.safetensors lacks b, which"),
        ({"a": "../one.safetensors"}, r"names '../one.safetensors', which is not a file beside it"),
        ({"a": 3}, r"has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files(places: dict, message: str, tmp_path: Path) -> None:
    shards(tmp_path, places)
    with pytest.raises(PitError, match=message):
        safetensors.open_directory(tmp_path)


def test_an_index_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": ')
    with pytest.raises(DataError, match=r"index.json is not JSON"):
        safetensors.open_directory(tmp_path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    save_file(values(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in (0, 5, 8, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{SINGLE} is .*cut short"):
            safetensors.open_directory(tmp_path)


def header(text: str, tail: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + tail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("{not json}"), r"its header is not JSON"),
        (header("[1]"), r"its header is not a table"),
        (header('{"a": {"dtype": "F32", "shape": [2]}}'), r"entry of tensor a is not sound"),
        (header('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', bytes(8)), r"tensor a is not sound"),
        (header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', bytes(8)), r"cannot have 8 bytes"),
        (pickle.dumps({"a": 1}) + bytes(100), r"is not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        safetensors.open_directory(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("a pickle was opened",)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model.bin\).*safe_serialization=True"):
        safetensors.open_directory(tmp_path)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a directory"):
        safetensors.open_directory(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights.* It has config.json"):
        safetensors.open_directory(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds an adapter, not a model"):
        safetensors.open_directory(tmp_path)
