"""Pair judges: ties without asking, both orders, position bias, and the way to win rates."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
from scipy import stats

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation import pairwise
from pit_jax.evaluation.judges import FunctionJudge
from pit_jax.evaluation.pairwise import BothOrders, PositionBias, Question, ScoreJudge, Verdict
from pit_jax.evaluation.winrate import ResponseSet, compare


class Reader:
    """A judge that reads two responses, as a function of them, and counts what it is asked."""

    name = "reader"

    def __init__(self, decide):
        self._decide, self.asked = decide, []

    def verdicts(self, questions):
        self.asked += questions
        return [Verdict(self._decide(question), f"{question.first}|{question.second}") for question in questions]


def longer(question: Question) -> float:
    return float(np.sign(len(question.first) - len(question.second)))


def questions(n: int) -> list[Question]:
    return [Question(f"p{i}", f"first {i}", f"second one {i}") for i in range(n)]


def both(decide, asked) -> tuple[BothOrders, list[float]]:
    judge = BothOrders(Reader(decide))
    return judge, [verdict.outcome for verdict in judge.verdicts(asked)]


def test_scores_become_verdicts_with_a_margin():
    score = {"a": 1.0, "b": 1.4, "c": 3.0, "n": math.nan, "inf": math.inf, "inf ": math.inf}
    judge = ScoreJudge(judge=FunctionJudge(name="exact", function=lambda x, y: score[y]), margin=0.5)
    pairs = [("a", "b"), ("a", "c"), ("c", "a"), ("n", "a"), ("inf", "inf "), ("inf", "a"), ("b", "n")]
    found = judge.verdicts([Question("x", *pair) for pair in pairs])
    assert [v.outcome for v in found] == pytest.approx([0, -1, 1, math.nan, 0, 1, math.nan], nan_ok=True)
    assert judge.name == "exact" and found[1].reason == "1 against 3"
    with pytest.raises(ConfigError, match="margin"):
        ScoreJudge(judge=judge.judge, margin=math.nan)


def test_scores_agree_with_the_win_rates_made_from_them():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 60))
    table = {("p", f"{side}{i}"): scores[side, i] for side in range(2) for i in range(60)}
    judge = ScoreJudge(judge=FunctionJudge(name="j", function=lambda x, y: table[x, y]), margin=0.3)
    found = judge.verdicts([Question("p", f"0{i}", f"1{i}") for i in range(60)])
    sets = [ResponseSet(name=n, temperature=1.0, responses=("r",) * 60, lengths=(1,) * 60) for n in "ab"]
    groups = [str(i) for i in range(60)]
    mine = pairwise.comparison(*sets, found, groups=groups, judge="j", seed=0)
    theirs = compare(*sets, (scores[0], scores[1]), groups=groups, judge="j", seed=0, margin=0.3)
    assert (mine.win, mine.lose, mine.tie, mine.ci95) == (theirs.win, theirs.lose, theirs.tie, theirs.ci95)


def test_a_response_is_scored_once_and_identical_ones_never():
    scored = []
    judge = ScoreJudge(judge=FunctionJudge(name="j", function=lambda x, y: scored.append((x, y)) or float(len(y))))
    found = judge.verdicts([Question("p", "a", "bb"), Question("p", "a", "a"), Question("p", "ccc", "a")])
    assert [v.outcome for v in found] == [-1, 0, 1]
    assert scored == [("p", "a"), ("p", "bb"), ("p", "ccc")]
    assert judge.verdicts([Question("q", "same", "same")]) == [pairwise.IDENTICAL] and len(scored) == 3


def test_identical_responses_are_never_asked_about():
    judge, found = both(longer, [Question("p", "same", "same"), *questions(1)])
    assert found == [0, -1]
    assert [q.prompt for q in judge.judge.asked] == ["p0", "p0"]
    assert both(longer, [])[1] == []


def test_only_verdicts_that_survive_the_exchange_count():
    # The responses in the order read, and which place wins.
    says = {"ab": 1, "ba": -1, "ac": 1, "ca": 1, "ad": 1, "da": 0, "ae": 1, "ea": math.nan, "af": 0, "fa": 0}
    says |= {"ag": -1, "ga": -1}
    judge, found = both(lambda q: says[q.first + q.second], [Question("p", "a", other) for other in "bcdefg"])
    assert found == pytest.approx([1, 0, 0, math.nan, 0, 0], nan_ok=True)
    assert judge.bias == PositionBias(consistent=2, half=1, first=1, second=1, unanswered=1)
    assert judge.bias.answered == 5 and judge.bias.contradictory == 0.4 and judge.bias.warning() is None
    reason = judge.verdicts([Question("p", "a", "b")])[0].reason
    assert reason == "[in this order] a|b\n[exchanged] b|a"


@pytest.mark.parametrize(("place", "outcome"), [("first", 1.0), ("second", -1.0)])
def test_a_judge_that_always_prefers_a_place_is_found_out(caplog, place, outcome):
    caplog.set_level(logging.WARNING)
    judge, found = both(lambda q: outcome, questions(20))
    assert found == [0.0] * 20
    assert f"always prefers the {place} answer" in caplog.text and "20 of 20 questions" in caplog.text
    assert "useless" in judge.bias.warning()


def test_a_judge_that_nearly_always_prefers_the_first_is_found_out():
    rng = random.Random(0)
    judge, _ = both(lambda q: 1.0 if rng.random() < 0.98 else longer(q), questions(200))
    assert "always prefers the first" in judge.bias.warning()


def test_a_leaning_judge_is_told_from_a_merely_careless_one():
    rng = random.Random(1)
    leaning, _ = both(lambda q: 1.0 if rng.random() < 0.3 else longer(q), questions(200))
    assert "drawn to the first answer" in leaning.bias.warning() and "always" not in leaning.bias.warning()
    flagged = 0
    for seed in range(60):
        coin = random.Random(seed)
        careless, _ = both(lambda q, coin=coin: coin.choice([1.0, -1.0]), questions(100))
        assert 0.3 < careless.bias.contradictory < 0.7
        flagged += careless.bias.warning() is not None
    assert flagged <= 3


def test_an_honest_judge_has_no_bias_and_bias_adds_up_over_calls():
    judge, found = both(longer, questions(100))
    assert found == [-1.0] * 100 and judge.bias == PositionBias(consistent=100)
    judge.verdicts(questions(7))
    assert judge.bias.consistent == 107 and judge.bias.contradictory == 0 and judge.bias.p_value == 1
    assert "107 questions were answered in both orders, 0.0 % of them" in judge.bias.describe()


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (7, 1), (12, 12), (30, 55), (400, 310)])
def test_the_bias_test_is_the_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert PositionBias(first=first, second=second).p_value == pytest.approx(expected, rel=1e-9)


def test_pairs_are_matched_by_prompt_in_the_first_order():
    first = [("p", "a1"), ("q", "a2"), ("p", "a3")]
    second = [("q", "b1"), ("p", "b2"), ("p", "b3")]
    found = pairwise.pair_up(first, second, names=("mine", "theirs"))
    assert found == [Question("p", "a1", "b2"), Question("q", "a2", "b1"), Question("p", "a3", "b3")]


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ([("p", "b")], "'q' occurs 1 times in mine and 0 times in theirs"),
        ([("p", "b"), ("q", "b"), ("q", "c")], "'q' occurs 1 times in mine and 2 times in theirs"),
        ([("p", "b"), ("q", "b"), ("z" * 90, "c")], r"'z{77}\.\.\.' occurs 0 times in mine and 1 times"),
    ],
)
def test_missing_and_doubled_prompts_are_named(second, match):
    with pytest.raises(DataError, match=match):
        pairwise.pair_up([("p", "a"), ("q", "a")], second, names=("mine", "theirs"))


def test_unanswered_questions_are_left_out_of_the_whole_row():
    sets = [ResponseSet(name=n, temperature=0.5, responses=tuple("wxyz"), lengths=(1, 2, 3, 100)) for n in "ab"]
    found = [Verdict(1.0), Verdict(-1.0), Verdict(1.0), Verdict(math.nan, "no reply: down")]
    row = pairwise.comparison(*sets, found, groups=list("pqrs"), judge="gpt", seed=0)
    assert (row.n, row.win, row.lose, row.tie) == pytest.approx((3, 200 / 3, 100 / 3, 0))
    assert row.length_candidate == 2 and row.mean_candidate == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="answered none of 1 questions about a against b; the first reason: no reply"):
        one = [ResponseSet(name=n, temperature=0.5, responses=("w",), lengths=(1,)) for n in "ab"]
        pairwise.comparison(*one, found[3:], groups=["p"], judge="gpt", seed=0)
    with pytest.raises(ConfigError, match="one entry per prompt"):
        pairwise.comparison(*sets, found[:3], groups=list("pqrs"), judge="gpt", seed=0)
