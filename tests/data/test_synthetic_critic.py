"""The synthetic set's critic: exact, in the set's own words, and never without a way to be better."""

from __future__ import annotations

import pytest

from pit_jax.data.synthetic import PRESETS, SyntheticConfig, critique, faults, generate, quality, rating, vocabulary

PROMPT = "goal from oak by red blue red green bring lamp end thanks"


def parts(text: str) -> tuple[str, str, int, str]:
    weaknesses, rest = text.removeprefix("### Weaknesses\n").split("\n### Suggestions\n")
    suggestions, rest = rest.split("\nOverall Score: [[")
    score, refinement = rest.split("]]\n### Improved Response\n")
    return weaknesses, suggestions, int(score), refinement


def test_faults_are_named_by_the_words_that_ask_for_them():
    right = "pond via farm mill tower pond with lamp thanks"
    assert quality(PROMPT, right) == 1.0
    wrong = "inn via farm mill oak pond with rope"
    assert parts(critique(PROMPT, wrong)) == (
        "goal inn via oak bring rope end", "goal pond via tower bring lamp end thanks", rating(PROMPT, wrong), right,
    )  # fmt: skip
    assert parts(critique(PROMPT, right)) == ("no", "no", 10, right)
    assert parts(critique(PROMPT, ""))[2:] == (rating(PROMPT, ""), right)


def test_a_list_keeps_the_words_that_were_right():
    prompt = "three colors with gold no ebony end thanks"
    assert parts(critique(prompt, "ebony gold jade thanks"))[3] == "amber gold jade thanks"
    assert parts(critique(prompt, "teal gold jade thanks"))[3] == "gold jade teal thanks"
    assert parts(critique(prompt, "jade jade"))[0] == "colors colors with end"


@pytest.mark.parametrize("difficulty", PRESETS)
def test_every_critique_is_exact_and_in_the_vocabulary(difficulty):
    config = SyntheticConfig(difficulty=difficulty, num_records=300)
    known = set(vocabulary(config))
    for record in generate(config):
        for response in (record["chosen"], record["rejected"], "", "zzz"):
            weaknesses, suggestions, score, refinement = parts(critique(record["prompt"], response))
            assert set(f"{weaknesses} {suggestions} {refinement}".split()) <= known | set(response.split())
            assert quality(record["prompt"], refinement) == 1.0 and rating(record["prompt"], refinement) == 10
            assert score == rating(record["prompt"], response) and 1 <= score <= 10
            whole = quality(record["prompt"], response) == 1.0
            assert (score == 10) == whole == (weaknesses == "no") == (not faults(record["prompt"], response))


def test_ratings_rise_with_quality():
    pairs = {(quality(r["prompt"], r[name]), rating(r["prompt"], r[name]))
             for r in generate(SyntheticConfig(num_records=200)) for name in ("chosen", "rejected")}  # fmt: skip
    ordered = [score for _, score in sorted(pairs)]
    assert ordered == sorted(ordered) and len(set(ordered)) > 3
