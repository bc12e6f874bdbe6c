"""What all pictures have in common: how figures, lines and legends look, and how a picture becomes a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#577590", "#222222", "#c77dff")
BETTER, WORSE, UNSURE = "#2e8b57", "#d1495b", "#777777"
_STYLES = ("-", "--", ":")
_MARKERS = ("o", "s", "^", "D", "v")
_PANELS = 4
"""Panels of a picture side by side."""


def figure(width: float = 6.4, height: float = 3.5, count: int = 1) -> tuple[Any, Any]:
    """Return a figure and its `count` panels, a few in a row; width and height are the whole figure's, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(count, _PANELS)
    size = (width, height)
    drawn, axes = pyplot.subplots(-(-count // columns), columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    for axis in axes.flat[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(alpha=0.25, linewidth=0.6)
    return drawn, axes.flat[:count]


def panels(count: int, height: float) -> tuple[Any, Any]:
    """Return a figure of so many small panels, each of this height in inches."""
    return figure(3.2 * min(count, _PANELS), height * -(-count // _PANELS), count)


def save(drawn: Any, path: epath.Path) -> None:
    """Write a figure as a PNG file, and forget it."""
    from matplotlib import pyplot

    with path.open("wb") as file:
        drawn.savefig(file, format="png", dpi=130)
    pyplot.close(drawn)


def line_style(index: int) -> dict[str, Any]:
    """Return how the line with this number looks: no two of the first 24 are alike, in black and white either."""
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _STYLES[index // len(COLOURS) % len(_STYLES)],
        "linewidth": 1.8,
    }


def plain(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def legend(axis: Any, entries: int) -> None:
    """Put the legend beside a panel, if there are entries, in more columns where there are many."""
    if entries:
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axis.legend(frameon=False, fontsize=8, ncols=1 + entries // 16, handlelength=2.8, **place)


def name_rows(axis: Any, names: Sequence[str]) -> None:
    """Make the y axis a list of names, the first on top."""
    axis.set_yticks(range(len(names)), [plain(name) for name in reversed(names)])
    axis.set_ylim(-0.6, len(names) - 0.4)
