"""The report: what it says equals what it was given, in all three forms, and the page needs nothing but itself."""

import dataclasses
import html.parser
import json
import math
import re

import pytest
from etils import epath

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import document, judges, page, plots, report, report_writer, winrate

from . import reports


def _row(candidate, baseline="original", delta=12.5, temperature=1.0, judge="exact"):
    return winrate.Comparison(
        candidate=candidate, baseline=baseline, judge=judge, n=8, win=50.0, lose=37.5, tie=12.5, delta=delta,
        ci95=(delta - 5, delta + 5), temperature_candidate=temperature, temperature_baseline=temperature, seed=3,
        mean_candidate=0.7, mean_baseline=0.6, length_candidate=9.0, length_baseline=8.5,
    )  # fmt: skip


def _small(**changes):
    """Return a report as evaluations made them before they had ratings and judges' facts."""
    found = report.Report(
        title="A <run>", seed=3, facts={"model": "2 x 64"}, notes=("honest & short",),
        comparisons=(_row("pit"), _row("pit_iter2", delta=15.0), _row("pit_raw"), _row("pit", temperature=0.4)),
        policy_curve=(), original_steps=None, quality={}, reward_models={}, supervised={}, reinforced={},
        examples=(
            report.Example(
                prompt="say <b>", original="a b c", improved="a x c", score_original=0.5, score_improved=1.0
            ),
        ),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


@pytest.fixture(scope="module")
def whole():
    return reports.whole()


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    directory = epath.Path(tmp_path_factory.mktemp("report"))
    assert report_writer.write(whole, directory) == directory / "report.html"
    return directory


def test_report_json_holds_all_figures(written, whole):
    data = json.loads((written / "report.json").read_text())
    assert len(data["comparisons"]) == len(whole.comparisons)
    wanted = {"candidate", "baseline", "judge", "n", "win", "lose", "tie", "delta", "ci95", "temperature_candidate"}
    assert wanted | {"temperature_baseline", "seed"} <= set(data["comparisons"][0])
    assert tuple(data["comparisons"][0]["ci95"]) == whole.comparisons[0].ci95
    assert data["policy_curve"][1]["rlhf_steps"] == 100
    assert {entry["system"] for entry in data["quality"]} == set(reports.QUALITY)
    first = data["ratings"][0]
    assert first["judge"] == "exact"
    assert first["bradley_terry"]["rows"][0]["rating"] == whole.ratings[0].bradley_terry.rows[0].rating
    assert data["lengths"][0]["summary"]["length"]["delta"] == whole.lengths[0].summary.length.delta
    assert data["judges"][2]["position"] == {"consistent": 40, "half": 5, "first": 75, "second": 5, "unanswered": 0}
    assert data["agreement"]["pairs"][0]["kappa"]["value"] == whole.agreement.pairs[0].kappa.value
    assert len(data["examples"]) == len(whole.examples)
    assert data["examples"][0]["opinions"][0] == {"judge": "exact", "outcome": "win", "detail": "0.50 → 1.00"}
    assert data["dropped"][0]["count"] == 3
    assert data["rerun"]["inputs"] == {"rl_policy:100": "ab" * 32}
    assert len(data["warnings"]) == 2


def test_every_picture_is_drawn_linked_and_shown(written):
    names = {
        "delta", "outcomes", "ratings", "ratings_iterations", "ratings_2", "ratings_iterations_2", "iterations",
        "temperature", "temperature_delta", "length", "policy_steps", "gaps_gap", "reinforcement", "losses",
    }  # fmt: skip
    assert {path.name for path in written.glob("*.png")} == {f"{name}.png" for name in names}
    text = (written / "report.md").read_text()
    for name in names:
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text
    assert (written / "report.html").read_text().count("data:image/png;base64,") == len(names)


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.targets, self.ids, self.text, self.open, self.kinds = [], [], [], "", [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.sources += [given[name] for name in ("src",) if name in given]
        self.targets += [given[name] for name in ("href",) if name in given]
        self.ids += [given[name] for name in ("id",) if name in given]
        self.kinds.append(tag)
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _parsed(path):
    parsed = _Page()
    parsed.feed(path.read_text())
    assert not parsed.open
    return parsed


def test_page_is_self_contained_well_formed_and_escaped(written):
    parsed = _parsed(written / "report.html")
    assert parsed.sources and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert set(parsed.targets) == {f"#{name}" for name in parsed.ids if f"#{name}" in parsed.targets}
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.kinds.count("script") == 1
    assert parsed.text.count(reports.EVIL.strip()) > 10
    assert "A <run>" in parsed.text and "gpt <4>" in parsed.text


def test_markdown_and_page_say_what_was_given(written, whole):
    for text in (_parsed(written / "report.html").text, (written / "report.md").read_text()):
        for row in whole.comparisons:
            assert f"{row.delta:+.1f} [{row.ci95[0]:+.1f}, {row.ci95[1]:+.1f}]" in text
        for entry in whole.ratings[0].elo.rows:
            assert f"{entry.rating:.0f} [{entry.low:.0f}, {entry.high:.0f}]" in text
        length = whole.lengths[0].summary.length
        assert f"{length.delta:+.1f} [{length.delta_ci95.low:+.1f}, {length.delta_ci95.high:+.1f}]" in text
        for points in whole.quality.values():
            assert all(f"{mean:.3f} [{low:.3f}, {high:.3f}]" in text for mean, low, high in points.values())
        assert "feedback without a score" in text
        assert "75 for the first place, 5 for the second" in text
        assert "120,345 / 9,876" in text
        assert whole.rerun.command in text


def test_a_report_of_few_things_has_few_sections(tmp_path):
    directory = epath.Path(tmp_path)
    report_writer.write(_small(), directory)
    text = (directory / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "Summary",
        "Iterations and temperature",
        "All comparisons",
        "Side by side",
        "Notes",
    ]
    assert {path.name for path in directory.glob("*.png")} == {
        "delta.png",
        "outcomes.png",
        "iterations.png",
        "temperature_delta.png",
    }
    assert "| system | Delta | win | lose | tie | n | length |\n" in text
    parsed = _parsed(directory / "report.html")
    assert "say <b>" in parsed.text and "[+7.5, +17.5]" in parsed.text and "0.50 → 1.00" in parsed.text


def test_a_report_without_comparisons_can_be_written(tmp_path):
    directory = epath.Path(tmp_path)
    report_writer.write(_small(comparisons=(), examples=()), directory)
    assert list(directory.glob("*.png")) == []
    assert json.loads((directory / "report.json").read_text())["comparisons"] == []


def test_intervals_that_do_not_exist_are_dashes_and_null(tmp_path):
    row = dataclasses.replace(_row("pit"), ci95=(math.nan, math.nan))
    report_writer.write(_small(comparisons=(row,)), epath.Path(tmp_path))
    assert "+12.5 [–, –]" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["comparisons"][0]["ci95"] == [None, None]


def test_main_rows_keep_one_temperature_and_one_judge():
    rows = report.main_rows(_small())
    assert [row.candidate for row in rows] == ["pit", "pit_iter2", "pit_raw"]
    assert report.main_rows(_small(comparisons=(_row("a", baseline="b"),))) == []
    # The temperature at which the most systems were compared, not the highest; the highest of equals.
    rows = (_row("a"), _row("a", temperature=0.5), _row("b", temperature=0.5), _row("a", temperature=0.5, judge="x"))
    assert [(row.candidate, row.judge) for row in report.main_rows(_small(comparisons=rows))] == [
        ("a", "exact"),
        ("b", "exact"),
    ]
    assert len(report.against_baseline(_small(comparisons=rows))) == 3
    assert report.main_rows(_small(comparisons=rows[:2]))[0].temperature_baseline == 1.0


def test_delta_by_each_judge_leaves_gaps_where_a_judge_was_not_asked():
    rows = (_row("pit"), _row("dpo"), _row("pit", judge="gpt", delta=3.0))
    (blocks,) = [s.blocks for s in report_writer.sections(_small(comparisons=rows)) if s.title == "Summary"]
    table = next(b for b in blocks if isinstance(b, document.Table) and "each judge" in b.title)
    assert list(table.header) == ["system", "exact", "gpt"]
    assert table.markdown().splitlines()[-3] == "| dpo | +12.5 [+7.5, +17.5] | – |"


def test_many_comparisons_are_folded_up():
    rows = [_row(f"system_{i}") for i in range(30)]
    text = "".join(
        block.markdown()
        for section in report_writer.sections(_small(comparisons=rows))
        if section.title == "All comparisons"
        for block in section.blocks
    )
    assert text.startswith("<details><summary>30 comparisons</summary>")
    assert text.count("| system_") == 30


@pytest.mark.parametrize("count", [1, 3, 5, 9, 26])
def test_pictures_of_any_number_of_systems_can_be_drawn(count, tmp_path):
    rows = [_row(f"s${i}_a$", delta=float(i - 3)) for i in range(count)]
    series = {row.candidate: [plots.Point(0, 1, math.nan, math.nan), plots.Point(1, 2, 1, 3)] for row in rows}
    plots.deltas(rows, epath.Path(tmp_path / "a.png"))
    plots.outcomes(rows, epath.Path(tmp_path / "b.png"))
    plots.lines(series, plots.Axes(x="x", y="y", whole=True), epath.Path(tmp_path / "c.png"))
    plots.losses({row.candidate: [{"step": 1, "loss": 1.0}] for row in rows}, epath.Path(tmp_path / "d.png"))
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "abcd")


def test_function_judge_and_its_import_path():
    judge = judges.FunctionJudge(name="length", function=lambda prompt, response: len(response) / 10)
    assert judge.scores(["x", "y"], ["abc", ""]).tolist() == [0.3, 0.0]
    assert judges.import_function("pit_jax.evaluation.page:section") is page.section
    with pytest.raises(ConfigError, match="Did you mean 'section'"):
        judges.import_function("pit_jax.evaluation.page:sectoin")
    with pytest.raises(ConfigError, match="import path"):
        judges.import_function("no.such.module:f")
