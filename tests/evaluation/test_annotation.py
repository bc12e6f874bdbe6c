"""People as judges: what is handed out, what comes back, and everything that can be wrong with it."""

import csv
import io
import json
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation.annotation import Pack, write_pack
from pit_jax.evaluation.annotation_votes import read_votes
from pit_jax.evaluation.pairwise import Question
from pit_jax.evaluation.people import People
from pit_jax.io import files

EVIL = '</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> & "quoted", \u2028 ; \'\r\n\ttab\r=1+1'
STARTS = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "'quoted", "plain", "", 'a "b", c;d\r\ne\nf\rg']


def _questions(n=20):
    found = [Question(f"Human: question {i} {EVIL}", f"good {i} {STARTS[i % 10]}", STARTS[i % 10]) for i in range(n)]
    return [question._replace(first=question.second + " better") for question in found]


def _pack(**changes):
    return Pack(**{"annotators": ("ann", "bob", "cy"), "seed": 1, **changes})


def _write(tmp_path, questions, **changes):
    pages = write_pack(questions, _pack(**changes), tmp_path / "out", key=tmp_path / "key.json")
    return {page.stem.removeprefix("annotate_"): page for page in pages}


def _data(page):
    """Return what the page's script reads."""
    text = page.read_text()
    return json.loads(re.search(r'<script type="application/json" id="pack">(.*?)</script>', text, re.S)[1])


def _prefers_better(item):
    return "left" if item["left"].endswith(" better") else "right"


def _json_votes(tmp_path, page, choose=_prefers_better, name=None, keep=lambda k: True):
    """Write the file that the page's download makes."""
    data = _data(page)
    votes = [
        {"id": item["id"], "vote": choose(item), "seconds": 2.5, **item}
        for k, item in enumerate(data["items"]) if keep(k)
    ]  # fmt: skip
    content = {key: data[key] for key in ("format", "pack", "annotator")} | {"votes": votes}
    path = tmp_path / (name or f"votes_{data['annotator']}.json")
    files.write_json(path, content)
    return path


def _csv_votes(tmp_path, sheet, choose, *, separator=",", newline="\r\n", name="votes.csv"):
    """Fill in the table as a spreadsheet would: guards stay, separators and line ends are its own."""
    rows = list(csv.reader(io.StringIO(sheet.read_bytes().decode("utf-8-sig"), newline="")))
    for row in rows[1:]:
        row[5] = choose(dict(zip(rows[0], (cell.removeprefix("'") for cell in row), strict=True)))
    out = io.StringIO(newline="")
    # Python quotes a lone carriage return only where it is part of the line end; spreadsheets always do.
    quoting = csv.QUOTE_ALL if newline == "\n" else csv.QUOTE_MINIMAL
    csv.writer(out, delimiter=separator, lineterminator=newline, quoting=quoting).writerows(rows)
    path = tmp_path / name
    path.write_bytes(out.getvalue().encode("utf-8"))
    return path


