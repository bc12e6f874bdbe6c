"""Agreement of judges: published examples, statsmodels, and what is not defined."""

import numpy as np
import pytest
from statsmodels.stats import inter_rater

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import agreement
from pit_jax.testing import comparisons

NAN = np.nan


def _votes(items=300, judges=3, missing=0.0):
    return comparisons.votes(
        items, judges, kinds=3, reliability=0.7, missing=missing, rng=np.random.default_rng(0)
    )  # fmt: skip


def _names(votes):
    return [str(i) for i in range(len(votes))]


@pytest.mark.parametrize("weights", ["none", "linear", "quadratic"])
def test_cohen_matches_statsmodels(weights):
    votes = _votes()
    table = np.zeros((3, 3))
    np.add.at(table, tuple(votes[:, :2].astype(int).T), 1)
    theirs = inter_rater.cohens_kappa(table, wt=None if weights == "none" else weights)
    ours = agreement.cohen(votes[:, 0], votes[:, 1], _names(votes), seed=0, weights=weights)
    assert ours.value == pytest.approx(theirs.kappa, abs=1e-12)
    assert ours.ci95 == pytest.approx((theirs.kappa_low, theirs.kappa_upp), abs=0.02)
    assert ours.items == 300


def test_fleiss_matches_statsmodels_and_the_textbook():
    votes = _votes()
    theirs = inter_rater.fleiss_kappa(inter_rater.aggregate_raters(votes)[0])
    assert agreement.fleiss(votes, _names(votes), seed=0).value == pytest.approx(theirs, abs=1e-12)
    # Ten subjects, fourteen raters, five categories; kappa = 0.210 (Fleiss' example as usually printed).
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    table = np.array([np.repeat(np.arange(5.0), row) for row in counts])
    assert agreement.fleiss(table, _names(table), seed=0).value == pytest.approx(0.210, abs=5e-4)


def test_krippendorff_matches_the_published_example():
    # Krippendorff (2011), section C: four observers, twelve units, alpha nominal = 0.743.
    votes = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
            [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
        ]
    ).T
    found = agreement.krippendorff(votes, _names(votes), seed=0)
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert found.items == 11
    assert found.ci95.low < found.value < found.ci95.high


def test_raw_agreement_is_the_share_of_equal_pairs():
    votes = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, NAN], [0.0, 0.0, -1.0], [1.0, NAN, NAN]])
    found = agreement.raw(votes, _names(votes), seed=0)
    # Three of three pairs, none of one, one of three; the last item has no pair.
    assert found.value == pytest.approx((6 + 0 + 2) / (6 + 2 + 6))
    assert found.items == 3


def test_everything_at_once_with_missing_votes():
    votes = _votes(missing=0.1)
    found = agreement.agreement(("a", "b", "c"), votes, _names(votes), seed=0)
    assert [(pair.first, pair.second) for pair in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    there = ~np.isnan(votes)
    assert found.pairs[1].kappa.items == np.sum(there[:, 0] & there[:, 2])
    assert found.fleiss.items == np.sum(there.all(axis=1)) < found.alpha.items
    for measure in (found.alpha, found.fleiss, *(pair.kappa for pair in found.pairs)):
        assert measure.ci95.low < 0.49 < measure.ci95.high


def test_clusters_widen_the_interval():
    votes = np.repeat(_votes(items=60), 5, axis=0)
    groups = [str(i // 5) for i in range(len(votes))]
    clustered = agreement.krippendorff(votes, groups, seed=0).ci95
    naive = agreement.krippendorff(votes, _names(votes), seed=0).ci95
    assert clustered.high - clustered.low > 1.8 * (naive.high - naive.low)


def test_undefined_measures_are_nan():
    same = np.ones((5, 2))
    found = agreement.agreement(("a", "b"), same, _names(same), seed=0)
    assert found.raw.value == 1.0
    assert np.isnan([found.alpha.value, found.fleiss.value, found.pairs[0].kappa.value, *found.alpha.ci95]).all()
    alone = np.array([[1.0, NAN], [NAN, 0.0]])
    found = agreement.agreement(("a", "b"), alone, _names(alone), seed=0)
    assert np.isnan([found.raw.value, found.alpha.value, found.fleiss.value, *found.pairs[0].kappa.ci95]).all()
    assert found.raw.items == found.fleiss.items == 0


def test_bad_input_is_refused():
    votes = _votes(missing=0.2)
    with pytest.raises(ConfigError, match="be complete"):
        agreement.fleiss(votes, _names(votes), seed=0)
    with pytest.raises(ConfigError, match="'cubic' must be"):
        agreement.cohen(votes[:, 0], votes[:, 1], _names(votes), seed=0, weights="cubic")
    with pytest.raises(ConfigError, match="at least two judges"):
        agreement.agreement(("a",), votes[:, :1], _names(votes), seed=0)
