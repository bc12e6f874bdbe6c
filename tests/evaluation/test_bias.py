"""Sign test, position and length: independent implementations, and judges with a known bias."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import special, stats

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation import bias
from pit_jax.evaluation.pairwise import Question, ScoreJudge
from pit_jax.testing import comparisons


def _names(values):
    return [str(i) for i in range(len(values))]


def _lengths(effects=(0.4, 1.2, 0.7), groups=400):
    return comparisons.lengths(groups, 1, effects=effects, ties=0.3, shared=0.0, rng=np.random.default_rng(2))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (3, 9), (0, 20), (480, 520), (61, 39)])
def test_sign_test_is_scipys_binomial_test(wins, losses):
    outcomes = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 7 + [np.nan] * 2)
    found = bias.sign_test(outcomes, _names(outcomes))
    assert (found.wins, found.losses, found.ties) == (wins, losses, 7)
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found.p == pytest.approx(expected, rel=1e-12)


def test_a_group_counts_once_in_the_sign_test():
    outcomes = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 0.0, np.nan])
    found = bias.sign_test(outcomes, ["a", "a", "a", "b", "b", "c", "d"])
    assert (found.wins, found.losses, found.ties, found.p) == (1, 0, 2, 1.0)
    assert bias.sign_test(np.full(3, np.nan), ["a", "b", "c"]) == bias.SignTest(wins=0, losses=0, ties=0, p=1.0)


def test_first_place_finds_a_judge_that_does_not_read():
    rng = np.random.default_rng(0)
    always = bias.first_place(np.ones(40), np.ones(40), _names(range(40)), seed=0)
    assert always.percent == 100.0
    assert always.p < 1e-9
    # Forty of forty: at most 1 - 0.025^(1/40) = 8.8 % of other questions could have escaped.
    assert always.ci95 == pytest.approx((100 - 100 * (1 - 0.025 ** (1 / 40)), 100.0))
    fair = rng.choice([-1.0, 0.0, 1.0], 200)
    assert bias.first_place(fair, -fair, _names(fair), seed=0).percent == 50.0
    drawn = np.where(rng.random(200) < 0.3, 1.0, -fair)
    found = bias.first_place(fair, drawn, _names(fair), seed=0)
    assert found.ci95.low > 50.0
    assert found.p < 1e-4


def test_left_share_counts_ties_as_half():
    found = bias.left_share(np.array([1.0, 1.0, 0.0, -1.0, np.nan]), _names(range(5)), seed=0)
    assert (found.n, found.percent) == (4, 62.5)
    empty = bias.left_share(np.full(2, np.nan), ["a", "b"], seed=0)
    assert empty.n == 0
    assert np.isnan(empty.percent)
    assert empty.p == 1.0


def test_longer_wins_looks_at_pairs_with_a_winner_and_a_longer_side():
    outcomes = np.array([1.0, -1.0, -1.0, 0.0, 1.0, np.nan])
    difference = np.array([3.0, -2.0, 5.0, 4.0, 0.0, 1.0])
    found = bias.longer_wins(outcomes, difference, _names(outcomes), seed=0)
    assert found.n == 3
    assert found.percent == pytest.approx(100 * 2 / 3)
    longer = ScoreJudge(judge=bias.longer_judge())
    assert [v.outcome for v in longer.verdicts([Question("x", "aaa", "b"), Question("x", "a", "bb")])] == [1.0, -1.0]


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_length_control_matches_an_independent_fit(with_difficulty):
    data = _lengths()
    d = data.length_difference
    columns = [np.ones(len(d)), np.tanh(d / np.std(d, ddof=1)), *([data.difficulty] if with_difficulty else [])]
    model = sm.GLM((1 + data.outcomes) / 2, np.column_stack(columns), family=sm.families.Binomial())
    fit = model.fit(cov_type="HC1")
    found = bias.length_controlled(
        data.outcomes, d, data.groups, seed=0, difficulty=data.difficulty if with_difficulty else None
    )
    level = fit.params[0] + (fit.params[2] * data.difficulty if with_difficulty else np.zeros(len(d)))
    assert found.controlled == pytest.approx(100 * np.mean(special.expit(level)), abs=2e-3)
    assert found.length == pytest.approx(fit.params[1], abs=1e-3)
    assert found.raw == pytest.approx(50 * (1 + np.mean(data.outcomes)))
    assert (found.delta, found.delta_ci95.low) == (2 * found.controlled - 100, 2 * found.ci95.low - 100)
    if with_difficulty:
        assert found.difficulty == pytest.approx(fit.params[2], abs=1e-3)
    else:
        # The bootstrap agrees with the sandwich estimator of the same regression.
        low, high = 100 * special.expit(fit.conf_int()[0])
        assert found.ci95 == pytest.approx((low, high), abs=0.6)


def test_length_control_takes_away_what_length_alone_won():
    # No better than the baseline, only longer, with a judge who likes that.
    data = _lengths(effects=(0.0, 1.5, 0.0), groups=800)
    found = bias.length_controlled(data.outcomes, data.length_difference, data.groups, seed=0)
    assert found.raw_ci95.low > 60
    assert found.ci95.low < 50 < found.ci95.high


def test_calibration_rows_enter_with_their_weight():
    data, rng = _lengths(), np.random.default_rng(5)
    extra = bias.Calibration(length=rng.normal(size=50), difficulty=rng.normal(size=50), win=rng.random(50), weight=0.4)
    d = data.length_difference
    own = np.column_stack([np.ones(len(d)), np.tanh(d / np.std(d, ddof=1)), data.difficulty])
    design = np.concatenate([own, np.column_stack([np.zeros(50), np.tanh(extra.length), extra.difficulty])])
    weights = np.append(np.ones(len(d)), np.full(50, 0.4))
    win = np.append((1 + data.outcomes) / 2, extra.win)
    fit = sm.GLM(win, design, family=sm.families.Binomial(), freq_weights=weights).fit()
    found = bias.length_controlled(
        data.outcomes, d, data.groups, seed=0, difficulty=data.difficulty, calibration=extra, draws=200
    )
    assert (found.length, found.difficulty) == pytest.approx((fit.params[1], fit.params[2]), abs=1e-3)
    with pytest.raises(ConfigError, match="be given with a calibration"):
        bias.length_controlled(data.outcomes, d, data.groups, seed=0, calibration=extra)


def test_length_control_at_its_edges():
    same = bias.length_controlled(np.array([1.0, 1.0, -1.0, 0.0]), np.zeros(4), list("abcd"), seed=0)
    assert same.controlled == pytest.approx(same.raw, abs=0.05)
    assert same.length == 0.0
    sweep = bias.length_controlled(np.ones(50), np.arange(50.0), _names(range(50)), seed=0)
    assert 99 < sweep.controlled <= 100
    single = bias.length_controlled(np.array([1.0, np.nan]), np.array([5.0, 1.0]), ["a", "b"], seed=0)
    assert single.n == 1
    assert np.isnan(single.ci95).all()
    with pytest.raises(DataError, match="there is none"):
        bias.length_controlled(np.full(3, np.nan), np.zeros(3), list("abc"), seed=0)
    with pytest.raises(ConfigError, match=r"outcomes = 2.0 must lie in \[-1, 1\]"):
        bias.length_controlled(np.array([2.0, 0.0]), np.zeros(2), list("ab"), seed=0)
