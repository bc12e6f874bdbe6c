"""The 95 % intervals hold the truth in about 95 % of simulations with a known truth.

Here with 200 simulations, whose share has a standard error of 1.5 points; `-m slow` runs 1,000 of each.
benchmarks/coverage.py prints the whole table.
"""

import numpy as np
import pytest

from pit_jax.evaluation import agreement, bias, bootstrap, ratings
from pit_jax.testing import comparisons

THETA = np.array([0.9, 0.2, 0.0, -0.8])


def _win_rate(rng):
    data = comparisons.win_rates(60, 4, score=0.6, ties=0.25, shared=0.6, rng=rng)
    yield *bootstrap.mean_interval(data.outcomes, data.groups, seed=int(rng.integers(2**31)), draws=400), data.truth


def _few_prompts(rng):
    data = comparisons.win_rates(10, 8, score=0.6, ties=0.25, shared=0.6, rng=rng)
    yield *bootstrap.mean_interval(data.outcomes, data.groups, seed=int(rng.integers(2**31)), draws=400), data.truth


def _not_clustered(rng):
    data = comparisons.win_rates(60, 4, score=0.6, ties=0.25, shared=0.6, rng=rng)
    rows = [str(i) for i in range(len(data.outcomes))]
    yield *bootstrap.mean_interval(data.outcomes, rows, seed=int(rng.integers(2**31)), draws=400), data.truth


def _rating(rng, ties="half"):
    names = [str(i) for i in range(60)]
    if ties == "half":
        results = comparisons.tournament(THETA, 60, ties=0.3, shared=0.5, rng=rng)
    else:
        results = comparisons.davidson_tournament(THETA, 60, tie=0.7, shared=0.5, rng=rng)
    config = ratings.RatingConfig(anchor="s0", at=0.0, draws=400, ties=ties)
    table = ratings.bradley_terry(ratings.battles(results, names), config, seed=int(rng.integers(2**31)))
    for row in table.rows:
        if row.system != "s0":
            yield row.low, row.high, ratings.POINTS * (THETA[int(row.system[1])] - THETA[0])


def _davidson(rng):
    yield from _rating(rng, "davidson")


def _length_controlled(rng):
    data = comparisons.lengths(60, 2, effects=(0.3, 1.0, 0.5), ties=0.3, shared=0.6, rng=rng)
    found = bias.length_controlled(
        data.outcomes, data.length_difference, data.groups, seed=int(rng.integers(2**31)),
        difficulty=data.difficulty, draws=250,
    )  # fmt: skip
    yield *found.ci95, data.truth


def _alpha(rng):
    votes = comparisons.votes(80, 3, kinds=3, reliability=0.7, missing=0.2, rng=rng)
    yield *agreement.krippendorff(votes, [str(i) for i in range(80)], seed=int(rng.integers(2**31))).ci95, 0.49


def _covered(simulate, simulations):
    found = np.array([row for number in range(simulations) for row in simulate(np.random.default_rng([7, number]))])
    return float(np.mean((found[:, 0] <= found[:, 2] + 1e-12) & (found[:, 2] <= found[:, 1] + 1e-12)))


KINDS = [_win_rate, _few_prompts, _rating, _davidson, _length_controlled, _alpha]


@pytest.mark.parametrize("simulate", KINDS)
def test_intervals_cover_the_truth(simulate):
    assert 0.90 <= _covered(simulate, 200) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("simulate", KINDS)
def test_intervals_cover_the_truth_in_93_to_97_percent_of_1000(simulate):
    assert 0.93 <= _covered(simulate, 1000) <= 0.97


def test_forgetting_the_clusters_is_noticed():
    assert _covered(_not_clustered, 150) < 0.88


def test_an_interval_without_spread_allows_for_what_was_not_seen():
    # The exact one-sided 97.5 % bound of 0 in 20 is 16.8 % (Clopper & Pearson); twice that in outcomes.
    found = bootstrap.mean_interval(np.ones(20), [str(i) for i in range(20)], seed=0, bounds=(-1.0, 1.0))
    assert found == pytest.approx((1 - 2 * 0.1684, 1.0), abs=1e-4)
    found = bootstrap.mean_interval(np.zeros(20), [str(i) for i in range(20)], seed=0, bounds=(-1.0, 1.0))
    assert found == pytest.approx((-0.1684, 0.1684), abs=1e-4)
    assert bootstrap.mean_interval(np.ones(20), [str(i) for i in range(20)], seed=0) == (1.0, 1.0)


def test_one_group_has_no_interval():
    assert np.isnan(bootstrap.mean_interval(np.array([1.0, 0.0]), ["a", "a"], seed=0)).all()
