"""Ratings: closed forms, independent fits, every order of a few games, and what cannot be rated."""

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation import ratings
from pit_jax.testing import comparisons

THETA = np.array([0.8, 0.0, -0.3, -0.9])
NAMES = [str(i) for i in range(80)]


def _games(ties=0.4, seed=0):
    results = comparisons.tournament(THETA, 80, ties=ties, shared=0.3, rng=np.random.default_rng(seed))
    return results, ratings.battles(results, NAMES)


def _points(table):
    return {row.system: row.rating for row in table.rows}


def _config(**changes):
    return ratings.RatingConfig(**{"draws": 100, "rounds": 100, **changes})


def test_two_systems_have_the_closed_form():
    # 7 wins, 2 losses, 1 tie, and a game of the prior, half to each side.
    outcome = np.array([1.0] * 7 + [-1.0] * 2 + [0.0])
    games = ratings.battles({("a", "b"): outcome}, NAMES[:10])
    table = ratings.bradley_terry(games, _config(anchor="b", prior=1.0), seed=0)
    assert _points(table)["a"] == pytest.approx(1000 + 400 * np.log10(8 / 3), abs=1e-6)
    assert (table.rows[0].wins, table.rows[0].losses, table.rows[0].ties) == (7, 2, 1)
    assert (table.rows[1].rating, table.rows[1].low, table.rows[1].high) == (1000.0, 1000.0, 1000.0)


def test_ratings_are_a_logistic_regression():
    results, games = _games()
    design, win, weight = [], [], []
    for (a, b), outcome in results.items():
        difference = np.eye(4)[int(a[1])] - np.eye(4)[int(b[1])]
        design += [difference] * (len(outcome) + 1)
        win += [*(1 + outcome) / 2, 0.5]
        weight += [1.0] * len(outcome) + [2.0]
    model = sm.GLM(win, np.array(design)[:, 1:], family=sm.families.Binomial(), freq_weights=np.array(weight))
    theta = model.fit(tol=1e-12).params
    table = ratings.bradley_terry(games, _config(anchor="s0", at=0.0, prior=2.0), seed=0)
    expected = {"s0": 0.0} | {f"s{i + 1}": 400 / np.log(10) * theta[i] for i in range(3)}
    assert _points(table) == pytest.approx(expected, abs=1e-5)


def test_davidson_ties_match_a_general_optimiser():
    rng = np.random.default_rng(1)
    results = comparisons.davidson_tournament(THETA, 80, tie=0.9, shared=0.0, rng=rng)

    def loss(parameters):
        strength, tie = np.exp(np.append(0.0, parameters[:3])), np.exp(parameters[3])
        total = 0.0
        for (a, b), outcome in results.items():
            x, y = strength[int(a[1])], strength[int(b[1])]
            each = np.array([x, y, tie * np.sqrt(x * y)])
            # The prior of one game is a third of each outcome.
            seen = np.array([np.sum(outcome > 0), np.sum(outcome < 0), np.sum(outcome == 0)]) + 1 / 3
            total -= seen @ np.log(each / each.sum())
        return total

    best = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    table = ratings.bradley_terry(
        ratings.battles(results, NAMES), _config(anchor="s0", at=0.0, ties="davidson"), seed=0
    )
    expected = {"s0": 0.0} | {f"s{i + 1}": 400 / np.log(10) * best[i] for i in range(3)}
    assert _points(table) == pytest.approx(expected, abs=1e-2)
    assert table.tie == pytest.approx(np.exp(best[3]), rel=1e-4)


def test_order_of_systems_pairs_and_sides_does_not_matter():
    results, games = _games()
    turned = {(b, a): -outcome for (a, b), outcome in reversed(results.items())}
    for method in (ratings.bradley_terry, lambda *a, **k: ratings.bradley_terry(a[0], _config(ties="davidson"), **k)):
        one = method(games, _config(), seed=0)
        two = method(ratings.battles(turned, NAMES), _config(), seed=0)
        assert _points(one) == pytest.approx(_points(two), abs=1e-6)
        assert [row.low for row in one.rows] == pytest.approx([row.low for row in two.rows], abs=1e-6)
    assert np.mean(list(_points(one).values())) == pytest.approx(1000.0)
    assert [row.rating for row in one.rows] == sorted((row.rating for row in one.rows), reverse=True)


