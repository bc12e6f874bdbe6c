import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.data.pack import Layout, Packing, Size, plan

LAYOUT = Layout(micro_batches=2, rows=3, inputs=10, targets=8, segments=3, records=4, pad_id=0)

size = st.builds(Size, st.integers(0, 10), st.integers(1, 8))
records = st.lists(st.lists(size, min_size=1, max_size=2), max_size=14)


@settings(max_examples=200, deadline=None)
@given(records)
def test_places_stay_inside_rows_and_never_overlap(records):
    places = plan(records, LAYOUT)
    cells = set()
    for record, where in zip(records, places, strict=False):
        assert len(where) == len(record)
        assert len({place.micro_batch for place in where}) == 1
        for tokens, place in zip(record, where, strict=True):
            assert 1 <= place.segment <= LAYOUT.segments
            assert place.inputs_at + tokens.inputs <= LAYOUT.inputs
            assert place.targets_at + tokens.targets <= LAYOUT.targets
            row = (place.micro_batch, place.row)
            taken = {(row, "inputs", place.inputs_at + n) for n in range(tokens.inputs)}
            taken |= {(row, "targets", place.targets_at + n) for n in range(tokens.targets)}
            taken.add((row, "segment", place.segment))
            assert not taken & cells
            cells |= taken
    for a in range(2):
        assert sum(where[0].micro_batch == a for where in places) <= LAYOUT.records


@settings(max_examples=100, deadline=None)
@given(records, records)
def test_what_follows_does_not_change_where_records_go(first, more):
    places = plan(first, LAYOUT)
    longer = plan(first + more, LAYOUT)
    assert longer[: len(places)] == places
    assert len(longer) == len(places) or len(places) == len(first)


def test_first_row_with_room_is_taken():
    sizes = [[Size(6, 3)], [Size(6, 3)], [Size(4, 3)], [Size(4, 3)], [Size(1, 3)]]
    layout = dataclasses.replace(LAYOUT, micro_batches=None, rows=2, records=9)
    assert [(p.row, p.segment, p.inputs_at, p.targets_at) for (p,) in plan(sizes, layout)] == [
        (0, 1, 0, 0),
        (1, 1, 0, 0),
        (0, 2, 6, 3),
        (1, 2, 6, 3),
    ]


def test_unpacked_rows_hold_one_example_each_in_order():
    layout = Layout(micro_batches=2, rows=6, inputs=5, targets=5, segments=1, records=3, pad_id=0)
    places = plan([[Size(1, 1), Size(2, 2)]] * 9, layout)
    assert [[place.row for place in where] for where in places] == [[0, 1], [2, 3], [4, 5]] * 2
    assert [where[0].micro_batch for where in places] == [0] * 3 + [1] * 3


def test_what_can_never_fit_is_an_error():
    with pytest.raises(DataError, match=r"Example 1 .*11 \+ 1 tokens, more than a row's 10 \+ 8"):
        plan([[Size(1, 1)], [Size(11, 1)]], LAYOUT)
    with pytest.raises(DataError, match="no token to train on"):
        plan([[Size(1, 0)]], LAYOUT)
    with pytest.raises(DataError, match="One record takes 4 examples"):
        plan([[Size(10, 8)] * 4], LAYOUT)


def test_packing_settings_are_checked():
    with pytest.raises(ConfigError, match=r"Packing\.segments = 0"):
        Packing(rows=1, inputs=1, targets=1, segments=0)
