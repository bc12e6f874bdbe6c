"""Data opened from a description: files, generators and caches without TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.data.folds import Folds
from pit_jax.data.open import (
    DataSpec,
    open_examples,
    open_records,
    open_source,
    view_fingerprint,
    write_view_cache,
)
from pit_jax.data.readers import ReadConfig
from pit_jax.data.views import VIEWS
from pit_jax.io.serialize import from_json, to_json
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

CODEC = Codec(ByteTokenizer(), Templates(), Lengths(inputs=64, targets=32))
FOLDS = Folds(validation_fraction=0.2)


def rows(count=120):
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def numbered(config):
    yield from rows(config)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(file)


def prompts(spec, **where):
    return [record.prompt for record in open_records(spec, **where)]


def test_splits_and_folds_cut_the_records_into_disjoint_parts(path):
    spec = DataSpec(path=path, folds=FOLDS)
    parts = [prompts(spec, split="validation")] + [prompts(spec, split="train", fold=f) for f in ("sft", "rm", "rl")]
    assert all(parts)
    assert sorted(sum(parts, [])) == sorted(row["prompt"] for row in rows())
    assert prompts(spec, split="validation", fold="rl") == parts[0]


@pytest.mark.parametrize("view", VIEWS)
def test_file_and_generator_give_the_same_stream(path, view):
    specs = (
        DataSpec(path=path, folds=FOLDS, window=16),
        DataSpec(generator=numbered, config=120, folds=FOLDS, window=16),
    )
    left, right = (open_source(spec, view=view, split="train", codec=CODEC, seed=3) for spec in specs)
    assert left.fingerprint == right.fingerprint
    for one, other in zip(left.take(200), right.take(200), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_validation_file_takes_the_place_of_the_cut(path, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + "\n")
    spec = DataSpec(path=path, validation_path=str(held_out))
    assert prompts(spec, split="validation") == ["x"]
    assert len(prompts(spec, split="train")) == 120


def test_changed_file_is_read_again(path):
    spec = DataSpec(path=path)
    assert len(prompts(spec, split="train") + prompts(spec, split="validation")) == 120
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows(7)))
    assert len(prompts(spec, split="train") + prompts(spec, split="validation")) == 7


def test_spec_is_data(path):
    spec = DataSpec(generator="pit_jax.data.synthetic:generate", config={"a": 1}, folds=FOLDS)
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_generator_by_import_path():
    from pit_jax.data.synthetic import SyntheticConfig

    spec = DataSpec(generator="pit_jax.data.synthetic:generate", config=SyntheticConfig(num_records=40))
    found = open_examples(spec, view="evaluate", split="train", codec=CODEC, limit=5)
    assert len(found) == 5 and set(found[0]) == {"prompt", "chosen", "rejected"}


def test_texts_for_pre_training(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n\nanother text\n" * 3)
    spec = DataSpec(path=str(tmp_path / "*.txt"), folds=Folds(validation_fraction=0))
    examples = open_examples(spec, view="lm", split="train", codec=CODEC)
    assert len(examples) == 6 and CODEC.text(examples[1]["targets"].tolist()) == "another text"
    with pytest.raises(DataError, match="no example of the view 'lm'"):
        open_source(spec, view="lm", split="validation", codec=CODEC, seed=0)


@pytest.mark.parametrize("view", [*VIEWS, "records"])
def test_cache_gives_what_it_was_made_from(path, tmp_path, view):
    spec, cached = DataSpec(path=path, folds=FOLDS, window=16), DataSpec(cache=str(tmp_path / "cache"), window=16)
    write_view_cache(spec, tmp_path / "cache", view=view, split="train", codec=CODEC)
    if view == "records":
        assert list(open_records(cached, "train")) == list(open_records(spec, "train"))
        return
    left, right = (open_source(s, view=view, split="train", codec=CODEC, seed=1) for s in (spec, cached))
    left.take(17)
    state = json.loads(json.dumps(left.state()))
    right.restore(state)
    for one, other in zip(left.take(90), right.take(90), strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one | other)


def test_cache_of_another_codec_or_view_is_refused(path, tmp_path):
    spec = DataSpec(path=path)
    write_view_cache(spec, tmp_path / "cache", view="reward_bt", split="train", codec=CODEC)
    cached = DataSpec(cache=str(tmp_path / "cache"))
    other = Codec(ByteTokenizer(), Templates(), Lengths(inputs=32, targets=32))
    with pytest.raises(DataError, match="made for codec"):
        open_source(cached, view="reward_bt", split="train", codec=other, seed=0)
    with pytest.raises(DataError, match=r"has no rl/train. It holds reward_bt/train"):
        open_source(cached, view="rl", split="train", codec=CODEC, seed=0)
    with pytest.raises(DataError, match="no such directory"):
        open_source(DataSpec(cache="nowhere"), view="rl", split="train", codec=CODEC, seed=0)


def test_fingerprint_of_a_view_covers_what_its_examples_depend_on():
    gap, improver, policy = (
        Codec(ByteTokenizer(), Templates(**{kind: text}), CODEC.lengths)
        for kind, text in (("gap", "{prompt}{reference}"), ("improver", "{prompt}{reference}"), ("policy", "Q{prompt}"))
    )
    for view in VIEWS:
        plain = view_fingerprint(CODEC, view)
        assert view_fingerprint(gap, view) == plain
        assert (view_fingerprint(improver, view) == plain) == (view != "sft_improver")
        assert view_fingerprint(policy, view) != plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of"),
        ({"path": "a", "task": "b"}, "exactly one of"),
        ({"path": "a", "module": "tasks.mine"}, "DataSpec.module"),
        ({"task": "a", "validation_path": "b"}, "DataSpec.validation_path"),
        ({"path": "a", "config": 3}, "DataSpec.config"),
        ({"path": "a", "window": 0}, "DataSpec.window"),
        ({"path": "a", "document": "page"}, "DataSpec.document"),
    ],
)
def test_wrong_specs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataSpec(**fields)


@pytest.mark.parametrize("path", ["generate", "no.such:thing", "pit_jax.data.synthetic:genrate"])
def test_wrong_generators_are_refused(path):
    with pytest.raises(ConfigError, match="generat"):
        open_examples(DataSpec(generator=path), view="rl", split="train", codec=CODEC)


def test_bad_records_of_a_generator_are_named_or_left_out():
    def made():
        yield from rows(30)
        yield {"prompt": "p", "chosen": "c"}

    with pytest.raises(DataError, match="record 30 .*'rejected' is missing"):
        list(open_records(DataSpec(generator=made), "train"))
    spec = DataSpec(generator=made, read=ReadConfig(on_bad_record="skip"), folds=Folds(validation_fraction=0))
    assert len(list(open_records(spec, "train"))) == 30


def test_unknown_view_and_missing_file_are_errors(path):
    with pytest.raises(DataError, match="reward_gap"):
        open_examples(DataSpec(path=path), view="reward_gab", split="train", codec=CODEC)
    with pytest.raises(DataError, match="no such file"):
        open_examples(DataSpec(path="missing.jsonl"), view="rl", split="train", codec=CODEC)


def test_nothing_but_a_seqio_task_needs_tensorflow(path, tmp_path):
    write_view_cache(DataSpec(path=path), tmp_path / "cache", view="rl", split="train", codec=CODEC)
    program = f"""
import sys
from pit_jax.data.open import DataSpec, open_source
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer
codec = Codec(ByteTokenizer(), Templates(), Lengths(inputs=64, targets=32))
for spec in (DataSpec(path={path!r}), DataSpec(cache={str(tmp_path / "cache")!r})):
    assert len(open_source(spec, view="rl", split="train", codec=codec, seed=0).take(3)) == 3
print(sorted({{"tensorflow", "seqio", "tensorflow_datasets", "gin"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
