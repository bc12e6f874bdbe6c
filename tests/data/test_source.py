import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.data.source import ListBlocks, ShuffledSource, block_order


def examples(n):
    return [{"inputs": np.array([i], np.int32), "targets": np.array([i, 1], np.int32)} for i in range(n)]


def source(n, window, seed=0):
    return ShuffledSource(ListBlocks(examples(n)), window=window, seed=seed)


def numbers(taken):
    return [int(example["inputs"][0]) for example in taken]


sizes = st.integers(1, 17)
windows = st.integers(1, 20)


@settings(deadline=None, max_examples=60)
@given(n=sizes, window=windows, takes=st.lists(st.integers(0, 13), max_size=12))
def test_take_never_skips_or_repeats_over_epochs(n, window, takes):
    stream = source(n, window)
    taken = [number for count in takes for number in numbers(stream.take(count))]
    assert len(taken) == sum(takes)
    for start in range(0, len(taken), n):
        epoch = taken[start : start + n]
        assert len(set(epoch)) == len(epoch)
        if len(epoch) == n:
            assert set(epoch) == set(range(n))
    # The n-th example does not depend on how it was asked for.
    assert taken == numbers(source(n, window).take(len(taken)))


@settings(deadline=None, max_examples=60)
@given(n=sizes, window=windows, before=st.integers(0, 40), ahead=st.integers(0, 40), after=st.integers(0, 20))
def test_restore_at_any_position_gives_the_continuation(n, window, before, ahead, after):
    stream = source(n, window)
    stream.take(before)
    state = json.loads(json.dumps(stream.state()))
    expected = numbers(stream.take(after))
    stream.take(ahead)
    stream.restore(state)
    fresh = source(n, window)
    fresh.restore(state)
    assert numbers(stream.take(after)) == numbers(fresh.take(after)) == expected


@settings(deadline=None, max_examples=40)
@given(n=sizes, window=windows, taken=st.integers(0, 30), back=st.integers(0, 30))
def test_give_back_undoes_take(n, window, taken, back):
    stream = source(n, window)
    first = numbers(stream.take(taken))
    if back > taken:
        with pytest.raises(ValueError, match="cannot give back"):
            stream.give_back(back)
        return
    stream.give_back(back)
    assert numbers(stream.take(back)) == first[taken - back :]


def test_blocks_follow_each_other_and_are_shuffled_inside():
    order = numbers(source(100, 25).take(100))
    for start in range(0, 100, 25):
        block = order[start : start + 25]
        assert sorted(block) == list(range(start, start + 25))
        assert block != sorted(block)
    assert numbers(source(10, 1).take(20)) == [*range(10), *range(10)]


def test_epochs_blocks_and_seeds_are_shuffled_differently():
    two = numbers(source(50, 50).take(100))
    assert two[:50] != two[50:]
    assert numbers(source(50, 50, seed=1).take(50)) != two[:50]
    blocks = numbers(source(50, 25).take(50))
    assert [number - 25 for number in blocks[25:]] != blocks[:25]


def test_every_position_is_equally_likely():
    places = np.array([np.argsort(block_order(0, epoch, 0, 8)) for epoch in range(2000)])
    counts = np.array([np.bincount(column, minlength=8) for column in places.T])
    assert np.abs(counts - 250).max() < 5 * np.sqrt(250)


def test_order_is_pinned():
    # Saved positions of old runs mean something only as long as this holds.
    assert block_order(0, 0, 0, 8).tolist() == [6, 3, 7, 4, 0, 1, 2, 5]
    assert block_order(1, 2, 3, 8).tolist() == [7, 1, 4, 0, 2, 3, 6, 5]


@pytest.mark.parametrize(
    ("other", "name"),
    [(source(11, 4), "length"), (source(10, 5), "window"), (source(10, 4, seed=1), "seed")],
)
def test_positions_of_other_streams_are_refused_by_name(other, name):
    with pytest.raises(DataError, match=rf"with .*{name} \d+ \(here \d+\)"):
        source(10, 4).restore(other.state())


def test_positions_in_changed_data_are_refused():
    state = source(10, 4).state()
    changed = examples(10)
    changed[3]["targets"][0] = 99
    with pytest.raises(DataError, match="fingerprint"):
        ShuffledSource(ListBlocks(changed), window=4, seed=0).restore(state)
    for broken in ({"index": 10}, {"index": -1}, {"epoch": -1}):
        with pytest.raises(DataError, match="outside of"):
            source(10, 4).restore(state | broken)


def test_fingerprint_sees_values_names_order_and_borders():
    base = examples(3)
    variants = [
        base,
        base[::-1],
        base[:2],
        [{"inputs": e["inputs"], "labels": e["targets"]} for e in base],
        [{"inputs": np.concatenate([e["inputs"], e["targets"][:1]]), "targets": e["targets"][1:]} for e in base],
    ]
    assert len({ListBlocks(variant).fingerprint for variant in variants}) == len(variants)
    assert ListBlocks(examples(3)).fingerprint == ListBlocks(base).fingerprint


def test_empty_data_and_bad_windows_are_refused():
    with pytest.raises(DataError, match="no examples"):
        source(0, 4)
    with pytest.raises(ConfigError, match="window"):
        source(3, 0)


def test_data_that_shrink_while_read_are_refused():
    blocks = ListBlocks(examples(10))
    stream = ShuffledSource(blocks, window=4, seed=0)
    stream.take(4)
    blocks._examples = blocks._examples[:6]
    with pytest.raises(DataError, match="it has changed"):
        stream.take(4)


def test_going_back_over_the_end_of_a_block_reads_nothing_again():
    class Counting(ListBlocks):
        reads = []

        def read(self, start, stop):
            self.reads.append(start)
            return super().read(start, stop)

    provider = Counting(examples(12))
    stream = ShuffledSource(provider, window=4, seed=3)
    taken = []
    for _ in range(8):
        taken += stream.take(5)[:2]
        stream.give_back(3)
    assert numbers(taken) == numbers(source(12, 4, seed=3).take(16))
    assert provider.reads == [0, 4, 8, 0, 4]