def test_everyone_gets_every_question_in_an_own_order_with_half_of_the_sides_exchanged(tmp_path):
    questions = _questions()
    data = {name: _data(page) for name, page in _write(tmp_path, questions).items()}
    orders = [[item["prompt"] for item in entry["items"]] for entry in data.values()]
    assert len(orders) == 3
    assert all(sorted(order) == sorted(q.prompt for q in questions) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    for entry in data.values():
        assert sum(_prefers_better(item) == "left" for item in entry["items"]) == 10
    sides = [{item["prompt"]: _prefers_better(item) for item in entry["items"]} for entry in data.values()]
    assert sides[0] != sides[1]
    codes = [item["id"] for entry in data.values() for item in entry["items"]]
    assert len(set(codes)) == 60


def test_an_overlap_is_shared_and_the_rest_divided(tmp_path):
    data = {name: _data(page) for name, page in _write(tmp_path, _questions(), overlap=0.25).items()}
    prompts = [{item["prompt"] for item in entry["items"]} for entry in data.values()]
    assert [len(part) for part in prompts] == [10, 10, 10]
    assert len(prompts[0] & prompts[1] & prompts[2]) == 5
    assert len(prompts[0] | prompts[1] | prompts[2]) == 20
    assert len(prompts[0] & prompts[1]) == 5


def test_the_files_handed_out_are_blind_and_inert(tmp_path):
    pages = _write(tmp_path, _questions())
    text = pages["ann"].read_text()
    items = _data(pages["ann"])["items"]
    assert set(items[0]) == {"id", "prompt", "left", "right"}
    assert {item["prompt"] for item in items} == {question.prompt for question in _questions()}
    assert text.count("<script") == 2
    assert "onerror" in text
    assert "<img" not in text
    assert "http" not in re.sub(r'http-equiv="', "", text)
    assert "default-src 'none'" in text
    assert "swapped" not in text
    assert "first" not in json.dumps(items)
    # No cell may begin with what a spreadsheet runs.
    rows = list(csv.reader(io.StringIO((tmp_path / "out" / "annotate_ann.csv").read_text("utf-8-sig"), newline="")))
    assert rows[0] == ["annotator", "id", "prompt", "left", "right", "vote"]
    assert not [cell for row in rows for cell in row if re.match(r"[=+\-@\t\r]", cell)]
    assert "key" not in "".join(path.name for path in (tmp_path / "out").iterdir())


def test_the_same_seed_writes_the_same_files_and_another_key_is_not_overwritten(tmp_path):
    first = _write(tmp_path, _questions())["bob"].read_bytes()
    assert _write(tmp_path, _questions())["bob"].read_bytes() == first
    with pytest.raises(DataError, match="key of another pack"):
        _write(tmp_path, _questions(), seed=2)


def test_votes_come_back_on_the_right_side_from_pages_and_tables(tmp_path):
    questions = [*_questions(), Question("same", "equal", "equal")]
    pages = _write(tmp_path, questions)
    sheets = {name: tmp_path / "out" / f"annotate_{name}.csv" for name in pages}
    people = read_votes(
        tmp_path / "key.json",
        [
            _json_votes(tmp_path, pages["ann"]),
            _csv_votes(tmp_path, sheets["bob"], _prefers_better, separator=";", newline="\n", name="bob.csv"),
            _csv_votes(
                tmp_path, sheets["cy"], lambda row: {"left": " 3", "right": "1 "}[_prefers_better(row)], name="cy.csv"
            ),
        ],
    )
    assert np.array_equal(people.outcomes[:20], np.tile([1.0, 1.0, -1.0], (20, 1)))
    assert np.isnan(people.outcomes[20]).all()
    assert not people.asked[20].any()
    verdicts = people.verdicts(questions)
    assert [verdict.outcome for verdict in verdicts] == [1.0] * 20 + [0.0]
    assert verdicts[0].reason == "2 for the first, 1 for the second, 0 for a tie"
    assert people.verdicts([questions[0].swapped()])[0].outcome == -1.0
    assert np.isnan(people.verdicts([Question("new", "a", "b")])[0].outcome)
    groups = [question.prompt for question in questions]
    found = people.agreement(groups, seed=0)
    assert (found.pairs[0].raw.value, found.pairs[1].raw.value, found.raw.value) == (1.0, 0.0, pytest.approx(1 / 3))
    assert people.gaps() == []
    assert people.describe(seed=0)[0] == "ann: 20 votes, 2.5 s each (median), 50 % for the left (p = 1)."
    assert people.left_shares(seed=0)["cy"].percent == 50.0


@hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=3, max_size=3))
def test_any_text_survives_the_table(tmp_path, texts):
    (tmp_path / "key.json").unlink(missing_ok=True)
    question = Question(texts[0], texts[1] + "1 better", texts[2] + "2")
    _write(tmp_path, [question], annotators=("ann",))
    table = _csv_votes(tmp_path, tmp_path / "out" / "annotate_ann.csv", _prefers_better)
    assert read_votes(tmp_path / "key.json", [table]).outcomes.tolist() == [[1.0]]


def test_majorities_and_ties():
    people_votes = {
        "2 first": ([1, 1, -1], 1.0), "one each": ([1, -1, 0], 0.0), "split": ([1, -1, np.nan], 0.0),
        "tie leads": ([0, 0, 1], 0.0), "one of one": ([np.nan, -1, np.nan], -1.0), "half ties": ([1, 0, np.nan], 0.0),
    }  # fmt: skip
    questions = tuple(Question(name, "a", "b") for name in people_votes)
    votes = np.array([row for row, _ in people_votes.values()], np.float64)
    people = People(
        questions=questions, annotators=("a", "b", "c"), asked=~np.isnan(votes), sides=votes, outcomes=votes,
        seconds=np.full(votes.shape, np.nan), repeated=0,
    )  # fmt: skip
    assert [v.outcome for v in people.verdicts(questions)] == [outcome for _, outcome in people_votes.values()]


