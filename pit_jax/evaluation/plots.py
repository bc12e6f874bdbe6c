"""The report's pictures, drawn with matplotlib into PNG files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pit_jax.evaluation import canvas
from pit_jax.evaluation.canvas import BETTER, COLOURS, UNSURE, WORSE
from pit_jax.evaluation.ratings import RatingTable
from pit_jax.evaluation.winrate import Comparison

Records = Sequence[Mapping[str, Any]]
_MOST_BANDS = 4
"""Lines up to which intervals are drawn as bands; more bands hide each other, so they become bars."""


class Point(NamedTuple):
    """A value at x with the ends of its 95 % interval, NaN where there is none."""

    x: float
    value: float
    low: float
    high: float


class Bar(NamedTuple):
    """A named value with the ends of its 95 % interval."""

    name: str
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """What the axes of a picture stand for; zero: value at which a line is drawn; whole: x is counted."""

    x: str
    y: str
    zero: float | None = None
    whole: bool = False


def forest(bars: Sequence[Bar], label: str, path: epath.Path, *, zero: float | None = 0.0) -> None:
    """Draw values with their intervals below each other, the first on top.

    Args:
      bars: the values.
      label: of the x axis.
      path: of the PNG file.
      zero: where "no difference" is: intervals beyond it are green or red. None draws all alike.
    """
    figure, (axis,) = canvas.figure(6.4, 0.9 + 0.32 * len(bars))
    for place, bar in enumerate(reversed(bars)):
        above, below = zero is not None and bar.low > zero, zero is not None and bar.high < zero
        colour = COLOURS[0] if zero is None else BETTER if above else WORSE if below else UNSURE
        axis.plot([bar.low, bar.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        axis.plot(bar.value, place, "o", color=colour, markersize=6)
    if zero is not None:
        axis.axvline(zero, color="black", linewidth=0.8)
    canvas.name_rows(axis, [bar.name for bar in bars])
    axis.set_xlabel(canvas.plain(label))
    canvas.save(figure, path)


def deltas(rows: Sequence[Comparison], path: epath.Path) -> None:
    """Draw Delta with its 95 % interval, a line for each comparison against the Original."""
    bars = [Bar(row.candidate, row.delta, *row.ci95) for row in rows]
    forest(bars, "Delta = win - lose against Original, points (95 % interval)", path)


def outcomes(rows: Sequence[Comparison], path: epath.Path) -> None:
    """Draw win, tie and lose of each comparison as parts of a bar, in percent."""
    figure, (axis,) = canvas.figure(6.4, 1.1 + 0.32 * len(rows))
    places, start = np.arange(len(rows))[::-1], np.zeros(len(rows))
    for name, colour in (("win", BETTER), ("tie", "#c9ccd1"), ("lose", WORSE)):
        width = np.array([vars(row)[name] for row in rows])
        axis.barh(places, width, left=start, color=colour, label=name, height=0.72)
        for place, left, size in zip(places, start, width, strict=True):
            if size >= 6:  # what is narrower has no room for its number
                ink = "#222222" if name == "tie" else "white"
                axis.text(left + size / 2, place, f"{size:.0f}", ha="center", va="center", fontsize=8, color=ink)
        start = start + width
    canvas.name_rows(axis, [row.candidate for row in rows])
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of prompts, against Original")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    canvas.save(figure, path)


def lines(series: Mapping[str, Sequence[Point]], axes: Axes, path: epath.Path) -> None:
    """Draw values with their intervals against a number, a line for each series.

    Args:
      series: name -> points; they are put in the order of x.
      axes: what is drawn.
      path: of the PNG file.
    """
    from matplotlib import ticker

    figure, (axis,) = canvas.figure()
    everywhere = [point.x for points in series.values() for point in points]
    shift = 0.006 * float(np.ptp(everywhere)) if everywhere else 0.0  # bars beside each other, not on top
    for index, (name, points) in enumerate(series.items()):
        x, value, low, high = np.array(sorted(points), np.float64).reshape(-1, 4).T
        style = canvas.line_style(index)
        if len(series) <= _MOST_BANDS:
            axis.plot(x, value, label=canvas.plain(name), **style)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        else:
            x = x + shift * (index - (len(series) - 1) / 2)
            axis.plot(x, value, label=canvas.plain(name), **style)
            axis.vlines(x, low, high, color=style["color"], linewidth=0.8, alpha=0.7)
    if axes.zero is not None:
        axis.axhline(axes.zero, color="black", linewidth=0.8)
    if axes.whole:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.set_xlabel(canvas.plain(axes.x))
    axis.set_ylabel(canvas.plain(axes.y))
    canvas.legend(axis, len(series))
    canvas.save(figure, path)


def temperatures(series: Mapping[str, Mapping[float, tuple[float, float, float]]], path: epath.Path) -> None:
    """Draw mean quality by the judge against sampling temperature, a line for each system.

    Args:
      series: system -> {temperature: (mean score, low, high)}.
      path: of the PNG file.
    """
    found = {name: [Point(t, *values) for t, values in points.items()] for name, points in series.items()}
    lines(found, Axes(x="sampling temperature", y="mean score by the judge"), path)


def against(points: Sequence[tuple[float, Sequence[Comparison]]], label: str, path: epath.Path) -> None:
    """Draw Delta with intervals against a number (iterations, RLHF steps), a line for each system."""
    found: dict[str, list[Point]] = {}
    for x, rows in points:
        for row in rows:
            found.setdefault(row.candidate, []).append(Point(x, row.delta, *row.ci95))
    lines(found, Axes(x=label, y="Delta, points", zero=0.0), path)


def ratings(table: RatingTable, path: epath.Path) -> None:
    """Draw the ratings of a table with their intervals, best on top."""
    rated({table.method: bars_of(table)}, None, path)


def bars_of(table: RatingTable) -> list[Bar]:
    """Return the ratings of a table as bars."""
    return [Bar(row.system, row.rating, row.low, row.high) for row in table.rows]


def rated(tables: Mapping[str, Sequence[Bar]], anchor: float | None, path: epath.Path) -> None:
    """Draw ratings with their intervals, best on top.

    Args:
      tables: method -> a rating of each system; the first method decides the order.
      anchor: a rating at which a line is drawn, None draws none.
      path: of the PNG file.
    """
    order = [bar.name for bar in sorted(next(iter(tables.values())), key=lambda bar: -bar.value)]
    figure, (axis,) = canvas.figure(6.4, 1.1 + 0.36 * len(order))
    for index, (method, bars) in enumerate(tables.items()):
        place = np.array([len(order) - 1 - order.index(bar.name) for bar in bars]) + 0.13 * (len(tables) - 1)
        place = place - 0.26 * index
        colour = COLOURS[index % len(COLOURS)]
        axis.hlines(place, [bar.low for bar in bars], [bar.high for bar in bars], color=colour, linewidth=2)
        axis.plot([bar.value for bar in bars], place, "o", color=colour, markersize=5, label=canvas.plain(method))
    if anchor is not None:
        axis.axvline(anchor, color="black", linewidth=0.8)
    canvas.name_rows(axis, order)
    axis.set_xlabel("rating (95 % interval)")
    axis.legend(frameon=False, fontsize=8, ncols=len(tables), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    canvas.save(figure, path)


class LengthMark(NamedTuple):
    """Delta of one comparison as it is, at equal lengths, and by a judge that only counts length."""

    name: str
    delta: Bar
    controlled: Bar
    longer: float


def lengths(marks: Sequence[LengthMark], path: epath.Path) -> None:
    """Draw, for each comparison, Delta, Delta at equal lengths, and what a judge would say that only counts length."""
    figure, (axis,) = canvas.figure(6.4, 1.1 + 0.4 * len(marks))
    places = np.arange(len(marks))[::-1]
    kinds = (
        ("Delta", 0.15, COLOURS[0], [mark.delta for mark in marks]),
        ("Delta at equal lengths", -0.15, COLOURS[3], [mark.controlled for mark in marks]),
    )
    for label, shift, colour, bars in kinds:
        low, high = [bar.low for bar in bars], [bar.high for bar in bars]
        axis.hlines(places + shift, low, high, color=colour, linewidth=2)
        axis.plot([bar.value for bar in bars], places + shift, "o", color=colour, markersize=5, label=label)
    axis.plot(
        [mark.longer for mark in marks], places, "x", color="#222222", markersize=6, label="a judge of length alone"
    )
    axis.axvline(0, color="black", linewidth=0.8)
    canvas.name_rows(axis, [mark.name for mark in marks])
    axis.set_xlabel("Delta against Original, points (95 % interval)")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    canvas.save(figure, path)


def curves(stages: Mapping[str, Records], names: Sequence[str], path: epath.Path) -> None:
    """Draw metrics of RL stages against the step: a panel for each metric, a line for each stage."""
    figure, axes = canvas.panels(len(names), 2.9)
    for axis, metric in zip(axes, names, strict=True):
        for index, (stage, records) in enumerate(stages.items()):
            points = [(record["step"], record[metric]) for record in records if metric in record]
            if points:
                style = canvas.line_style(index) | {"linewidth": 1.4, "markersize": 3}
                every = max(1, len(points) // 8)  # a marker here and there tells lines apart
                axis.plot(*zip(*points, strict=True), label=canvas.plain(stage), markevery=every, **style)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    canvas.save(figure, path)


def losses(stages: Mapping[str, Records], path: epath.Path) -> None:
    """Draw training loss against the step, a panel for each supervised stage."""
    figure, axes = canvas.panels(len(stages), 2.6)
    for axis, (stage, records) in zip(axes, stages.items(), strict=True):
        for prefix, style in (("", "-"), ("eval/", "o")):
            points = [(record["step"], record[prefix + "loss"]) for record in records if prefix + "loss" in record]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color=COLOURS[bool(prefix)],
                    markersize=4,
                    linewidth=1.3,
                    label="held out" if prefix else "training",
                )
        axis.set_title(canvas.plain(stage), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    canvas.save(figure, path)


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
    figure, (axis,) = canvas.figure()
    for index, (name, histogram) in enumerate(gaps.items()):
        axis.stairs(
            histogram["counts"],
            histogram["edges"],
            label=titles.get(name, name),
            fill=name in ("wl", "lw"),
            alpha=0.45 if name in ("wl", "lw") else 1.0,
            linewidth=1.6,
            color=COLOURS[index],
        )
    axis.set_xlabel("r_gap")
    axis.set_ylabel("held-out records")
    axis.legend(frameon=False, fontsize=8)
    canvas.save(figure, path)
