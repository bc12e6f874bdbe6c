import collections

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.core.types import Comparisons
from pit_jax.data.collate import all_batches, collator_for, comparison_passes, comparisons, layout_for, sft, take_batch
from pit_jax.data.pack import Packing
from pit_jax.data.schema import Record
from pit_jax.data.source import ListBlocks, ShuffledSource
from pit_jax.data.views import DropReport, make_examples
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

TEMPLATES = Templates(policy="Q{prompt}A", improver="Q{prompt}R{reference}I", gap="Q{prompt}R{reference}C")
CODEC = Codec(ByteTokenizer(), TEMPLATES, Lengths(inputs=10, targets=7))
PACKING = Packing(rows=5, inputs=40, targets=20, segments=4)
RNG = np.random.default_rng(0)


def word(length):
    return "".join(RNG.choice(list("abcdef"), length))


RECORDS = [
    Record(id=str(n), group=str(n), prompt=word(n % 8 + 1), chosen=word(n % 6 + 1), rejected="x" + word(n % 5 + 1))
    for n in range(23)
]


def examples(view):
    return list(make_examples(view, RECORDS, CODEC, DropReport()))


def text(ids):
    return CODEC.tokenizer.decode(ids)


def read_segment(batch, row, segment):
    """Return (prompt, reference, response) of one segment as texts, read out of the arrays alone."""
    in_prompt = batch.prompt_segments[row] == segment
    in_response = batch.response_segments[row] == segment
    marked = in_prompt & batch.prompt_reference[row]
    response = batch.response[row][in_response]
    assert response[-1] == 1
    return text(batch.prompt[row][in_prompt]), text(batch.prompt[row][marked]), text(response)


def segments(batch):
    return [
        read_segment(batch, row, segment)
        for row in range(len(batch.prompt))
        for segment in range(1, batch.response_segments[row].max() + 1)
    ]


@pytest.mark.parametrize("packing", [None, PACKING], ids=["unpacked", "packed"])
@pytest.mark.parametrize("view", ["sft_policy", "sft_improver"])
def test_every_example_is_in_the_batches_once_with_its_marks(view, packing):
    collator = collator_for(view, CODEC, batch_size=20, micro_batches=None, packing=packing)
    batches = list(all_batches(examples(view), collator))
    assert len({batch.prompt.shape for batch in batches}) == 1
    found = collections.Counter(found for batch in batches for found in segments(batch))
    expected = collections.Counter(
        (f"Q{r.prompt}A", "", r.chosen)
        if view == "sft_policy"
        else (f"Q{r.prompt}R{r.rejected}I", r.rejected, r.chosen)
        for r in RECORDS
    )
    assert found == expected
    if packing is None:
        assert [len(segments(batch)) for batch in batches] == [20, 3]


@pytest.mark.parametrize("packing", [None, PACKING], ids=["unpacked", "packed"])
@pytest.mark.parametrize("view", ["reward_bt", "reward_gap"])
def test_index_points_to_the_passes_of_each_record(view, packing):
    collator = collator_for(view, CODEC, batch_size=8, micro_batches=None, packing=packing)
    seen = []
    for batch in all_batches(examples(view), collator):
        m = collator.layout.segments
        for b in np.flatnonzero(batch.weight):
            where = [divmod(int(i), m) for i in batch.index[:, b]]
            passes = [read_segment(batch.inputs, row, segment + 1) for row, segment in where]
            assert batch.length[:, b].tolist() == [len(response) + 1 for _, _, response in passes]
            seen.append(passes)
    w, l, p = "chosen", "rejected", "prompt"  # noqa: E741
    assert len(seen) == len(RECORDS)
    for passes, r in zip(seen, map(vars, RECORDS), strict=True):
        if view == "reward_bt":
            assert passes == [(f"Q{r[p]}A", "", r[w]), (f"Q{r[p]}A", "", r[l])]
        else:
            # (candidate, reference) of wl, ww, ll, lw
            order = [(w, l), (w, w), (l, l), (l, w)]
            assert passes == [(f"Q{r[p]}R{r[ref]}C", r[ref], r[cand]) for cand, ref in order]


def test_filler_has_no_weight_and_no_tokens():
    batch = next(all_batches(examples("reward_gap")[:2], collator_for("reward_gap", CODEC, **UNPACKED)))
    assert batch.weight.tolist() == [1, 1, 0, 0]
    assert batch.inputs.prompt_segments[8:].max() == batch.inputs.response_segments[8:].max() == 0
    assert not batch.inputs.prompt_reference[8:].any()
    assert (batch.inputs.prompt[8:] == CODEC.pad_id).all()
    assert batch.index[:, 2:].max() == batch.length[:, 2:].max() == 0


UNPACKED = {"batch_size": 4, "micro_batches": None, "packing": None}


