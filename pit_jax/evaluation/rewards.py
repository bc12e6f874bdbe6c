"""What a reward model is worth on held-out records: accuracies with intervals, histograms, calibration, length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pit_jax.evaluation.winrate import proportion_interval

COMPARISONS = (("wl", "ww"), ("wl", "ll"), ("wl", "lw"), ("ww", "lw"), ("ll", "lw"))
"""The order r_gap must learn, in the order of the loss (arXiv 2310.00898, section 3.3); ww and ll are not compared."""


def bradley_terry(
    chosen: Float[np.ndarray, " n"],
    rejected: Float[np.ndarray, " n"],
    lengths: Float[np.ndarray, "2 n"],
    clean: Bool[np.ndarray, " n"] | None,
) -> dict[str, Any]:
    """Return the held-out report of R_P.

    Args:
      chosen, rejected: scores of both responses.
      lengths: tokens of the chosen and of the rejected response.
      clean: where an exact judge agrees with the label, if there is one.
    """
    margin = chosen - rejected
    accuracy = {"chosen > rejected": _accuracy(margin)}
    if clean is not None:
        accuracy["chosen > rejected (clean)"] = _accuracy(margin[clean])
    difference = lengths[0] - lengths[1]
    accuracy["longer wins (baseline)"] = _accuracy(difference)
    return {
        "accuracy": accuracy,
        "scalars": {
            "mean margin": float(margin.mean()),
            "calibration error": calibration_error(margin),
            "length correlation": correlation(margin, difference),
            "score standard deviation": float(np.concatenate([chosen, rejected]).std()),
        },
        "calibration": calibration(margin),
    }


def gap(
    gaps: Mapping[str, Float[np.ndarray, " n"]],
    lengths: Float[np.ndarray, "2 n"],
    clean: Bool[np.ndarray, " n"] | None,
) -> dict[str, Any]:
    """Return the held-out report of R_PIT: all five comparisons, the four histograms, calibration, length.

    Args:
      gaps: wl, ww, ll, lw = r_gap(candidate, reference), each for every record.
      lengths: tokens of the chosen and of the rejected response.
      clean: where an exact judge agrees with the label, if there is one.
    """
    accuracy = {f"{a} > {b}": _accuracy(gaps[a] - gaps[b]) for a, b in COMPARISONS}
    if clean is not None:
        accuracy |= {f"{a} > {b} (clean)": _accuracy((gaps[a] - gaps[b])[clean]) for a, b in COMPARISONS}
    difference = lengths[0] - lengths[1]
    accuracy["longer wins (baseline)"] = _accuracy(difference)
    margin = gaps["wl"] - gaps["lw"]
    low, high = (f([values for values in gaps.values()]) for f in (np.min, np.max))
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    return {
        "accuracy": accuracy,
        "scalars": {
            "calibration error": calibration_error(margin),
            "length correlation": correlation(gaps["wl"], difference),
            "gap standard deviation": float(np.concatenate(list(gaps.values())).std()),
            "zero of the gap (mean of ww and ll)": float((gaps["ww"].mean() + gaps["ll"].mean()) / 2),
        },
        "calibration": calibration(margin),
        "histograms": {
            name: {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
            for name, values in gaps.items()
        },
    }


def _accuracy(margin: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Share of positive margins, ties counted half, with its Wilson interval."""
    hits = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    low, high = proportion_interval(hits, len(margin))
    return {"value": hits / len(margin) if len(margin) else 0.0, "ci95": [low, high], "n": len(margin)}


def calibration(margin: Float[np.ndarray, " n"], bins: int = 10) -> list[dict[str, float]]:
    """Return the reliability table of sigmoid(|margin|) as the probability that the higher score is the chosen one."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (margin > 0).astype(float) + 0.5 * (margin == 0)
    which = np.clip(((confidence - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    return [
        {"confidence": float(confidence[which == b].mean()), "accuracy": float(right[which == b].mean()), "n": int(n)}
        for b in range(bins)
        if (n := (which == b).sum())
    ]


def calibration_error(margin: Float[np.ndarray, " n"]) -> float:
    """Return the expected calibration error over ten bins (Guo et al. 2017, arXiv 1706.04599)."""
    table = calibration(margin)
    total = sum(row["n"] for row in table)
    return float(sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / max(total, 1))


def correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Return Pearson's correlation, 0 where one side is constant."""
    if len(a) < 2 or np.std(a) == 0 or np.std(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
