"""RL without scoring samples again: the sampler's log-probabilities are the training graph's up to rounding."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.losses.policy import PolicyLoss
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.stages import rl_program

from . import small

STEPS = 3


def test_training_is_the_same_with_a_pass_less(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, score = [], rl_program.token_scores

    def counted(*arguments: Any) -> Any:
        passes.append(arguments)
        return score(*arguments)

    monkeypatch.setattr(rl_program, "token_scores", counted)
    records, counts = [], []
    for rescore in (True, False):
        settings = RlConfig(samples_per_prompt=4, rescore=rescore)
        rounds = (Round(name="rlhf", steps=STEPS, references=("chosen",)),)
        training = small.rl_training(rollout_batch=8)
        stage = small.rl_policy(rl=settings, rounds=rounds, training=training, snapshots=())
        passes.clear()
        directory = small.alone(whole, tmp_path / str(rescore), stage).directory
        records.append([record for record in small.records(directory, "rl_policy") if record["kind"] == "train"])
        counts.append(len(passes))
    assert counts == [2 * STEPS, STEPS]
    for scored, sampled in zip(*records, strict=True):
        assert scored.keys() == sampled.keys()
        assert 0 < sampled["sampler_delta/mean"] <= sampled["sampler_delta/max"] < 1e-4
        for name, value in scored.items():
            if isinstance(value, float):
                assert sampled[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("fields", [{"one_step_off": True}, {"epochs": 2}, {"minibatches": 2}], ids=str)
def test_where_parameters_are_compared_samples_are_scored_again(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"RlConfig\.rescore.* must be True"):
        RlConfig(rescore=False, policy=PolicyLoss(kind="ppo_clip"), **fields)
