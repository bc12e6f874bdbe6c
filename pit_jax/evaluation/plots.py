"""The report's pictures, drawn with matplotlib into PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from pit_jax.evaluation.winrate import Comparison

Records = Sequence[Mapping[str, Any]]
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#577590", "#222222", "#c77dff")


def _figure(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[0]


def _save(figure: Any, path: epath.Path) -> None:
    from matplotlib import pyplot

    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=130)
    pyplot.close(figure)


def deltas(rows: Sequence[Comparison], path: epath.Path) -> None:
    """Draw Delta with its 95 % interval, a line for each comparison against the Original."""
    figure, (axis,) = _figure(7.0, 0.9 + 0.32 * len(rows))
    for place, row in enumerate(reversed(rows)):
        low, high = row.ci95
        colour = _COLOURS[2] if low > 0 else _COLOURS[1] if high < 0 else "#777777"
        axis.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        axis.plot(row.delta, place, "o", color=colour, markersize=6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row.candidate for row in reversed(rows)])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel("Delta = win - lose against Original, points (95 % interval)")
    _save(figure, path)


def temperatures(series: Mapping[str, Mapping[float, tuple[float, float, float]]], path: epath.Path) -> None:
    """Draw mean quality by the judge against sampling temperature, a line for each system.

    Args:
      series: system -> {temperature: (mean score, low, high)}.
      path: of the PNG file.
    """
    figure, (axis,) = _figure()
    for index, (name, points) in enumerate(series.items()):
        order = sorted(points)
        centre, low, high = (np.array([points[t][k] for t in order]) for k in range(3))
        colour = _COLOURS[index % len(_COLOURS)]
        axis.plot(order, centre, "o-", color=colour, label=name, linewidth=1.8, markersize=4)
        axis.fill_between(order, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("sampling temperature")
    axis.set_ylabel("mean score by the judge")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def against(points: Sequence[tuple[float, Sequence[Comparison]]], label: str, path: epath.Path) -> None:
    """Draw Delta with intervals against a number (iterations, RLHF steps), a line for each system."""
    figure, (axis,) = _figure()
    names = list(dict.fromkeys(row.candidate for _, rows in points for row in rows))
    for index, name in enumerate(names):
        found = [(x, row) for x, rows in points for row in rows if row.candidate == name]
        xs = [x for x, _ in found]
        colour = _COLOURS[index % len(_COLOURS)]
        axis.plot(xs, [row.delta for _, row in found], "o-", color=colour, label=name, linewidth=1.8, markersize=4)
        axis.fill_between(
            xs,
            [row.ci95[0] for _, row in found],
            [row.ci95[1] for _, row in found],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel(label)
    axis.set_ylabel("Delta, points")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def curves(stages: Mapping[str, Records], names: Sequence[str], path: epath.Path) -> None:
    """Draw metrics of RL stages against the step: a panel for each metric, a line for each stage."""
    figure, axes = _figure(3.2 * len(names), 2.9, len(names))
    for axis, metric in zip(axes, names, strict=True):
        for index, (stage, records) in enumerate(stages.items()):
            points = [(record["step"], record[metric]) for record in records if metric in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=stage, linewidth=1.4, color=_COLOURS[index % len(_COLOURS)])
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def losses(stages: Mapping[str, Records], path: epath.Path) -> None:
    """Draw training loss against the step, a panel for each supervised stage."""
    figure, axes = _figure(2.7 * len(stages), 2.6, len(stages))
    for axis, (stage, records) in zip(axes, stages.items(), strict=True):
        for prefix, style in (("", "-"), ("eval/", "o")):
            points = [(record["step"], record[prefix + "loss"]) for record in records if prefix + "loss" in record]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color=_COLOURS[bool(prefix)],
                    markersize=4,
                    linewidth=1.3,
                    label="held out" if prefix else "training",
                )
        axis.set_title(stage, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def histograms(gaps: Mapping[str, Mapping[str, Sequence[float]]], path: epath.Path) -> None:
    """Draw the histograms of the four gaps on held-out records.

    Args:
      gaps: name (wl, ww, ll, lw) -> {"edges": n + 1 numbers, "counts": n numbers}.
      path: of the PNG file.
    """
    titles = {
        "wl": "gap(better, worse)",
        "ww": "gap(better, better)",
        "ll": "gap(worse, worse)",
        "lw": "gap(worse, better)",
    }
    figure, (axis,) = _figure()
    for index, (name, histogram) in enumerate(gaps.items()):
        axis.stairs(
            histogram["counts"],
            histogram["edges"],
            label=titles.get(name, name),
            fill=name in ("wl", "lw"),
            alpha=0.45 if name in ("wl", "lw") else 1.0,
            linewidth=1.6,
            color=_COLOURS[index],
        )
    axis.set_xlabel("r_gap")
    axis.set_ylabel("held-out records")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)
