"""Self-Refine: the requests, their order, what stops it, what is chosen, and what is counted."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.improve.refine_templates import RefinePrompts, load, shipped
from pit_jax.improve.self_refine import RefineTrajectory, SelfRefine, Written, count, self_refine

SET = """comment
=== feedback ===
F|{prompt}|{response}
=== entry ===
<{response}:{feedback}>
=== refine ===
R|{prompt}|{history}
"""
SCORES = "=== score ===\nScore: {score}/10\n"
STOP = "=== stop ===\nAll is {{well}}\n"


class Told:
    """A writer that answers by a function of (request, seed), and remembers what it was asked, batch by batch."""

    def __init__(self, answer: Callable[[str, int], Written], room: int = 10**6, batch: int = 10**6) -> None:
        self.answer, self.room, self.batch = answer, room, batch
        self.batches: list[list[str]] = []
        self.temperatures: set[float] = set()

    def fits(self, prompt: str) -> bool:
        return len(prompt) <= self.room

    def write(self, prompts: Sequence[str], *, seed: int, temperature: float) -> list[Written]:
        assert prompts, "an empty batch is not asked for"
        self.batches.append(list(prompts))
        self.temperatures.add(temperature)
        return [self.answer(prompt, seed) for prompt in prompts]


def hashed(prompt: str, seed: int) -> Written:
    """Answer with words that depend on everything a writer may depend on."""
    return Written(hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:6])


@pytest.fixture
def made(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Return a function that writes a prompt set and returns its path."""

    def write(*more: str, text: str = SET) -> str:
        path = tmp_path / "mine.txt"
        path.write_text(text + "".join(more))
        return str(path)

    return write


def one(config: SelfRefine, writer: Told, prompt: str = "x", original: str = "y0") -> RefineTrajectory:
    return self_refine(config, writer, [prompt], [Written(original)], 0)[0]


def numbered(scores: Sequence[float | None] = ()) -> Callable[[str, int], Written]:
    """Answer refinements with y1, y2, ... and feedback with fb0, fb1, ... and the scores."""
    counts = {"F": 0, "R": 0}

    def answer(prompt: str, seed: int) -> Written:
        kind = prompt[0]
        number = counts[kind]
        counts[kind] += 1
        if kind == "R":
            return Written(f"y{number + 1}")
        score = scores[number] if number < len(scores) else None
        return Written(f"fb{number}" + ("" if score is None else f" Score: {score:g}/10"))

    return answer


def test_requests_hold_the_whole_history_oldest_first(made: Any) -> None:
    writer = Told(numbered())
    row = one(SelfRefine(prompts=made(), iterations=3, temperature=0.3), writer)
    assert writer.batches == [
        ["F|x|y0"], ["R|x|<y0:fb0>"],
        ["F|x|y1"], ["R|x|<y0:fb0><y1:fb1>"],
        ["F|x|y2"], ["R|x|<y0:fb0><y1:fb1><y2:fb2>"],
    ]  # fmt: skip
    assert writer.temperatures == {0.3}
    assert [row.answer(k).text for k in range(5)] == ["y0", "y1", "y2", "y3", "y3"]
    assert [said.text if (said := row.feedback(k)) else None for k in range(4)] == ["fb0", "fb1", "fb2", None]
    assert (row.ended, row.number, row.chosen.text) == ("iterations", 3, "y3")


def test_in_pits_way_a_round_is_two_calls_that_know_nothing_of_earlier_ones(made: Any) -> None:
    writer = Told(numbered())
    row = one(SelfRefine(prompts=made(), style="pit", iterations=2), writer)
    assert writer.batches == [["F|x|y0"], ["R|x|<y0:fb0>"], ["F|x|y1"], ["R|x|<y1:fb1>"]]
    assert row.dropped == 0 and row.chosen.text == "y2"
    with pytest.raises(ConfigError, match="no section score or stop with style='pit'"):
        SelfRefine(prompts=made(SCORES), style="pit")


def test_best_scored_response_is_returned_but_never_the_first(made: Any) -> None:
    writer = Told(numbered([9, 3, 8, None, 8]))
    row = one(SelfRefine(prompts=made(SCORES), iterations=4), writer)
    assert len(writer.batches) == 2 * 4 + 1, "the last response gets a score, too"
    assert [said.score for said in row.feedbacks] == [9, 3, 8, None, 8]
    assert (row.number, row.chosen.text, row.unscored) == (2, "y2", 1)


