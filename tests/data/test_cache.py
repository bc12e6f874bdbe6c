"""The ArrayRecord cache: what goes in comes out, half a cache is refused, and no TensorFlow is needed."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pit_jax.core.errors import DataError
from pit_jax.data import cache

METADATA = cache.CacheMetadata(view="reward_bt", split="train", codec="c0dec", tokenizer="t0ken")


def _examples(count):
    rng = np.random.default_rng(0)
    for number in range(count):
        yield {
            "prompt": rng.integers(0, 2**31 - 1, size=number % 7).astype(np.int32),
            "chosen": np.arange(number + 1, dtype=np.int32),
            "id": f"réc-{number}",
        }


def _same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name])


_names = st.text(min_size=1, max_size=20)
_ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20)


@given(st.dictionaries(_names, st.one_of(_ids, st.text(st.characters(codec="utf-8"))), max_size=6))
def test_example_survives_packing(example):
    restored = cache.unpack_example(cache.pack_example(example))
    assert {k: v if isinstance(v, str) else v.tolist() for k, v in restored.items()} == example
    assert all(isinstance(v, str) or (v.dtype == np.int32 and v.flags.writeable) for v in restored.values())


@pytest.mark.parametrize("value", [np.zeros((2, 2), np.int32), np.ones(3, np.float32), 3])
def test_other_shapes_and_types_are_refused(value):
    with pytest.raises(DataError, match="'loss'"):
        cache.pack_example({"loss": value})


def test_write_then_read_in_any_order(tmp_path):
    dropped = Counter()

    def drawn():
        for number, example in enumerate(_examples(23)):
            dropped["identical"] += number % 2
            yield example

    done = cache.write_cache(
        drawn(),
        tmp_path / "c",
        cache.CacheMetadata(**(METADATA.__dict__ | {"dropped": dropped})),
        examples_per_shard=10,
    )
    assert (done.count, dict(done.dropped)) == (23, {"identical": 11})
    assert [count for _, count, _ in done.shards] == [10, 10, 3]
    examples = cache.open_cache(tmp_path / "c", view="reward_bt", split="train", codec="c0dec")
    expected = list(_examples(23))
    assert len(examples) == 23 and examples.metadata == done
    for index in (22, 0, 10, 9, -1):
        _same(examples[index], expected[index])
    for got, want in zip(examples[8:12], expected[8:12], strict=True):
        _same(got, want)
    with pytest.raises(IndexError):
        examples[23]


def test_nothing_is_left_when_writing_fails(tmp_path):
    def broken():
        yield from _examples(3)
        raise ValueError("the tokenizer broke")

    with pytest.raises(ValueError, match="broke"):
        cache.write_cache(broken(), tmp_path / "c", METADATA)
    assert not (tmp_path / "c").exists()
    cache.write_cache(_examples(4), tmp_path / "c", METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(DataError, match="exists already"):
        cache.write_cache(_examples(5), tmp_path / "c", METADATA)
    assert cache.write_cache(_examples(5), tmp_path / "c", METADATA, overwrite=True).count == 5


def test_empty_view_is_an_error_that_says_why(tmp_path):
    metadata = cache.CacheMetadata(**(METADATA.__dict__ | {"dropped": {"too_long": 7}}))
    with pytest.raises(DataError, match="too_long.*7"):
        cache.write_cache([], tmp_path / "c", metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "metadata.json").unlink(), "not written to the end"),
        (lambda d: (d / "metadata.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "examples-00001.array_record").unlink(), "is missing"),
        (lambda d: (d / "examples-00001.array_record").write_bytes(b"short"), "has 5 bytes"),
        (lambda d: _set_format(d, 99), "format 99"),
    ],
)
def test_damaged_cache_is_refused(tmp_path, damage, message):
    cache.write_cache(_examples(6), tmp_path / "c", METADATA, examples_per_shard=3)
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        cache.CachedExamples(tmp_path / "c")


def _set_format(directory, number):
    path = directory / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))


@pytest.mark.parametrize("other", [{"view": "rl"}, {"split": "validation"}, {"codec": "another"}])
def test_cache_of_something_else_is_refused(tmp_path, other):
    cache.write_cache(_examples(2), tmp_path / "c", METADATA)
    expected = {"view": "reward_bt", "split": "train", "codec": "c0dec"} | other
    (value,) = other.values()
    with pytest.raises(DataError, match=value):
        cache.open_cache(tmp_path / "c", **expected)


def test_missing_cache_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        cache.read_metadata(tmp_path / "nothing")


def test_reading_imports_neither_tensorflow_nor_seqio(tmp_path):
    cache.write_cache(_examples(3), tmp_path / "c", METADATA)
    program = (
        "import sys; from pit_jax.data.cache import CachedExamples\n"
        f"assert CachedExamples({str(tmp_path / 'c')!r})[1]['id'] == 'réc-1'\n"
        "print(sorted({'tensorflow', 'seqio', 'tensorflow_datasets', 'gin'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
