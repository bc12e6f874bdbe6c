"""Reading what a critic writes: in the form it was asked for, nearly so, and not at all."""

from __future__ import annotations

import pytest

from pit_jax.srt.critique import Critique, Drop, read_critique, read_score

ASKED = """### Weaknesses
It is short.
It is wrong.

### Suggestions
Write more: be right.

Overall Score: [[3]]

### Improved Response
The first line.

### A heading of its own
Overall Score: [[1]]"""
NUMBERED = """## 1 of my notes, which are no part
**Weaknesses:** too long
**Suggestions:** cut it
### Overall Score: [[ 7.5 ]]
#### improved response:
Short."""
SCORE_FIRST = "Overall Score: **[[2]]**\nSuggestion: cut\nWeakness:\nlong\n### Improved Response\nok"


def test_the_form_that_is_asked_for():
    assert read_critique(ASKED) == Critique(
        weaknesses="It is short.\nIt is wrong.",
        suggestions="Write more: be right.",
        score=3.0,
        refinement="The first line.\n\n### A heading of its own\nOverall Score: [[1]]",
    )


def test_near_misses_are_read():
    assert read_critique(NUMBERED) == Critique(weaknesses="too long", suggestions="cut it", score=7.5,
                                               refinement="Short.")  # fmt: skip
    assert read_critique(SCORE_FIRST) == Critique(weaknesses="long", suggestions="cut", score=2.0, refinement="ok")


def test_the_last_score_counts():
    twice = ASKED.replace("It is short.", "Overall Score: [[9]] would be too much.")
    found = read_critique(twice)
    assert isinstance(found, Critique) and found.score == 3.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("### Improved Response", "Improved Response"), "no_refinement"),
        (("### Improved Response\nThe first line.", "### Improved Response\n"), None),
        (("### Weaknesses", "Weaknesses of it are"), "no_weaknesses"),
        (("It is short.\nIt is wrong.\n", ""), "no_weaknesses"),
        (("### Suggestions", "### Ideas"), "no_suggestions"),
        (("Write more: be right.", " "), "no_suggestions"),
        (("Overall Score: [[3]]", "Overall Score: 3"), "no_score"),
        (("[[3]]", "[[11]]"), "no_score"),
        (("[[3]]", "[[0]]"), "no_score"),
        (("Overall Score: [[3]]", "[[3]]"), "no_score"),
    ],
)
def test_a_part_that_is_missing_empty_or_out_of_range_is_the_reason(change, reason):
    found = read_critique(ASKED.replace(*change))
    assert (found.reason if isinstance(found, Drop) else None) == reason


@pytest.mark.parametrize("text", ["", "###", "### Improved Response", "### Improved Response\n \n", "a" * 100_000])
def test_nonsense_is_dropped(text):
    assert isinstance(read_critique(text), Drop)


@pytest.mark.parametrize(
    ("text", "score"),
    [("Overall Score: [[7]]", 7.0), ("[[1]] or rather\n[[10]]", 10.0), ("[[2.5]]", 2.5), ("7", None), ("", None),
     ("[[12]]", None), ("[[5]] ... [[0]]", None), ("[7]", None), ("[[-3]]", None)],
)  # fmt: skip
def test_scores(text, score):
    assert read_score(text) == score
