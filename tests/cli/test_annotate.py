"""The verbs `annotate` and `votes`, from files of responses to what people said of them."""

import argparse
import csv
import io
import json

import numpy as np
import pytest

from pit_jax.cli import annotate
from pit_jax.core.errors import DataError
from pit_jax.evaluation.summary import summarise


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _write(tmp_path, **changes):
    # Every third prompt has the same response twice: a tie without asking.
    candidate = [{"prompt": f"p{i}", "improved": "good" if i % 3 else "same"} for i in range(12)]
    baseline = [
        {"instruction": f"p{i}", "output": "a long bad one" if i % 3 else "same", "generator": "base"}
        for i in reversed(range(12))
    ]
    (tmp_path / "base.json").write_text(json.dumps(baseline))
    options = {
        "candidate": _lines(tmp_path / "pit.jsonl", candidate) + ":improved", "baseline": str(tmp_path / "base.json"),
        "annotators": ["ann", "bob"], "seed": 1, "overlap": 1.0, "limit": None, "title": None, "instructions": None,
        "output": str(tmp_path / "pack"), "key": str(tmp_path / "key.json"),
    }  # fmt: skip
    annotate.annotate(argparse.Namespace(**(options | changes)))


def _vote(tmp_path, name, wrong):
    """Fill in a table; the first `wrong` questions get the vote for the worse response."""
    source = tmp_path / "pack" / f"annotate_{name}.csv"
    rows = list(csv.reader(io.StringIO(source.read_text("utf-8-sig"), newline="")))
    for number, row in enumerate(sorted(rows[1:], key=lambda row: row[2])):
        better = "left" if row[3] == "good" else "right"
        row[5] = {"left": "right", "right": "left"}[better] if number < wrong else better
    path = tmp_path / f"{name}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_from_responses_to_a_summary(tmp_path, capsys):
    _write(tmp_path)
    assert f"{tmp_path}/pack/annotate_bob.html" in capsys.readouterr().out
    chosen = [_vote(tmp_path, "ann", 0), _vote(tmp_path, "bob", 2)]
    options = {"key": str(tmp_path / "key.json"), "votes": chosen, "seed": 1}
    annotate.votes(argparse.Namespace(json=False, **options))
    text = capsys.readouterr().out
    # Eight questions: six agreed for the candidate, two one against one; four identical pairs are ties.
    assert "candidate against baseline: win 50.0 %, lose 0.0 %, tie 50.0 %, Delta +50.0" in text
    assert "Sign test over prompts: 6 to 0, 6 ties, p = 0.031." in text
    assert "The longer response wins 0.0 %" in text
    assert "ann and bob: the same on 75 % of 8 questions" in text
    assert "ann: 8 votes, 50 % for the left" in text
    annotate.votes(argparse.Namespace(json=True, **options))
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["delta"] == 50.0
    assert found["agreement"]["raw"]["value"] == 0.75
    assert len(found["people"]) == 2


def test_a_limit_asks_fewer(tmp_path, capsys):
    _write(tmp_path, limit=5, title="Which?", annotators=["cy"])
    assert "5 questions" in capsys.readouterr().out
    assert "<title>Which?</title>" in (tmp_path / "pack" / "annotate_cy.html").read_text()


def test_bad_files_of_responses_are_refused(tmp_path):
    path = _lines(tmp_path / "a.jsonl", [{"prompt": "x", "response": "y"}, {"prompt": "x"}])
    with pytest.raises(DataError, match=r"a.jsonl:2: field 'response' must be a text, not NoneType"):
        annotate.read_responses(path)
    with pytest.raises(DataError, match=r"field 'improved'"):
        annotate.read_responses(path + ":improved")
    with pytest.raises(DataError, match="has no line"):
        annotate.read_responses(_lines(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="there is no such file"):
        annotate.read_responses(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="occurs 1 times in"):
        _write(tmp_path, candidate=_lines(tmp_path / "c.jsonl", [{"prompt": "new", "response": "y"}]))


def test_a_summary_adds_up_and_leaves_out_what_is_open():
    outcomes = np.array([1.0, 1.0, -1.0, 0.0, np.nan, 0.5])
    found = summarise(outcomes, np.array([5.0, -2.0, 1.0, 0.0, 3.0, 4.0]), list("abcdef"), seed=0)
    assert (found.n, found.unanswered, found.groups) == (5, 1, 5)
    assert (found.win, found.lose, found.tie, found.delta) == (60.0, 20.0, pytest.approx(20.0), 40.0)
    assert found.ci95.low < 40 < found.ci95.high
    assert "1 without a verdict" in found.lines("a", "b")[0]
    same = summarise(np.zeros(4), np.zeros(4), list("abcd"), seed=0)
    assert same.lines("a", "b")[3] == "No comparison with a winner has responses of different lengths."
    with pytest.raises(DataError, match="Not one of 2 comparisons"):
        summarise(np.full(2, np.nan), np.zeros(2), ["a", "b"], seed=0)
