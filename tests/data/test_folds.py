import collections
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError
from pit_jax.data.folds import FOLDS, Folds

GROUPS = [f"group {n}" for n in range(6000)]


def test_proportions_hold():
    folds = Folds(validation_fraction=0.2, salt="s")
    train = [group for group in GROUPS if folds.split(group) == "train"]
    n = len(GROUPS)
    assert abs(n - len(train) - 0.2 * n) < 4 * math.sqrt(n * 0.2 * 0.8)
    counts = collections.Counter(folds.fold(group) for group in train)
    for fold in FOLDS:
        assert abs(counts[fold] - len(train) / 3) < 4 * math.sqrt(len(train) * 2 / 9)


@given(st.text(), st.text(), st.floats(0, 0.99))
def test_a_group_is_in_exactly_one_place_and_stays_there(group, salt, fraction):
    places = [("validation", None), *(("train", fold) for fold in FOLDS)]
    folds = Folds(validation_fraction=fraction, salt=salt)
    assert sum(folds.holds(group, split, fold) for split, fold in places) == 1
    assert folds.holds(group, "train", None) == (folds.split(group) == "train")
    again = Folds(validation_fraction=fraction, salt=salt)
    assert (folds.split(group), folds.fold(group)) == (again.split(group), again.fold(group))


def test_validation_has_no_folds():
    folds = Folds(validation_fraction=0.5)
    held_out = next(group for group in GROUPS if folds.split(group) == "validation")
    assert all(folds.holds(held_out, "validation", fold) for fold in FOLDS)


def test_a_larger_fraction_only_moves_groups_out_of_train():
    small, large = Folds(validation_fraction=0.1), Folds(validation_fraction=0.3)
    for group in GROUPS[:1000]:
        assert not (small.split(group) == "validation" and large.split(group) == "train")
        assert small.fold(group) == large.fold(group)


def test_salt_deals_again_and_the_deal_is_pinned():
    assert [Folds(salt="a").fold(group) for group in GROUPS] != [Folds(salt="b").fold(group) for group in GROUPS]
    # The published folds: a change here puts evaluation prompts of old runs into the training of new ones.
    assert "".join(Folds().fold(group)[1] for group in GROUPS[:12]) == "fllffmllmffm"
    assert [n for n in range(40) if Folds().split(GROUPS[n]) == "validation"] == [24, 26, 33]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2])
def test_fraction_is_checked(fraction):
    with pytest.raises(ConfigError, match="Folds.validation_fraction"):
        Folds(validation_fraction=fraction)