def test_without_any_score_the_last_response_is_returned_and_that_is_counted(made: Any) -> None:
    row = one(SelfRefine(prompts=made(SCORES), iterations=2), Told(numbered()))
    assert (row.number, row.unscored) == (2, 3)
    counts = count([row])
    assert counts.unscored == counts.feedbacks == 3 and counts.doubtful
    assert "3 feedbacks without a score" in counts.summary()


def test_complete_responses_go_before_those_that_were_cut_off(made: Any) -> None:
    inner = numbered([1, 9, 2])

    def answer(prompt: str, seed: int) -> Written:
        written = inner(prompt, seed)
        return written._replace(finished=written.text != "y1")

    row = one(SelfRefine(prompts=made(SCORES), iterations=2), Told(answer))
    assert (row.number, row.chosen.text) == (2, "y2")
    assert count([row]).cut_answers == 1


@pytest.mark.parametrize(("said", "ended", "rounds"), [("ALL IS {WELL}.", "marker", 1), ("all is well", "", 3)])
def test_the_stop_text_ends_it(made: Any, said: str, ended: str, rounds: int) -> None:
    inner = numbered()
    writer = Told(lambda prompt, seed: Written(said) if prompt == "F|x|y1" else inner(prompt, seed))
    row = one(SelfRefine(prompts=made(STOP), iterations=3), writer)
    assert (row.ended, row.rounds) == (ended or "iterations", rounds)
    assert row.chosen.text == f"y{rounds}"


def test_a_good_score_ends_it_at_once_with_the_original(made: Any) -> None:
    rows = [one(SelfRefine(prompts=made(SCORES), stop_score=s), Told(numbered([7, 8, 9, 9, 9]))) for s in (7, 8, 10)]
    assert [(row.ended, row.rounds, row.chosen.text) for row in rows] == [
        ("score", 0, "y0"), ("score", 1, "y1"), ("iterations", 4, "y2"),
    ]  # fmt: skip


def test_history_that_does_not_fit_loses_its_oldest_rounds_only(made: Any) -> None:
    full = "R|x|<y0:fb0><y1:fb1><y2:fb2>"
    for left_out, shown in ((0, full), (1, "R|x|<y1:fb1><y2:fb2>"), (2, "R|x|<y2:fb2>")):
        writer = Told(numbered(), room=len(shown))
        row = one(SelfRefine(prompts=made(), iterations=3), writer)
        assert writer.batches[5] == [shown]
        earlier = max(0, left_out - 1)  # In round 2 there is one round less to leave out.
        assert row.dropped == left_out + earlier and row.ended == "iterations"
        assert count([row]).shortened == (left_out > 0)


def test_what_does_not_fit_at_all_ends_it_and_is_counted(made: Any) -> None:
    config = SelfRefine(prompts=made(), iterations=3)
    for room, rounds in ((len("F|x|y0") - 1, 0), (len("R|x|<y0:fb0>") - 1, 0)):
        writer = Told(numbered(), room=room)
        row = one(config, writer)
        assert (row.ended, row.rounds, row.chosen.text) == ("too long", rounds, "y0")
        assert all(len(request) <= room for batch in writer.batches for request in batch)
    rows = self_refine(config, Told(hashed, room=20), ["x", "x" * 30], [Written("a"), Written("b")], 0)
    assert [row.ended for row in rows] == ["iterations", "too long"]
    assert count(rows).doubtful and count(rows).ended == {"iterations": 1, "too long": 1}


@pytest.mark.parametrize(("fails", "rounds"), [("F|x|y1", 1), ("R|x|<y0:fb0>", 0)])
def test_a_call_that_fails_ends_its_own_trajectory_only(made: Any, fails: str, rounds: int) -> None:
    inner = numbered()

    def answer(prompt: str, seed: int) -> Written:
        if prompt == fails:
            return Written("", finished=False, failure="HTTP 500")
        return inner(prompt, seed) if "|x|" in prompt else Written("w")

    writer = Told(answer)
    config = SelfRefine(prompts=made(), iterations=2)
    failed, other = self_refine(config, writer, ["x", "z"], [Written("y0"), Written("w")], 0)
    assert (failed.ended, failed.failure, failed.rounds) == ("failed", "HTTP 500", rounds)
    assert failed.chosen.text == f"y{rounds}", "a failure is no response"
    assert other.ended == "iterations" and other.rounds == 2
    counts = count([failed, other])
    assert counts.failures == {"HTTP 500": 1} and "1 calls failed: HTTP 500" in counts.summary()
    assert counts.repeated == 2


