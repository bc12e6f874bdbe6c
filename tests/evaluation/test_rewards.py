"""Held-out reports of reward models, on scores whose properties are known."""

import numpy as np
import pytest

from pit_jax.evaluation import rewards


def test_accuracies_count_ties_half_and_respect_the_clean_mask():
    chosen, rejected = np.array([1.0, 0.0, 2.0, 1.0]), np.array([0.0, 0.0, 3.0, 0.0])
    lengths = np.array([[3.0, 3, 3, 3], [2.0, 3, 4, 3]])
    result = rewards.bradley_terry(chosen, rejected, lengths, np.array([True, True, False, True]))
    assert result["accuracy"]["chosen > rejected"]["value"] == pytest.approx(2.5 / 4)
    clean = result["accuracy"]["chosen > rejected (clean)"]
    assert clean["value"] == pytest.approx(2.5 / 3) and clean["n"] == 3
    assert clean["ci95"][0] < clean["value"] < clean["ci95"][1]
    assert result["accuracy"]["longer wins (baseline)"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)


def test_a_perfectly_ordered_gap_is_perfect_in_all_five_and_histograms_count_everything():
    n = 50
    noise = np.random.default_rng(0).normal(size=n) * 0.01
    gaps = {"wl": 2 + noise, "ww": noise, "ll": noise * 2, "lw": -2 + noise}
    result = rewards.gap(gaps, np.ones((2, n)), None)
    compared = [f"{a} > {b}" for a, b in rewards.COMPARISONS]
    assert len(compared) == 5 and all(result["accuracy"][name]["value"] == 1.0 for name in compared)
    assert "ww > ll" not in result["accuracy"]
    assert all(sum(histogram["counts"]) == n for histogram in result["histograms"].values())


def test_calibration_error_is_small_for_calibrated_scores_and_large_for_overconfident_ones():
    rng = np.random.default_rng(1)
    logit = rng.normal(size=20000) * 2
    margin = np.abs(logit) * np.where(rng.random(20000) < 1 / (1 + np.exp(-np.abs(logit))), 1, -1)
    assert rewards.calibration_error(margin) < 0.01
    assert rewards.calibration_error(margin * 5) > 0.05


def test_correlation_of_a_constant_is_zero():
    assert rewards.correlation(np.ones(5), np.arange(5.0)) == 0.0
    assert rewards.correlation(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1.0)