def test_missing_and_repeated_votes_are_counted(tmp_path, caplog):
    pages = _write(tmp_path, _questions())
    some = _json_votes(tmp_path, pages["ann"], keep=lambda k: k < 15)
    again = _json_votes(tmp_path, pages["ann"], name="again.json", keep=lambda k: k in (3, 16))
    table = _csv_votes(tmp_path, tmp_path / "out" / "annotate_bob.csv", lambda row: "", name="empty.csv")
    people = read_votes(tmp_path / "key.json", [some, again, table])
    assert np.sum(~np.isnan(people.sides), axis=0).tolist() == [16, 0, 0]
    assert people.repeated == 1
    assert "ann has voted on 16 of 20 questions" in caplog.text
    assert "bob has voted on 0 of 20 questions" in caplog.text
    assert "1 votes were given twice" in people.describe(seed=0)[-1]
    assert people.agreement([q.prompt for q in people.questions], seed=0).raw.items == 0


def test_contradicting_unknown_and_edited_votes_are_refused_together(tmp_path):
    pages = _write(tmp_path, _questions())
    good = _json_votes(tmp_path, pages["ann"])
    other = _json_votes(tmp_path, pages["ann"], lambda item: "tie", name="other.json")
    with pytest.raises(DataError, match=r"20 votes cannot be used:(.|\n)*second, different vote of ann") as error:
        read_votes(tmp_path / "key.json", [good, other])
    assert len(str(error.value).splitlines()) == 12
    content = files.read_json(good)
    changes = [
        ({"id": "0" * 12}, "not one of ann's questions"),
        ({"left": "something else"}, "the left of .* differs from what was handed out"),
        ({"vote": "both"}, "'both' must be left, right or tie"),
    ]
    for change, message in changes:
        edited = content | {"votes": [content["votes"][0] | change]}
        files.write_json(tmp_path / "edited.json", edited)
        with pytest.raises(DataError, match=message):
            read_votes(tmp_path / "key.json", [tmp_path / "edited.json"])
    for change, message in (
        ({"annotator": "anne"}, "Did you mean 'ann'"), ({"annotator": "bob"}, "belongs to another pack"),
        ({"pack": "0" * 64}, "belongs to another pack"),
    ):  # fmt: skip
        files.write_json(tmp_path / "edited.json", content | change)
        with pytest.raises(DataError, match=message):
            read_votes(tmp_path / "key.json", [tmp_path / "edited.json"])


def test_an_edited_key_is_refused(tmp_path):
    votes = _json_votes(tmp_path, _write(tmp_path, _questions())["ann"])
    key = files.read_json(tmp_path / "key.json")
    key["questions"][0][1] = "another response"
    files.write_json(tmp_path / "edited.json", key)
    with pytest.raises(DataError, match="was edited after it was written"):
        read_votes(tmp_path / "edited.json", [votes])
    with pytest.raises(DataError, match="is not a key"):
        read_votes(votes, [votes])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"format": "other"}', "is not a file of votes"),
        ("a.json", b'{"format": "pit_jax.votes.1", "pack": "x", "annotator": "ann"}', "damaged"),
        ("a.json", b'{"format": "pit_jax.votes.1", "pack": "x", "annotator": "ann", "votes": [1]}', "damaged"),
        ("a.csv", b"", "must begin with the columns"),
        ("a.csv", b"id,vote\n1,left\n", "must begin with the columns"),
        ("a.csv", b"annotator,id,prompt,left,right,vote\nann,1\n", "record 2 has 2 cells"),
        ("a.csv", b'annotator,id,prompt,left,right,vote\n"ann\n', "is not CSV"),
        ("a.csv", b"\xff\xfe", "is not UTF-8"),
        ("a.xlsx", b"", "must end in .json or .csv"),
    ],
)
def test_files_that_are_not_votes_are_refused(tmp_path, name, content, message):
    _write(tmp_path, _questions())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_votes(tmp_path / "key.json", [tmp_path / name])


def test_bad_packs_are_refused(tmp_path):
    for changes, message in (
        ({"annotators": ()}, "at least one person"), ({"annotators": ("a", "a")}, "each once"),
        ({"annotators": ("../x",)}, "names a file"), ({"overlap": 1.5}, "overlap = 1.5"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            _pack(**changes)
    with pytest.raises(DataError, match="nothing to ask"):
        write_pack([Question("x", "a", "a")], _pack(), tmp_path / "out", key=tmp_path / "key.json")
    with pytest.raises(DataError, match="Question 1 holds half of a character"):
        write_pack([Question("x", "\ud800", "a")], _pack(), tmp_path / "out", key=tmp_path / "key.json")
    with pytest.raises(DataError, match="must not lie in"):
        write_pack(_questions(), _pack(), tmp_path / "out", key=tmp_path / "out" / "key.json")
    with pytest.raises(DataError, match=r"missing.csv does not exist"):
        read_votes(_write(tmp_path, _questions()) and tmp_path / "key.json", [tmp_path / "missing.csv"])
