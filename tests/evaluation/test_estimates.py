"""Shares and correlations against SciPy, their intervals against simulations, and the figures of the gap studies."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
from etils import epath
from scipy import stats

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import document, estimates, gap_study, implicit_reward, reference_study
from pit_jax.evaluation.estimates import Figure
from pit_jax.evaluation.gap_study import Labelled, from_rewards, gap_quality
from pit_jax.evaluation.reference_study import Judged, behaviour

RNG = np.random.default_rng(5)


def prompts(count: int) -> list[str]:
    return [f"prompt {n}" for n in range(count)]


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties: bool) -> None:
    a = RNG.normal(1e4, 2.0, 60)
    b = 0.4 * a + RNG.normal(0, 1, 60)
    if ties:
        a, b = np.round(a), np.round(b)
    assert estimates.pearson(a, b, prompts(60), seed=0).value == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-9)
    rank = estimates.spearman(a, b, prompts(60), seed=0)
    assert rank.value == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-9)
    np.testing.assert_array_equal(estimates.ranks(a), stats.rankdata(a))


def test_intervals_of_correlations_hold_the_truth() -> None:
    # 40 prompts with 3 records each that share half of their variance: resampling records would be too narrow.
    held, truth = 0, 0.5
    for trial in range(200):
        rng = np.random.default_rng(trial)
        cov = [[1.0, truth], [truth, 1.0]]
        shared = np.repeat(rng.multivariate_normal([0, 0], cov, 40), 3, axis=0)
        a, b = (np.sqrt(0.5) * (shared + rng.multivariate_normal([0, 0], cov, 120))).T
        groups = [f"{n // 3}" for n in range(120)]
        low, high = estimates.pearson(a, b, groups, seed=trial, draws=400).ci95
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


@pytest.mark.parametrize(
    ("a", "b"), [(np.ones(5), np.arange(5.0)), (np.arange(5.0), np.zeros(5)), (np.arange(2.0), np.arange(2.0))]
)
def test_what_has_no_correlation_is_not_known(a: np.ndarray, b: np.ndarray) -> None:
    found = estimates.pearson(a, b, prompts(len(a)), seed=0)
    assert math.isnan(found.value)
    assert found.as_json() == {"value": None, "ci95": None, "n": 0}
    assert document.cell_text(found.cell("+.2f")) == "–"


def test_shares_count_ties_half_and_know_what_they_cannot_know() -> None:
    found = estimates.share(np.array([1.0, -1.0, 0.0, 2.0]), prompts(4), seed=0)
    assert (found.value, found.n) == (0.625, 4)
    every = estimates.share(np.ones(10), prompts(10), seed=0)
    assert every.value == 1
    assert 0.6 < every.ci95.low < 1, "ten of ten do not show that none of them can fail"
    nothing = estimates.share(np.zeros(0), [], seed=0)
    assert math.isnan(nothing.value)
    assert nothing.n == 0
    one = estimates.mean(np.array([1.0, 2.0]), ["a", "a"], seed=0)
    assert one.as_json() == {"value": 1.5, "ci95": None, "n": 2}


def test_report_of_an_implied_reward() -> None:
    ratios = np.array([[1.0, -2.0, 0.5, 0.0], [-1.0, -3.0, 1.5, 0.0]])
    lengths = np.array([[3.0, 4.0, 5.0, 6.0], [3.0, 5.0, 4.0, 6.0]])
    clean = np.array([True, True, False, False])
    found = implicit_reward.report(ratios, lengths, prompts(4), clean, beta=0.5, seed=0)
    accuracy = {name: (entry["value"], entry["n"]) for name, entry in found["accuracy"].items()}
    assert accuracy == {
        "chosen > rejected": (0.625, 4),
        "chosen > rejected (clean)": (1.0, 2),
        "longer wins (baseline)": (0.5, 4),
    }
    assert found["means"]["margin"]["value"] == pytest.approx(0.5 * (2 + 1 - 1 + 0) / 4)
    assert found["means"]["log-ratio of chosen"]["value"] == pytest.approx(-0.125)
    nobody = implicit_reward.report(ratios, lengths, prompts(4), np.zeros(4, bool), beta=0.5, seed=0)
    assert nobody["accuracy"]["chosen > rejected (clean)"] == {"value": None, "ci95": None, "n": 0}
    json.dumps(nobody, allow_nan=False)


def known(count: int, quality: np.ndarray | None) -> Labelled:
    return Labelled(groups=prompts(count), length=RNG.integers(-3, 4, count).astype(float), quality=quality)


def test_a_gap_that_is_the_truth_gets_everything_right() -> None:
    quality = np.abs(RNG.normal(1, 0.5, 50)) + 0.01
    zero = RNG.normal(-0.6, 0.2, 50)
    gaps = {"wl": quality + zero, "ww": zero, "ll": zero, "lw": zero - quality}
    found = gap_quality("truth", gaps, known(50, quality), seed=0)
    assert [figure.value for figure in found.holds.values()] == [1.0] * 5
    assert (found.all_hold.value, found.at_own_zero.value) == (1.0, 1.0)
    assert found.at_0.value < 1, "the zero of the gap is not 0"
    assert found.quality is not None
    assert found.quality.value == pytest.approx(1)
    assert found.zero.value == pytest.approx(zero.mean() / quality.mean())
    assert found.spread == pytest.approx(zero.std() / quality.mean())
    assert found.drift.value == pytest.approx(0)


def test_all_five_may_hold_less_often_than_each() -> None:
    gaps = {
        "wl": np.array([1.0, 1.0, 1.0, 0.0]),
        "ww": np.array([0.0, 2.0, 0.0, 0.0]),
        "ll": np.array([0.0, 0.0, 2.0, 0.0]),
        "lw": np.array([-1.0, -1.0, -1.0, 0.0]),
    }
    found = gap_quality("some", gaps, known(4, None), seed=0)
    shares = {name: figure.value for name, figure in found.holds.items()}
    assert shares == {"wl > ww": 0.625, "wl > ll": 0.625, "wl > lw": 0.875, "ww > lw": 0.875, "ll > lw": 0.875}
    assert found.all_hold.value == 0.25
    assert found.at_own_zero.value == 0.75
    assert found.drift.value == pytest.approx((2 - 2) / 0.75)
    assert found.quality is None


def test_the_difference_of_two_rewards_is_one_comparison_five_times() -> None:
    gaps = from_rewards(np.array([1.0, 2.0, 0.0]), np.array([0.0, 3.0, 0.0]))
    found = gap_quality("difference", gaps, known(3, np.array([1.0, -1.0, 0.5])), seed=0)
    assert {figure.value for figure in found.holds.values()} == {0.5}
    assert (found.spread, found.zero.value, found.at_0.value) == (0.0, 0.0, 0.5)


def test_gaps_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="have 3 values of each"):
        gap_quality("short", from_rewards(np.zeros(2), np.zeros(2)), known(3, None), seed=0)
    with pytest.raises(ConfigError, match="one entry for each"):
        Labelled(groups=prompts(3), length=np.zeros(2), quality=None)
    with pytest.raises(ConfigError, match="one entry for each"):
        Judged(gap=np.zeros(0), truth=np.zeros(0), length=np.zeros(0), same=np.zeros(0, bool), groups=[])


def judged(gap: list[float], truth: list[float]) -> Judged:
    gaps = np.array(gap)
    return Judged(gap=gaps, truth=np.array(truth), length=gaps * 2, same=gaps == 0, groups=prompts(len(gap)))


def test_behaviour_of_a_gap() -> None:
    pairs = judged([1.0, -1.0, 2.0, 0.0, 3.0], [0.5, 0.5, 1.0, 0.25, 0.0])
    found = behaviour("step", 1, pairs, seed=0)
    assert found.right.value == (1 + 0 + 1 + 0.5) / 4
    assert (found.right.n, found.n) == (4, 5)
    assert found.changed.value == 0.8
    assert found.gap.value == pytest.approx(1.0)
    assert found.deviation == pytest.approx(np.std([1, -1, 2, 0, 3]))
    assert found.spearman.value == pytest.approx(stats.spearmanr([1, -1, 2, 0, 3], [0.5, 0.5, 1, 0.25, 0])[0])
    assert found.length.value == pytest.approx(1)
    nothing = behaviour("none", 2, judged([1.0, 2.0], [0.0, 0.0]), seed=0)
    assert nothing.right == Figure(nothing.right.value, nothing.right.ci95, 0)
    assert math.isnan(nothing.right.value)
    both = pairs.and_also(judged([1.0], [1.0]))
    assert behaviour("both", None, both, seed=0).n == 6


def test_tables_and_pictures_show_every_row(tmp_path: pathlib.Path) -> None:
    quality = np.abs(RNG.normal(1, 0.5, 30))
    gaps = {
        "five $x$": {"wl": quality, "ww": 0 * quality, "ll": 0 * quality - 0.1, "lw": -quality},
        "R_P(y1) - R_P(y2)": from_rewards(quality, 0.5 * quality),
    }
    rows = [gap_quality(name, found, known(30, quality), seed=0) for name, found in gaps.items()]
    shares, others = gap_study.tables(rows)
    assert [row[0] for row in shares.rows] == [row[0] for row in others.rows] == list(gaps)
    assert len(shares.header) <= 12
    pairs = {"data": judged([1.0, -1.0, 0.5], [1.0, -1.0, 0.0]), "y_1, y_0": judged([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])}
    found = [behaviour(name, step, pair, seed=0) for step, (name, pair) in enumerate(pairs.items())]
    assert [row[0] for row in reference_study.table(found).rows] == list(pairs)
    plots = [*gap_study.pictures(rows, gaps), *reference_study.pictures(found, pairs)]
    for plot in plots:
        plot.draw(epath.Path(tmp_path) / plot.name)
        assert (tmp_path / plot.name).read_bytes().startswith(b"\x89PNG")
    assert len({plot.name for plot in plots}) == 5
