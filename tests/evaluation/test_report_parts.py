"""What a report computes itself: ratings by both methods, what length explains, families, and facts of judges."""

import numpy as np
import pytest

from pit_jax.core.errors import DataError
from pit_jax.evaluation import bias, judge_facts, ratings, report_parts
from pit_jax.evaluation.endpoint import Endpoint
from pit_jax.evaluation.endpoint_config import Budget, EndpointConfig, Tokens
from pit_jax.evaluation.judge_prompts import load
from pit_jax.evaluation.judges import FunctionJudge
from pit_jax.evaluation.llm_judge import LlmJudge
from pit_jax.evaluation.pairwise import BothOrders, Question, ScoreJudge, Verdict
from pit_jax.evaluation.ratings import RatingConfig
from pit_jax.evaluation.winrate import ResponseSet

GROUPS = [f"g{i // 2}" for i in range(200)]


def _set(name, lengths):
    lengths = tuple(int(length) for length in lengths)
    return ResponseSet(name=name, temperature=0.7, responses=("",) * len(lengths), lengths=lengths)


def _row(outcomes, longer_by):
    base = np.full(len(outcomes), 10)
    sets = _set("pit", base + longer_by), _set("original", base)
    return report_parts.length_row(*sets, outcomes, groups=GROUPS[: len(outcomes)], judge="j", seed=1)


def test_both_ratings_are_those_of_the_same_games():
    rng = np.random.default_rng(0)
    results = {
        (a, b): rng.choice([-1.0, 0.0, 1.0, np.nan], len(GROUPS), p=p)
        for (a, b), p in {
            ("a", "b"): (0.2, 0.2, 0.5, 0.1), ("b", "c"): (0.3, 0.1, 0.6, 0.0), ("a", "c"): (0.1, 0.1, 0.8, 0.0),
        }.items()
    }  # fmt: skip
    config = RatingConfig(anchor="c", draws=200, rounds=200)
    found = report_parts.rate(results, GROUPS, judge="j", seed=3, config=config)
    games = ratings.battles(results, GROUPS)
    assert found.bradley_terry == ratings.bradley_terry(games, config, seed=3)
    assert found.elo == ratings.elo(games, config, seed=3)
    assert [row.system for row in found.bradley_terry.rows] == ["a", "b", "c"]
    assert found.anchor == 1000.0
    assert report_parts.rate(results, GROUPS, judge="j", seed=3).anchor is None


def test_a_judge_of_length_alone_is_found_out():
    rng = np.random.default_rng(1)
    longer_by = rng.integers(-5, 9, len(GROUPS))
    found = _row(np.sign(longer_by).astype(float), longer_by)
    assert found.summary.delta == pytest.approx(found.longer)
    assert found.summary.longer.percent == 100
    assert found.difference == pytest.approx(longer_by.mean())
    assert abs(found.summary.length.delta) < found.summary.delta
    assert (found.candidate, found.baseline, found.temperature_candidate) == ("pit", "original", 0.7)


def test_a_judge_that_never_looks_at_length_is_not_corrected_much():
    rng = np.random.default_rng(2)
    longer_by, outcomes = rng.integers(-5, 9, len(GROUPS)), rng.choice([-1.0, 1.0], len(GROUPS), p=[0.3, 0.7])
    found = _row(outcomes, longer_by)
    assert found.summary.length.delta == pytest.approx(found.summary.delta, abs=6)
    assert found.longer == pytest.approx(100 * np.sign(longer_by).mean())
    assert found.longer_ci95.low < found.longer < found.longer_ci95.high


def test_exchanged_sides_turn_every_sign():
    rng = np.random.default_rng(3)
    longer_by, outcomes = rng.integers(-5, 9, len(GROUPS)), rng.choice([-1.0, 0.0, 1.0], len(GROUPS))
    one, other = _row(outcomes, longer_by), _row(-outcomes, -longer_by)
    assert one.longer == -other.longer
    assert one.summary.delta == pytest.approx(-other.summary.delta)
    assert one.summary.length.delta == pytest.approx(-other.summary.length.delta, abs=1e-6)
    assert one.summary.longer.percent == other.summary.longer.percent


def test_open_questions_count_nowhere():
    rng = np.random.default_rng(4)
    longer_by, outcomes = rng.integers(-5, 9, 100), rng.choice([-1.0, 1.0], 100)
    outcomes[::4], rest = np.nan, np.arange(100) % 4 > 0
    found = _row(outcomes, longer_by)
    assert (found.summary.n, found.summary.unanswered) == (75, 25)
    assert found.longer == pytest.approx(100 * np.sign(longer_by[rest]).mean())
    assert found.difference == pytest.approx(longer_by[rest].mean())
    with pytest.raises(DataError, match="Not one of 4 comparisons"):
        _row(np.full(4, np.nan), np.ones(4, int))


def test_families_are_told_by_their_names():
    names = ["original", "pit", "pit_iter2", "pit_iter10", "best_of_2", "refine_iter2", "a_iter", "b_iterx", "dpo"]
    assert report_parts.families(names) == {
        "pit": ("pit", 1), "pit_iter2": ("pit", 2), "pit_iter10": ("pit", 10), "refine_iter2": ("refine", 2),
    }  # fmt: skip
    assert report_parts.families(["pit", "original"]) == {}


class _First:
    """A judge that likes the first place."""

    name = "first"

    def verdicts(self, questions):
        return [Verdict(1.0)] * len(questions)


def test_facts_of_a_judge_that_likes_a_place():
    judge = BothOrders(_First())
    judge.verdicts([Question("p", str(i), "b") for i in range(30)])
    found = judge_facts.facts_of(judge, questions=30, unanswered=0, notes=["was asked at night."])
    assert (found.name, found.kind, found.questions) == ("first", "_First", 30)
    assert found.position == judge.bias
    (warning,) = found.warnings()
    assert warning.startswith("Judge first: it (nearly) always prefers the first answer")
    assert found.sentences()[0].startswith("first: 30 questions were answered in both orders, 100.0 %")
    assert found.sentences()[1] == "first: was asked at night."


def test_facts_of_a_program():
    judge = ScoreJudge(judge=FunctionJudge(name="exact", function=lambda prompt, response: 0.0))
    found = judge_facts.facts_of(judge)
    assert found == judge_facts.JudgeFacts(name="exact", kind="program")
    assert found.warnings() == [] and found.sentences() == []


def test_facts_of_a_language_model_have_what_it_cost():
    budget = Budget(prompt_price=2.0, completion_price=8.0)
    endpoint = Endpoint(EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", budget=budget), progress=False)
    endpoint.usage.spent, endpoint.usage.requests, endpoint.usage.known = Tokens(1_000_000, 500_000), 12, 3
    found = judge_facts.facts_of(BothOrders(LlmJudge(endpoint, load("mt_bench"), structured=False, name="gpt")))
    assert (found.name, found.kind) == ("gpt", "language model at an endpoint")
    assert (found.requests, found.known, found.tokens, found.cost) == (12, 3, (1_000_000, 500_000), 6.0)
    assert found.position is not None and found.warnings() == []


def test_length_row_is_the_same_regression_as_elsewhere():
    rng = np.random.default_rng(5)
    longer_by, outcomes = rng.integers(-5, 9, len(GROUPS)), rng.choice([-1.0, 0.0, 1.0], len(GROUPS))
    assert _row(outcomes, longer_by).summary.length == bias.length_controlled(outcomes, longer_by, GROUPS, seed=1)
