"""A data set that changes under a run is refused, from wherever it comes; one that only looks changed is not."""

from __future__ import annotations

import json
import os

import pytest

from pit_jax.core.errors import DataError
from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec, open_source, write_view_cache
from pit_jax.data.source import ShuffledSource
from pit_jax.data.stream import StreamBlocks
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

CODEC = Codec(ByteTokenizer(), Templates(), Lengths(inputs=32, targets=32))
KINDS = ("path", "generator", "cache", "stream")
CHANGES = ("nothing", "word", "order", "less", "more")


def rows(change):
    """Return records; every change is one for each of the folds that they are dealt out to."""
    made = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    more = [{"prompt": f"further {i}", "chosen": "good", "rejected": "bad"} for i in range(10)]
    changed = {
        "nothing": made,
        "word": [row | {"chosen": row["chosen"].replace("good", "well")} for row in made],
        "order": made[::-1],
        "less": made[:15],
        "more": made + more,
    }
    return changed[change]


def generated(change):
    yield from rows(change)


def opened(kind, directory, change):
    """Return a source of records as they are after a change, always described in the same way."""
    file = directory / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(change)))
    os.utime(file, (1, 1 + CHANGES.index(change)))  # a process keeps what it has read of a file that looks the same
    folds = Folds(validation_fraction=0.0)
    spec = DataSpec(path=str(file), folds=folds)
    if kind == "generator":
        spec = DataSpec(generator=generated, config=change, folds=folds)
    if kind == "cache":
        write_view_cache(spec, directory / "cache", view="evaluate", split="train", codec=CODEC, overwrite=True)
        spec = DataSpec(cache=str(directory / "cache"))
    if kind == "stream":
        every = open_source(spec, view="evaluate", split="train", codec=CODEC, seed=0)
        examples = every._provider.read(0, len(every))
        return ShuffledSource(StreamBlocks(lambda: iter(examples), keep=3), window=8, seed=0)
    return open_source(spec, view="evaluate", split="train", codec=CODEC, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES[1:])
def test_going_on_in_changed_data_is_refused(kind, change, tmp_path):
    source = opened(kind, tmp_path, "nothing")
    source.take(11)
    state = json.loads(json.dumps(source.state()))
    with pytest.raises(DataError, match=r"another stream of examples, with .*fingerprint"):
        opened(kind, tmp_path, change).restore(state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_data_written_anew_are_the_same(kind, tmp_path):
    source = opened(kind, tmp_path, "nothing")
    source.take(11)
    again = opened(kind, tmp_path, "nothing")
    os.utime(tmp_path / "mine.jsonl", (0, 0))
    again.restore(json.loads(json.dumps(source.state())))
    for left, right in zip(source.take(40), again.take(40), strict=True):
        assert {name: ids.tolist() for name, ids in left.items()} == {name: ids.tolist() for name, ids in right.items()}