def test_elo_is_the_median_over_orders():
    # All 24 orders of four games, played one by one; K = 100 makes the order matter.
    games = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 1.0), ("a", "b", 0.0)]
    finals = []
    for order in itertools.permutations(games):
        points = dict.fromkeys("abc", 1000.0)
        for first, second, outcome in order:
            expected = 1 / (1 + 10 ** ((points[second] - points[first]) / 400))
            change = 100 * ((1 + outcome) / 2 - expected)
            points[first] += change
            points[second] -= change
        finals.append([points[name] for name in "abc"])
    battles = ratings.battles(
        {("a", "b"): np.array([1.0, 0.0]), ("b", "c"): np.array([1.0, np.nan]), ("c", "a"): np.array([1.0, np.nan])},
        ["0", "1"],
    )
    assert battles.unanswered == 2
    table = ratings.elo(battles, _config(k=100.0, rounds=20_000, resample=False), seed=0)
    found = {row.system: (row.rating, row.low, row.high) for row in table.rows}
    for i, name in enumerate("abc"):
        each = np.sort([final[i] for final in finals])
        # The median of an even number of orders lies between the two in the middle.
        assert each[11] - 0.01 <= found[name][0] <= each[12] + 0.01
        assert found[name][1:] == pytest.approx((each[0], each[-1]), abs=0.01)
    assert "2 comparisons without a verdict" in table.notes[0]


def test_elo_of_many_games_comes_close_to_bradley_terry():
    results = comparisons.tournament(THETA, 600, ties=0.4, shared=0.0, rng=np.random.default_rng(4))
    games = ratings.battles(results, [str(i) for i in range(600)])
    one = _points(ratings.bradley_terry(games, _config(), seed=0))
    two = _points(ratings.elo(games, _config(resample=True), seed=0))
    assert two == pytest.approx(one, abs=15)


def test_the_same_seed_gives_the_same_table_and_another_does_not():
    _, games = _games()
    for method in (ratings.bradley_terry, ratings.elo):
        assert method(games, _config(), seed=3) == method(games, _config(), seed=3)
        assert method(games, _config(), seed=3).rows != method(games, _config(), seed=4).rows


def test_systems_that_never_met_are_refused():
    results = {("a", "b"): np.array([1.0, -1.0]), ("c", "d"): np.array([1.0, -1.0])}
    with pytest.raises(DataError, match=r"\['a', 'b'\] was compared with any of \['c', 'd'\]"):
        ratings.bradley_terry(ratings.battles(results, ["0", "1"]), _config(), seed=0)


def test_a_system_that_wins_everything_is_finite_and_said():
    results = {
        ("best", "a"): np.ones(20), ("best", "b"): np.ones(20), ("a", "b"): np.array([1.0, -1.0] * 10),
    }  # fmt: skip
    for ties in ("half", "davidson"):
        table = ratings.bradley_terry(ratings.battles(results, NAMES[:20]), _config(ties=ties, prior=0.01), seed=0)
        assert table.rows[0].system == "best"
        assert all(np.isfinite([row.rating, row.low, row.high]).all() for row in table.rows)
        assert len(table.notes) == 1
        assert "['best'] never lost or tied" in table.notes[0]
    _, games = _games()
    assert ratings.bradley_terry(games, _config(), seed=0).notes == ()


def test_heavily_one_sided_games_converge():
    outcome = np.array([1.0] * 100_000 + [-1.0])
    games = ratings.battles({("a", "b"): outcome}, [str(i) for i in range(len(outcome))])
    table = ratings.bradley_terry(games, _config(anchor="b", prior=1e-6), seed=0)
    assert table.rows[0].rating == pytest.approx(1000 + 400 * np.log10(1e5), abs=1e-2)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({("a", "a"): np.ones(2)}, "meets itself"),
        ({("a", "b"): np.ones(3)}, "3 outcomes for 2 prompts"),
        ({("a", "b"): np.array([2.0, 0.0])}, r"holds 2.0"),
        ({("a", "b"): np.full(2, np.nan)}, "not one comparison has a verdict"),
        ({}, "not one comparison has a verdict"),
    ],
)
def test_bad_results_are_refused(results, message):
    with pytest.raises(DataError, match=message):
        ratings.battles(results, ["0", "1"])


def test_bad_settings_are_refused():
    for changes, message in (
        ({"prior": 0.0}, "prior = 0.0 must be above 0"), ({"k": 0.0}, "k = 0.0"), ({"draws": 5}, "draws = 5"),
        ({"ties": "third"}, "'third' must be"), ({"rounds": 1}, "rounds = 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            _config(**changes)
    _, games = _games()
    with pytest.raises(ConfigError, match="Did you mean 's1'"):
        ratings.bradley_terry(games, _config(anchor="s11"), seed=0)
    with pytest.raises(ConfigError, match="be one of the systems"):
        ratings.elo(games, _config(anchor="gpt"), seed=0)