def test_counts_are_those_of_a_recount(made: Any) -> None:
    inner = numbered()

    def answer(prompt: str, seed: int) -> Written:
        text = {"F|x|y0": "  ", "F|x|y1": "cut"}.get(prompt) or inner(prompt, seed).text
        return Written(text, finished=text != "cut")

    counts = count([one(SelfRefine(prompts=made(), iterations=3), Told(answer))])
    assert (counts.trajectories, counts.feedbacks, counts.refinements) == (1, 3, 3)
    assert (counts.empty_feedback, counts.cut_feedback, counts.cut_answers, counts.repeated) == (1, 1, 0, 0)
    assert count([]).summary().startswith("0 responses")


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6), seed=st.integers(0, 3))
def test_each_trajectory_depends_on_its_own_texts_and_the_seed_alone(
    order: list[int], cut: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed.txt"
    path.write_text(SET + "=== stop ===\n7\n")
    config = SelfRefine(prompts=str(path), iterations=3)
    prompts, originals = [f"x{n % 5}" for n in range(6)], [Written(f"y{n}") for n in range(6)]
    whole = self_refine(config, Told(hashed), prompts, originals, seed)
    shuffled = [(prompts[n], originals[n]) for n in order]
    parts = [
        row
        for part in (shuffled[:cut], shuffled[cut:])
        for row in self_refine(config, Told(hashed), [x for x, _ in part], [y for _, y in part], seed)
    ]
    assert parts == [whole[n] for n in order]
    other = self_refine(config, Told(hashed), prompts, originals, seed + 1)
    assert [row.feedbacks[0] for row in other] != [row.feedbacks[0] for row in whole]


def test_the_same_request_in_a_later_round_is_asked_anew(made: Any) -> None:
    seeds: dict[str, set[int]] = {}

    def answer(prompt: str, seed: int) -> Written:
        seeds.setdefault(prompt, set()).add(seed)
        return Written("y0" if prompt[0] == "R" else "fb")

    one(SelfRefine(prompts=made(), style="pit", iterations=3), Told(answer))
    assert {prompt: len(found) for prompt, found in seeds.items()} == {"F|x|y0": 3, "R|x|<y0:fb>": 3}


def test_what_looks_like_a_field_in_a_text_stays_as_it_is(made: Any) -> None:
    writer = Told(numbered())
    one(SelfRefine(prompts=made(), iterations=1), writer, prompt="{response} {}", original="{history}{{")
    assert writer.batches == [["F|{response} {}|{history}{{"], ["R|{response} {}|<{history}{{:fb0>"]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (SET.replace("{prompt}|{response}", "{prompt}|{reply}"), r"'feedback'.* use only .*Remove \{reply\}"),
        (SET.replace("F|{prompt}|{response}", "F|{response}"), r"section 'feedback' .*contain \{prompt\}"),
        (SET.replace("<{response}:{feedback}>", "<{response}>"), r"section 'entry' .*contain \{feedback\}"),
        (SET.replace("R|{prompt}|{history}", "R|{prompt}|{history}{history}"), "'refine' .*each field once"),
        (SET.replace("R|", "R{|"), "matching braces"),
        (SET.replace("=== entry ===", "=== entries ==="), "heading = 'entries' must be one of .*Did you mean 'entry'"),
        (SET + "=== entry ===\nagain", "'entry' must be there once"),
        (SET.replace("=== refine ===\n", ""), "must have 'refine' with a text"),
        (SET.replace("<{response}:{feedback}>", "  "), "must have 'entry' with a text"),
        ("no headings", "must have 'feedback'"),
        (SET + "=== score ===\n{score}", r"section 'score' .* words by which"),
        (SET + "=== score ===\nScore: {points}", r"section 'score' .*use only \{score\}"),
        (SET + "=== stop ===\nno {response} any more", r"section 'stop'"),
    ],
)
def test_mistakes_in_a_prompt_set_are_named(made: Any, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){named}"):
        SelfRefine(prompts=made(text=text))


