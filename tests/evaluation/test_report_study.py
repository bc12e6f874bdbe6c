"""The report of a study: the same figures in three forms, pictures drawn, and settings checked."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import pytest
from etils import epath

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import plots
from pit_jax.evaluation.document import Estimate, Plot, Rerun, Table
from pit_jax.evaluation.plots import Axes, Bar, LengthMark, Point
from pit_jax.evaluation.study_report import StudyReport, write_study

from . import reports


def _report(**changes):
    bars = [Bar("pit", 12.0, 8.0, 16.0), Bar("dpo", 1.0, -3.0, 5.0)]
    marks = [LengthMark("pit", bars[0], bars[1], 4.0)]
    series = {"pit": [Point(2, 1.0, 0.5, 1.5), Point(1, 0.0, -0.5, 0.5)]}
    axes = Axes(x="steps", y="Delta, points", zero=0.0, whole=True)
    found = StudyReport(
        title="Which <terms> help?",
        question="Does `r_gap` need all five terms?",
        answer="It does | here.",
        facts={"prompts": "1,000 held-out ones"},
        tables=[
            Table(
                title="Delta",
                header=("system", "Delta", "n", "share"),
                rows=[("pit", Estimate(value=12.0, ci95=(8.0, 16.0)), 1000, 0.25), ("dpo", "–", 3, math.nan)],
            ),
            Table(header=("a",), rows=[]),
        ],
        plots=[
            Plot(name="forest.png", caption="Delta.", draw=functools.partial(plots.forest, bars, "Delta")),
            Plot(name="lines.png", caption="By step.", draw=functools.partial(plots.lines, series, axes)),
            Plot(name="length.png", caption="Length.", draw=functools.partial(plots.lengths, marks)),
            Plot(name="rated.png", caption="R.", draw=functools.partial(plots.rated, {"ELO": bars}, None)),
            Plot(
                name="table.png",
                caption="T.",
                draw=functools.partial(plots.ratings, reports.ratings("exact").bradley_terry),
            ),
        ],
        warnings=["The judge is <weak>."],
        notes=["One seed."],
        rerun=Rerun(command="pit-jax pipeline", seed=1, versions={}, config="x = 1", inputs={"a": "b"}),
        data={"raw": [1.0, math.inf]},
    )
    return dataclasses.replace(found, **changes)


def test_all_forms_have_the_same_figures(tmp_path):
    assert (
        write_study(_report(), epath.Path(tmp_path) / "deep" / "study") == tmp_path / "deep" / "study" / "report.html"
    )
    directory = tmp_path / "deep" / "study"
    text, shown = ((directory / name).read_text() for name in ("report.md", "report.html"))
    data = json.loads((directory / "report.json").read_text())
    assert text.startswith(
        "# Which \\<terms> help?\n\n## Question\n\nDoes `r_gap` need all five terms?\n\nIt does \\| here.\n\n> * "
    )
    assert "| pit | +12.0 [+8.0, +16.0] | 1000 | 0.25 |\n| dpo | – | 3 | – |" in text
    assert '<td class="n">+12.0 [+8.0, +16.0]</td><td class="n">1000</td>' in shown
    assert "<code>r_gap</code>" in shown and "The judge is &lt;weak&gt;." in shown
    assert data["tables"][0]["rows"] == [
        ["pit", {"value": 12.0, "ci95": [8.0, 16.0]}, 1000, 0.25],
        ["dpo", "–", 3, None],
    ]
    assert data["data"] == {"raw": [1.0, None]}
    assert data["rerun"]["command"] == "pit-jax pipeline"
    for name in ("forest", "lines", "length", "rated", "table"):
        assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text
    assert re.findall(r"^## (.*)$", text, re.M) == ["Question", "Figures", "Pictures", "Notes", "Run it again"]


def test_it_can_be_written_again_and_leaves_nothing_half_done(tmp_path):
    directory = epath.Path(tmp_path)
    write_study(_report(), directory)
    names = sorted(path.name for path in directory.iterdir())
    write_study(_report(answer=""), directory)
    assert sorted(path.name for path in directory.iterdir()) == names
    assert "It does" not in (directory / "report.md").read_text()


def test_a_report_of_a_table_alone(tmp_path):
    plain = StudyReport(title="t", question="q?", facts={}, tables=[Table(header=("a",), rows=[(1,)])])
    write_study(plain, epath.Path(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text())["rerun"] is None


def test_what_cannot_be_a_report_is_refused():
    with pytest.raises(ConfigError, match="StudyReport.tables.*at least one table"):
        _report(tables=[])
    twice = _report().plots[0]
    with pytest.raises(ConfigError, match="StudyReport.plots.*different names"):
        _report(plots=[twice, twice])


def test_the_example_of_the_manual_works(tmp_path, monkeypatch):
    manual = (pathlib.Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", manual, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "| pit | +37.7 [+34.2, +41.2] |" in (tmp_path / "my_report" / "report.md").read_text()
