"""Pictures of figures with intervals, whatever they are of: dots, lines and histograms, drawn into PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.evaluation import canvas
from pit_jax.evaluation.estimates import Figure

_BINS = 41


def dots(series: Mapping[str, Sequence[Figure]], labels: Sequence[str], axis_label: str, path: epath.Path) -> None:
    """Draw figures as dots with their intervals, a band for each label and a colour for each series.

    Args:
      series: name -> one figure for each label.
      labels: what is measured, from the top down.
      axis_label: of the numbers.
      path: of the PNG file.
    """
    drawn, (axis,) = canvas.figure(6.4, 0.9 + len(labels) * (0.2 + 0.14 * len(series)))
    for index, (name, figures) in enumerate(series.items()):
        places = np.arange(len(labels)) + 0.7 * ((index + 0.5) / len(series) - 0.5)
        style = canvas.line_style(index) | {"linestyle": "none"}
        low, high = np.array([found.ci95 for found in figures]).T
        axis.hlines(places, low, high, color=style["color"], linewidth=style["linewidth"])
        axis.plot([found.value for found in figures], places, label=canvas.plain(name), **style)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(axis_label)
    canvas.legend(axis, len(series))
    canvas.save(drawn, path)


def lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Figure]]]],
    levels: Mapping[str, Figure],
    axis_label: str,
    path: epath.Path,
) -> None:
    """Draw figures against a whole number, with their intervals as bands: a panel for each scale, a line for each name.

    Args:
      panels: label of the scale -> name -> (number, figure), in order.
      levels: name -> the same measure of something else, drawn as a dotted line across.
      axis_label: of the number.
      path: of the PNG file.
    """
    drawn, axes = canvas.figure(max(6.0, 3.2 * len(panels)), 3.2, len(panels))
    for axis, (label, series) in zip(axes, panels.items(), strict=True):
        for index, (name, points) in enumerate(series.items()):
            style = canvas.line_style(index)
            xs = [x for x, _ in points]
            low, high = np.array([found.ci95 for _, found in points]).T
            axis.plot(xs, [found.value for _, found in points], label=canvas.plain(name), **style)
            axis.fill_between(xs, low, high, color=style["color"], alpha=0.13, linewidth=0)
            if name in levels:
                axis.axhline(levels[name].value, color=style["color"], linewidth=1.2, linestyle=":")
            axis.set_xticks(xs)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(axis_label)
        axis.set_ylabel(label)
        if len(series) > 1:
            canvas.legend(axis, len(series))
    canvas.save(drawn, path)


def histograms(
    panels: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]], axis_label: str, count_label: str, path: epath.Path
) -> None:
    """Draw histograms as outlines: a panel for each title, an outline for each name in it.

    Args:
      panels: title -> name -> numbers; those of one panel share their bins.
      axis_label: of the numbers.
      count_label: of what is counted.
      path: of the PNG file.
    """
    drawn, axes = canvas.panels(len(panels), 2.8) if len(panels) > 1 else canvas.figure()
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        everything = np.concatenate(list(found.values()))
        low, high = (float(everything.min()), float(everything.max())) if len(everything) else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1.0, _BINS)
        for index, (name, numbers) in enumerate(found.items()):
            style = canvas.line_style(index)
            counts, _ = np.histogram(numbers, edges)
            axis.stairs(counts, edges, label=canvas.plain(name), linewidth=1.5, color=style["color"])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(canvas.plain(title), fontsize=10)
        axis.set_xlabel(axis_label)
    axes[0].set_ylabel(count_label)
    canvas.legend(axes[-1], len(next(iter(panels.values()))))
    canvas.save(drawn, path)
