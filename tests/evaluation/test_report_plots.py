"""What the pictures show: the numbers they were given, where they belong."""

import numpy as np
import pytest
from etils import epath

from pit_jax.evaluation import canvas, plots
from pit_jax.evaluation.plots import Axes, Bar, LengthMark, Point

from . import reports

NOWHERE = epath.Path("nowhere.png")


@pytest.fixture
def drawn(monkeypatch):
    """Return a list to which every figure goes instead of to a file."""
    found = []
    monkeypatch.setattr(canvas, "save", lambda figure, path: found.append(figure))
    yield found
    from matplotlib import pyplot

    for figure in found:
        pyplot.close(figure)


def _names(axis):
    """Return the labels of the y axis by their places."""
    return dict(zip(axis.get_yticks(), [label.get_text() for label in axis.get_yticklabels()], strict=True))


def _dots(axis):
    return [line for line in axis.lines if line.get_linestyle() == "None" and line.get_marker() == "o"]


def test_forest_puts_each_value_beside_its_name(drawn):
    bars = [Bar("up", 5.0, 1.0, 9.0), Bar("down", -5.0, -9.0, -1.0), Bar("unsure", 1.0, -1.0, 3.0)]
    plots.forest(bars, "Delta", NOWHERE)
    (axis,) = drawn[0].axes
    names = _names(axis)
    found = {names[dot.get_ydata()[0]]: (dot.get_xdata()[0], dot.get_color()) for dot in _dots(axis)}
    assert found == {"up": (5.0, canvas.BETTER), "down": (-5.0, canvas.WORSE), "unsure": (1.0, canvas.UNSURE)}
    assert max(names) == next(place for place, name in names.items() if name == "up")
    level = [line for line in axis.lines if len(line.get_xdata()) == 2 and np.ptp(line.get_ydata()) == 0]
    spans = {names[line.get_ydata()[0]]: tuple(line.get_xdata()) for line in level}
    assert spans == {"up": (1.0, 9.0), "down": (-9.0, -1.0), "unsure": (-1.0, 3.0)}


def test_bars_of_outcomes_fill_a_hundred_percent(drawn):
    rows = reports.rows()
    plots.outcomes(rows, NOWHERE)
    (axis,) = drawn[0].axes
    names = _names(axis)
    widths = {}
    for patch in axis.patches:
        widths.setdefault(names[round(patch.get_y() + patch.get_height() / 2)], []).append(patch.get_width())
    assert set(widths) == {row.candidate for row in rows}
    assert all(widths[row.candidate] == pytest.approx([row.win, row.tie, row.lose]) for row in rows)
    assert all(sum(found) == pytest.approx(100) for found in widths.values())


@pytest.mark.parametrize("count", [2, 6])
def test_lines_go_through_their_points_in_order(drawn, count):
    series = {f"s{i}": [Point(3, i + 1.0, i, i + 2), Point(1, i - 1.0, i - 2, i)] for i in range(count)}
    plots.lines(series, Axes(x="x", y="y", zero=0.0, whole=True), NOWHERE)
    (axis,) = drawn[0].axes
    found = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert list(found) == list(series)
    for i, line in enumerate(found.values()):
        assert line.get_xdata() == pytest.approx([1, 3], abs=0.05)
        assert list(line.get_ydata()) == [i - 1.0, i + 1.0]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in found.values()}
    assert len(looks) == count
    spans = np.concatenate([path.vertices for bars in axis.collections for path in bars.get_paths()])
    assert spans[:, 1].max() == pytest.approx(count - 1 + 2)
    assert spans[:, 1].min() == pytest.approx(-2)


def test_ratings_are_sorted_and_both_methods_stay_together(drawn):
    rated = reports.ratings("exact")
    tables = {"Bradley-Terry": plots.bars_of(rated.bradley_terry), "ELO": plots.bars_of(rated.elo)}
    plots.rated(tables, 1000.0, NOWHERE)
    (axis,) = drawn[0].axes
    names = _names(axis)
    assert [names[place] for place in sorted(names, reverse=True)] == [row.system for row in rated.bradley_terry.rows]
    for dots, table in zip(_dots(axis), (rated.bradley_terry, rated.elo), strict=True):
        found = {names[round(y)]: x for x, y in zip(dots.get_xdata(), dots.get_ydata(), strict=True)}
        assert found == {row.system: row.rating for row in table.rows}
    plots.ratings(rated.elo, NOWHERE)
    assert _dots(drawn[1].axes[0])[0].get_label() == rated.elo.method


def test_lengths_have_three_marks_a_row(drawn):
    marks = [LengthMark(f"s{i}", Bar("", i, i - 1, i + 1), Bar("", i / 2, 0, i), 10.0 * i) for i in range(3)]
    plots.lengths(marks, NOWHERE)
    (axis,) = drawn[0].axes
    names = _names(axis)
    shown = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    for label, expected in (
        ("Delta", [0, 1, 2]), ("Delta at equal lengths", [0, 0.5, 1]), ("a judge of length alone", [0, 10, 20]),
    ):  # fmt: skip
        line = shown[label]
        found = {names[round(y)]: x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        assert found == dict(zip(("s0", "s1", "s2"), expected, strict=True))


def test_losses_have_a_panel_for_each_stage(drawn):
    stages = {f"stage_{i}": [{"step": s, "loss": float(s)} for s in range(1, 4)] for i in range(6)}
    plots.losses(stages, NOWHERE)
    assert [axis.get_title() for axis in drawn[0].axes] == list(stages)
    assert all(list(axis.lines[0].get_ydata()) == [1.0, 2.0, 3.0] for axis in drawn[0].axes)
