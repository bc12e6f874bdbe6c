"""AlpacaEval's files and figures: against files written out by hand and figures computed by hand."""

import json

import numpy as np
import pytest

from pit_jax.core.errors import DataError
from pit_jax.evaluation import alpaca, bias
from pit_jax.evaluation.pairwise import Verdict
from pit_jax.testing import comparisons

ANNOTATION = {
    "instruction": "Name a fruit.", "output_1": "An apple, of course.", "generator_1": "gpt4_1106_preview",
    "dataset": "helpful_base", "output_2": "A pear.", "generator_2": "pit",
    "annotator": "weighted_alpaca_eval_gpt4_turbo",
    "preference": 1.25, "raw_completion": None, "price_per_example": 0.01,
}  # fmt: skip


def _write(path, content):
    path.write_text(json.dumps(content))
    return path


def _annotations(preferences, tmp_path):
    rows = [ANNOTATION | {"instruction": f"i{k}", "preference": p} for k, p in enumerate(preferences)]
    return alpaca.read_annotations(_write(tmp_path / "annotations.json", rows))


def test_outputs_round_trip(tmp_path):
    rows = [
        {"dataset": "koala", "instruction": "é \u2028", "output": "a\nb", "generator": "pit"},
        {"instruction": "x", "output": "", "generator": "pit"},
    ]
    found = alpaca.read_outputs(_write(tmp_path / "in.json", rows))
    assert (found.generator, found.outputs, found.datasets) == ("pit", ("a\nb", ""), ("koala", None))
    alpaca.write_outputs(tmp_path / "out.json", found)
    assert json.loads((tmp_path / "out.json").read_text()) == rows


def test_annotations_round_trip(tmp_path):
    found = _annotations([1.0, 1.25, 1.5, 0.0, 2, None, float("nan")], tmp_path)
    assert (found.candidate, found.baseline) == ("pit", "gpt4_1106_preview")
    np.testing.assert_array_equal(found.preferences, [1.0, 1.25, 1.5, 1.5, 2.0, np.nan, np.nan])
    np.testing.assert_array_equal(found.outcomes, [-1.0, -0.5, 0.0, 0.0, 1.0, np.nan, np.nan])
    assert found.length_difference.tolist() == [7.0 - 20.0] * 7
    assert found.questions[0] == ("i0", "A pear.", "An apple, of course.")
    alpaca.write_annotations(tmp_path / "out.json", found)
    assert "NaN" not in (tmp_path / "out.json").read_text()
    again = alpaca.read_annotations(tmp_path / "out.json")
    np.testing.assert_array_equal(again.preferences, found.preferences)
    assert again.questions == found.questions


def test_win_rates_are_those_of_alpaca_eval(tmp_path):
    # By pandas: (p - 1).mean() * 100, .sem() * 100, and rounded preferences with 1.5 as half.
    figures = alpaca.win_rate(_annotations([1.0, 1.2, 1.6, 2.0, 1.5, None], tmp_path))
    values = np.array([0.0, 0.2, 0.6, 1.0, 0.5])
    assert figures.win_rate == pytest.approx(46.0)
    assert figures.standard_error == pytest.approx(100 * values.std(ddof=1) / np.sqrt(5))
    assert figures.discrete_win_rate == pytest.approx(50.0)
    assert (figures.n_wins, figures.n_wins_base, figures.n_draws, figures.n_total) == (2, 2, 1, 5)
    assert figures.avg_length == 7
    with pytest.raises(DataError, match="no preference at all"):
        alpaca.win_rate(_annotations([None, None], tmp_path))


