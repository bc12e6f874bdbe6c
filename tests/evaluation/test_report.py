"""The report: what it says equals what it was given, and the page needs nothing but itself."""

import dataclasses
import html.parser
import json

import pytest
from etils import epath

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import judges, page, report, winrate


def _row(candidate, baseline="original", delta=12.5, temperature=1.0):
    return winrate.Comparison(
        candidate=candidate, baseline=baseline, judge="exact", n=8, win=50.0, lose=37.5, tie=12.5, delta=delta,
        ci95=(delta - 5, delta + 5), temperature_candidate=temperature, temperature_baseline=temperature, seed=3,
        mean_candidate=0.7, mean_baseline=0.6, length_candidate=9.0, length_baseline=8.5,
    )  # fmt: skip


def _report():
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 5.0]}
    return report.Report(
        title="A <run>", seed=3, facts={"model": "2 x 64"}, notes=("honest & short",),
        comparisons=(_row("pit"), _row("pit_iter2", delta=15.0), _row("pit_raw"), _row("pit", temperature=0.4)),
        policy_curve=((50, (_row("pit"),)), (100, (_row("pit", delta=4.0),))), original_steps=100,
        quality={"pit": {1.0: (0.7, 0.6, 0.8), 0.4: (0.75, 0.7, 0.8)}},
        reward_models={
            "gap": {
                "accuracy": {"wl > ww": {"value": 0.9, "ci95": [0.8, 0.95], "n": 100}},
                "scalars": {"length correlation": 0.01},
                "histograms": {name: histogram for name in ("wl", "ww", "ll", "lw")},
            }
        },
        supervised={"sft": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval/loss": 1.1}]},
        reinforced={"rl": [{"step": 1, "reward/mean": 0.1, "kl/mean": 0.0, "length/mean": 8.0, "eos_rate": 1.0}]},
        examples=(
            report.Example(
                prompt="say <b>", original="a b c", improved="a x c", score_original=0.5, score_improved=1.0
            ),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = epath.Path(tmp_path_factory.mktemp("report"))
    report.write(_report(), directory)
    return directory


def test_report_json_holds_the_comparisons(written):
    data = json.loads((written / "report.json").read_text())
    assert len(data["comparisons"]) == 4
    wanted = {"candidate", "baseline", "judge", "n", "win", "lose", "tie", "delta", "ci95", "temperature_candidate"}
    assert wanted | {"temperature_baseline", "seed"} <= set(data["comparisons"][0])
    assert data["comparisons"][0]["ci95"] == [7.5, 17.5]
    assert data["policy_curve"][1]["rlhf_steps"] == 100


def test_every_picture_is_drawn_and_linked(written):
    names = {"delta", "temperature", "iterations", "policy_steps", "reinforcement", "losses", "gaps_gap"}
    text = (written / "report.md").read_text()
    for name in names:
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_well_formed_and_escaped(written):
    parsed = _Page()
    parsed.feed((written / "report.html").read_text())
    assert not parsed.open
    assert parsed.sources and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "A <run>" in parsed.text and "say <b>" in parsed.text and "[+7.5, +17.5]" in parsed.text


def test_difference_marks_only_what_changed():
    before, after = page.difference("the cat sat", "the dog sat <now>")
    assert before == "the <del>cat</del> sat"
    assert after == "the <ins>dog</ins> sat <ins>&lt;now&gt;</ins>"


def test_main_rows_keep_one_temperature_and_one_judge():
    rows = report.main_rows(_report())
    assert [row.candidate for row in rows] == ["pit", "pit_iter2", "pit_raw"]
    only = dataclasses.replace(_report(), comparisons=(_row("a", baseline="b"),))
    assert report.main_rows(only) == []


def test_function_judge_and_its_import_path():
    judge = judges.FunctionJudge(name="length", function=lambda prompt, response: len(response) / 10)
    assert judge.scores(["x", "y"], ["abc", ""]).tolist() == [0.3, 0.0]
    assert judges.import_function("pit_jax.evaluation.page:section") is page.section
    with pytest.raises(ConfigError, match="Did you mean 'section'"):
        judges.import_function("pit_jax.evaluation.page:sectoin")
    with pytest.raises(ConfigError, match="import path"):
        judges.import_function("no.such.module:f")
