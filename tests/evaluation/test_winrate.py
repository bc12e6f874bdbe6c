"""Win rates: what is counted, and whether the intervals cover the truth."""

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import bootstrap, winrate


def _set(name, n, temperature=1.0):
    return winrate.ResponseSet(name=name, temperature=temperature, responses=("a",) * n, lengths=(3,) * n)


def test_win_lose_tie_and_delta_add_up():
    row = winrate.compare(
        _set("pit", 4), _set("original", 4), (np.array([1.0, 0.5, 0.2, 0.9]), np.array([0.0, 0.5, 0.4, 0.1])),
        groups=list("abcd"), judge="exact", seed=0,
    )  # fmt: skip
    assert (row.win, row.lose, row.tie, row.delta, row.n) == (50.0, 25.0, 25.0, 25.0, 4)
    assert row.ci95[0] <= row.delta <= row.ci95[1]


def test_swapping_the_sides_negates_delta():
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    groups = [str(i) for i in range(50)]
    one = winrate.compare(_set("a", 50), _set("b", 50), (a, b), groups=groups, judge="j", seed=1)
    two = winrate.compare(_set("b", 50), _set("a", 50), (b, a), groups=groups, judge="j", seed=1)
    assert one.delta == pytest.approx(-two.delta)
    assert one.ci95 == pytest.approx((-two.ci95[1], -two.ci95[0]), abs=1e-9)


def test_interval_covers_the_truth_for_clustered_rows():
    # Four rows of a prompt share its effect: treating them as independent would cover far less than 95 %.
    rng = np.random.default_rng(3)
    groups = [str(i // 4) for i in range(400)]
    covered = naive = 0
    for trial in range(120):
        effect = np.repeat(rng.normal(size=100), 4)
        results = np.sign(effect + 0.3 * rng.normal(size=400))
        low, high = bootstrap.mean_interval(results, groups, seed=trial, draws=400)
        covered += low <= 0 <= high
        low, high = bootstrap.mean_interval(results, [str(i) for i in range(400)], seed=trial, draws=400)
        naive += low <= 0 <= high
    assert 106 <= covered <= 120
    assert naive < covered - 10


def test_mismatched_lengths_are_refused():
    with pytest.raises(ConfigError, match="one entry per prompt"):
        winrate.compare(_set("a", 2), _set("b", 2), (np.ones(2), np.ones(3)), groups=["a", "b"], judge="j", seed=0)


def test_wilson_interval_matches_published_values():
    # Newcombe (1998), table I: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611.
    assert winrate.proportion_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert winrate.proportion_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert winrate.proportion_interval(0, 0) == (0.0, 1.0)