def test_verdicts_become_annotations_with_repeated_instructions_paired_in_order(tmp_path):
    candidate, baseline = (
        alpaca.Outputs(generator=name, instructions=order, outputs=texts, datasets=(None,) * 3)
        for name, order, texts in (
            ("pit", ("a", "b", "a"), ("1", "2", "3")),
            ("base", ("a", "a", "b"), ("x", "y", "z")),
        )
    )
    asked = alpaca.questions(candidate, baseline)
    assert asked == [("a", "1", "x"), ("b", "2", "z"), ("a", "3", "y")]
    verdicts = [Verdict(1.0, "yes"), Verdict(0.0), Verdict(float("nan"), "no answer")]
    found = alpaca.annotate(candidate, baseline, verdicts, annotator="me")
    np.testing.assert_array_equal(found.preferences, [2.0, 1.5, np.nan])
    alpaca.write_annotations(tmp_path / "a.json", found)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows[0] == {
        "instruction": "a", "output_1": "x", "generator_1": "base", "output_2": "1", "generator_2": "pit",
        "annotator": "me", "preference": 2.0, "raw_completion": "yes",
    }  # fmt: skip
    with pytest.raises(DataError, match="2 verdicts for 3 questions"):
        alpaca.annotate(candidate, baseline, verdicts[:2], annotator="me")
    with pytest.raises(DataError, match="occurs 2 times in pit and 0 times in other"):
        other = alpaca.Outputs(generator="other", instructions=("b",), outputs=("x",), datasets=(None,))
        alpaca.questions(candidate, other)


def test_length_control_uses_characters_and_instructions(tmp_path):
    data = comparisons.lengths(
        200, 1, effects=(0.2, 1.0, 0.0), ties=0.0, shared=0.0, rng=np.random.default_rng(0)
    )  # fmt: skip
    sizes = 1500 + data.length_difference.astype(int)
    rows = [
        ANNOTATION
        | {"instruction": f"i{k}", "output_1": "x" * 1500, "output_2": "é" * max(size, 1), "preference": 1.5 + o / 2}
        for k, (size, o) in enumerate(zip(sizes, data.outcomes, strict=True))
    ]
    found = alpaca.read_annotations(_write(tmp_path / "a.json", rows))
    expected = bias.length_controlled(
        data.outcomes, np.maximum(sizes, 1) - 1500.0, [row["instruction"] for row in rows], seed=0
    )
    assert alpaca.length_controlled(found, seed=0) == expected


def test_calibration_is_read(tmp_path):
    lines = [
        "index,instruction_difficulty,std_delta_len,preference,not_gamed_baseline,model",
        "0,0.5,-1.5,0.25,False,verbose", "0,0.5,2.0,0.75,False,concise", "1,-0.25,1.0,,False,verbose",
    ]  # fmt: skip
    (tmp_path / "df_gamed.csv").write_text("\n".join(lines))
    difficulty, calibration = alpaca.read_calibration(tmp_path / "df_gamed.csv")
    assert difficulty == {0: 0.5, 1: -0.25}
    assert calibration.length.tolist() == [1.5, -2.0]
    assert calibration.win.tolist() == [0.25, 0.75]
    for text, message in (
        ("a,b\n1,2\n", "is not AlpacaEval's"), (lines[0] + "\n", "has no rows"),
        (lines[0] + "\n0,0.5,nan,0.1,False,x", "gaps in index, difficulty"),
        (lines[0] + "\n0,1,1,1.5,F,x", r"lie in \[0, 1\]"),
    ):  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            alpaca.read_calibration(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one object"),
        ({"a": 1}, "at least one object"),
        ([3], "entry 1 must be an object, not int"),
        ([{"instruction": "x", "generator": "g"}], "'output' must be a text, not None"),
        ([{"instruction": "x", "output": "y", "generator": g} for g in "ab"], r"must be the same in all entries"),
    ],
)
def test_bad_outputs_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        alpaca.read_outputs(_write(tmp_path / "bad.json", rows))


@pytest.mark.parametrize("preference", [0.5, 3, "1.5", True, -1])
def test_bad_preferences_are_refused(tmp_path, preference):
    with pytest.raises(DataError, match=r"entry 2: preference = .* must lie in \[1, 2\]"):
        _annotations([1.0, preference], tmp_path)
