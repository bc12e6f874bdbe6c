"""R_P and R_PIT as judges of texts, with toy reward models whose values are computed here once more by hand."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.decode.batches import Scorer
from pit_jax.evaluation.pairwise import Question, ScoreJudge
from pit_jax.evaluation.reward_judge import GapJudge, RewardJudge
from pit_jax.testing.toy import EOS, PAD, ToyReward, toy_codec, worth

CODEC, WORTH = toy_codec(inputs=4, targets=5), worth(3)
VALUE = np.asarray(WORTH["worth"], np.float64)
TEXTS = ["3", "34", "4545", "", "5", "333"]


def scorer(kind: str):
    model = Scorer(model=ToyReward(), width=CODEC.width(kind), length=5, eos_id=EOS, pad_id=PAD, batch_size=3)
    return functools.partial(model.score, WORTH)


def mean(text: str, *, end: bool) -> float:
    ids = [int(digit) for digit in text] + [EOS] * end
    return float(VALUE[ids].mean()) if ids else 0.0


def gap(candidate: str, reference: str) -> float:
    return mean(candidate, end=True) - mean(reference, end=False)


def test_the_ordinary_reward_scores_texts_as_the_model_reads_them():
    judge = RewardJudge(name="reward_bt", codec=CODEC, score=scorer("policy"))
    found = judge.scores(["34"] * 6, TEXTS)
    np.testing.assert_allclose(found, [mean(text, end=True) for text in TEXTS], atol=1e-6)
    verdicts = ScoreJudge(judge=judge).verdicts([Question("34", "3", "4545"), Question("34", "5", "5")])
    assert verdicts[0].outcome == np.sign(found[0] - found[2]) and verdicts[1].outcome == 0


def test_the_gap_reward_compares_both_directions_and_has_no_place():
    judge = GapJudge(name="reward_gap", codec=CODEC, score=scorer("gap"))
    asked = [Question("34", a, b) for a in TEXTS for b in TEXTS]
    found = [v.outcome for v in judge.verdicts(asked)]
    expected = [np.sign(gap(q.first, q.second) - gap(q.second, q.first)) for q in asked]
    assert found == expected and {1.0, -1.0, 0.0} == set(found)
    assert [-x for x in found] == [v.outcome for v in judge.verdicts([q.swapped() for q in asked])]
    # One direction alone would say otherwise: the model's zero is not at 0.
    assert found != [np.sign(gap(q.first, q.second)) for q in asked]
    wide = GapJudge(name="reward_gap", codec=CODEC, score=scorer("gap"), margin=1e3)
    assert {v.outcome for v in wide.verdicts(asked)} == {0.0}


def test_responses_without_room_have_no_verdict_and_the_others_are_right(caplog):
    caplog.set_level(logging.WARNING)
    asked = [Question("3", "34343434", "4"), Question("3", "3", "4"), Question("3", "4", "34343434")]
    gaps = [v.outcome for v in GapJudge(name="g", codec=CODEC, score=scorer("gap")).verdicts(asked)]
    rewards = RewardJudge(name="r", codec=CODEC, score=scorer("policy"))
    scores = [v.outcome for v in ScoreJudge(judge=rewards).verdicts(asked)]
    truth = float(np.sign(gap("3", "4") - gap("4", "3")))
    assert gaps == pytest.approx([math.nan, truth, math.nan], nan_ok=True)
    assert scores == pytest.approx(
        [math.nan, np.sign(mean("3", end=True) - mean("4", end=True)), math.nan], nan_ok=True
    )
    assert "2 of 3 have a response of more than Lengths.targets = 5 tokens" in caplog.text
    only_long = GapJudge(name="g", codec=CODEC, score=scorer("gap")).verdicts(asked[:1])
    assert math.isnan(only_long[0].outcome)


def test_a_negative_margin_is_refused():
    with pytest.raises(ConfigError, match="margin"):
        GapJudge(name="g", codec=CODEC, score=scorer("gap"), margin=-1)