@pytest.mark.parametrize("view", ["sft_improver", "reward_gap"])
@pytest.mark.parametrize("packing", [None, PACKING], ids=["unpacked", "packed"])
def test_stream_position_is_exact_and_shapes_never_change(view, packing):
    data = examples(view)
    stream = ShuffledSource(ListBlocks(data), window=10, seed=1)
    collator = collator_for(view, CODEC, batch_size=12, micro_batches=2, packing=packing)
    batches, states = [], []
    for _ in range(7):
        states.append(stream.state())
        batches.append(take_batch(stream, collator))
    shapes = {tuple(leaf.shape for leaf in leaves(batch)) for batch in batches}
    assert len(shapes) == 1
    # All batches together are the stream, without gaps: as many passes of each kind as the examples taken give.
    taken = stream.state()["epoch"] * len(data) + stream.state()["index"]
    again = ShuffledSource(ListBlocks(data), window=10, seed=1).take(taken)
    expected = collections.Counter(part for example in again for part in pass_texts(example, view))
    found = collections.Counter(
        part for batch in batches for half in (0, 1) for part in segments(micro(inputs_of(batch), half))
    )
    assert found == expected
    if packing is None:
        assert taken == 7 * 12
    # A restart at any batch gives the same batch.
    for state, batch in zip(states, batches, strict=True):
        stream.restore(state)
        for left, right in zip(leaves(batch), leaves(take_batch(stream, collator)), strict=True):
            np.testing.assert_array_equal(left, right)


def leaves(batch):
    if isinstance(batch, Comparisons):
        return [*leaves(batch.inputs), batch.index, batch.weight, batch.length]
    return [leaf for leaf in vars(batch).values() if leaf is not None]


def inputs_of(batch):
    return batch.inputs if isinstance(batch, Comparisons) else batch


def micro(batch, a):
    return type(batch)(**{name: array[a] for name, array in vars(batch).items() if array is not None})


def pass_texts(example, view):
    if view == "reward_gap":
        passes = comparison_passes(example, CODEC, view)
        return [(text(p.prompt.ids), text(p.prompt.ids[slice(*p.prompt.reference)]), text(p.response)) for p in passes]
    reference = example["inputs"][slice(*example["reference"])]
    return [(text(example["inputs"]), text(reference), text(example["targets"]))]


def test_micro_batches_are_the_parts_of_the_whole():
    data = examples("sft_policy")[:8]
    whole = sft(data, layout_for("sft_policy", CODEC, batch_size=8, micro_batches=None, packing=None))
    parts = sft(data, layout_for("sft_policy", CODEC, batch_size=8, micro_batches=4, packing=None))
    for left, right in zip(leaves(whole), leaves(parts), strict=True):
        assert right.shape[:2] == (4, 2)
        np.testing.assert_array_equal(left, right.reshape(left.shape))


def test_comparisons_of_micro_batches_index_their_own_rows():
    layout = layout_for("reward_bt", CODEC, batch_size=6, micro_batches=3, packing=None)
    batch = comparisons(examples("reward_bt")[:6], CODEC, layout, "reward_bt")
    np.testing.assert_array_equal(batch.index, np.broadcast_to([[0, 2], [1, 3]], (3, 2, 2)))
    assert batch.weight.dtype == np.float32
    assert batch.index.dtype == batch.length.dtype == np.int32


def test_packing_needs_fewer_rows():
    data = examples("reward_gap")
    collator = collator_for("reward_gap", CODEC, batch_size=23, micro_batches=None, packing=PACKING)
    rows = sum(PACKING.rows for _ in all_batches(data, collator))
    assert rows < 4 * len(data) / 1.5


def test_a_batch_without_a_trained_token_is_an_error():
    layout = layout_for("sft_policy", CODEC, **UNPACKED)
    with pytest.raises(DataError, match="no token to train on"):
        sft([], layout)
    empty = {"inputs": np.array([5], np.int32), "targets": np.array([], np.int32)}
    with pytest.raises(DataError, match="no token to train on"):
        sft([empty], layout)


def test_examples_that_do_not_fit_are_an_error():
    layout = layout_for("sft_policy", CODEC, **UNPACKED)
    with pytest.raises(DataError, match="Only 4 of 5 examples fit"):
        sft(examples("sft_policy")[:5], layout)
    with pytest.raises(DataError, match="made for other lengths"):
        sft([{"inputs": np.ones(11, np.int32), "targets": np.ones(2, np.int32)}], layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "micro_batches": 2}, "batch_size = 5 must be a positive multiple of the 2 micro-batches"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"micro_batches": 0}, "micro_batches = 0"),
        ({"packing": Packing(rows=4, inputs=16, targets=20, segments=4)}, r"Packing\.inputs = 16 must be at least 17"),
        ({"packing": Packing(rows=4, inputs=40, targets=6, segments=4)}, r"Packing\.targets = 6 must be at least 7"),
        ({"packing": Packing(rows=3, inputs=40, targets=7, segments=1)}, "room for the 4 passes"),
    ],
)
def test_layouts_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        layout_for("reward_gap", CODEC, **(UNPACKED | settings))
