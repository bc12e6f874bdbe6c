"""Rounds, steps and contexts."""

from __future__ import annotations

import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.rl.curriculum import Context, Curriculum, Round, contexts, records_per_step
from pit_jax.testing.toy import EOS, toy_codec

STAGE_1 = Round(name="dataset", steps=2, references=("rejected", "chosen"))
NOTHING = Round(name="skipped", steps=0, references=("chosen",))
STAGE_2 = Round(name="policy", steps=3, references=("policy",))
CURRICULUM = Curriculum(rounds=(STAGE_1, NOTHING, STAGE_2))


def test_every_step_belongs_to_one_round_in_order() -> None:
    places = [CURRICULUM.at(step) for step in range(CURRICULUM.steps)]
    assert [(place.round.name, place.step) for place in places] == [
        ("dataset", 0),
        ("dataset", 1),
        ("policy", 0),
        ("policy", 1),
        ("policy", 2),
    ]
    for outside in (-1, 5):
        with pytest.raises(ConfigError, match="lie in 0..4"):
            CURRICULUM.at(outside)


def test_each_record_meets_each_reference_of_its_round() -> None:
    codec = toy_codec(inputs=4, targets=5)
    records = [
        {"prompt": (3, 4), "chosen": (5, EOS), "rejected": (4, 4, EOS)},
        {"prompt": (5,), "chosen": (3, EOS), "rejected": (EOS,)},
    ]
    assert contexts(codec, STAGE_1, records, {}) == [
        Context((3, 4), (4, 4)),
        Context((3, 4), (5,)),
        Context((5,), ()),
        Context((5,), (3,)),
    ]
    sampled = {"policy": [(3, 3), (4,)]}
    assert contexts(codec, STAGE_2, records, sampled) == [Context((3, 4), (3, 3)), Context((5,), (4,))]
    assert records_per_step(STAGE_1, 4) == 2
    assert records_per_step(STAGE_2, 4) == 4


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'policy'"):
        Round(name="x", steps=1, references=("polcy",))
    with pytest.raises(ConfigError, match="each once"):
        Round(name="x", steps=1, references=("policy", "policy"))
    with pytest.raises(ConfigError, match="different names"):
        Curriculum(rounds=(STAGE_1, STAGE_1))
    with pytest.raises(ConfigError, match="at least one round"):
        Curriculum(rounds=())
    with pytest.raises(ConfigError, match="contexts per step = 5 must be a multiple"):
        CURRICULUM.check_contexts(5)