def test_sets_are_found_by_name_or_file(tmp_path: pathlib.Path) -> None:
    assert shipped() == ["dialogue", "dialogue_scored", "pit", "words"]
    assert SelfRefine().templates.name == "dialogue_scored" and SelfRefine(style="pit").templates.name == "pit"
    with pytest.raises(ConfigError, match="Did you mean 'dialogue'"):
        load("dialog")
    with pytest.raises(ConfigError, match="a .txt file that exists"):
        load(str(tmp_path / "absent.txt"))
    (tmp_path / "latin.txt").write_bytes("=== feedback ===\né".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load(str(tmp_path / "latin.txt"))
    (tmp_path / "dos.txt").write_bytes(SET.replace("\n", "\r\n").encode())
    assert load(str(tmp_path / "dos.txt")).ask_feedback("x", "y") == "F|x|y"


@pytest.mark.parametrize("name", ["dialogue", "dialogue_scored", "pit", "words"])
def test_shipped_sets_show_every_text_once_and_in_order(name: str) -> None:
    prompts = load(name)
    request = prompts.ask_refinement("PROMPT", [("FIRST", "NOTES"), ("SECOND", "REMARKS")])
    places = [request.index(word) for word in ("PROMPT", "FIRST", "NOTES", "SECOND", "REMARKS")]
    assert places == sorted(places)
    asked = prompts.ask_feedback("PROMPT", "FIRST")
    assert asked.count("PROMPT") == asked.count("FIRST") == 1
    assert "{" not in request + asked and "===" not in request + asked
    assert prompts.scored == (name == "dialogue_scored") and bool(prompts.marker) == (name == "dialogue")


def test_words_are_nothing_but_the_demos_own(tmp_path: pathlib.Path) -> None:
    request = load("words").ask_refinement("five colors", [("gold jade", "jade"), ("jade", "")])
    assert request == "five colors<answer>gold jade<answer>jade<answer>jade<answer>"


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("* Fluent: yes. Score: 3/3\nTotal score: 24/30", 24.0),
        ("**Total Score:** 24 / 30.", 24.0),
        ("total score:\n**24.5**/30", 24.5),
        ("Total score: 11/30 at first; now Total score: 12/30", 12.0),
        ("Total score: 0/30", 0.0),
        ("Total score: 31/30", None),
        ("Total score: 24/300", None),
        ("Total score: 24/30.5", None),
        ("Total score: -4/30", None),
        ("Total score: 24", None),
        ("Total score: nan/30", None),
        ("The sum is 24/30", None),
        ("", None),
    ],
)
def test_scores_are_read_or_there_is_none(said: str, score: float | None) -> None:
    assert load("dialogue_scored").read_score(said) == score


def test_other_forms_of_score() -> None:
    base = dict(name="n", feedback="{prompt}{response}", entry="{response}{feedback}", refine="{prompt}{history}")
    marked = RefinePrompts(**base, score="Overall: [[{score}]]")
    assert marked.read_score("Overall: [[ 7 ]]") == 7.0 and marked.highest == float("inf")
    trailing = RefinePrompts(**base, score="Score: {score}")
    assert [trailing.read_score(f"Score: {text}") for text in ("7", "7.5", "7.")] == [7.0, 7.5, 7.0]
    leading = RefinePrompts(**base, score="{score}/10")
    texts = ("8/10", "18/10", "1.8/10", "-8/10", ".5/10")
    assert [leading.read_score(text) for text in texts] == [8.0, None, 1.8, None, None]
    assert RefinePrompts(**base).read_score("Score: 3") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"style": "pits"}, "SelfRefine.style = 'pits' must be one of"),
        ({"iterations": 0}, "SelfRefine.iterations = 0"),
        ({"temperature": -1.0}, "SelfRefine.temperature"),
        ({"temperature": float("nan")}, "SelfRefine.temperature"),
        ({"stop_score": 31}, r"stop_score = 31 must lie in 0..30"),
        ({"stop_score": 3, "prompts": "dialogue"}, "no score"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SelfRefine(**changes)
