"""RL one step off: the next answers are drawn before the update, the loss corrects for it, and a restart is exact."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from pit_jax.io import serialize
from pit_jax.losses.policy import PolicyLoss
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.stages import rl, rl_program
from pit_jax.stages.rl_program import RlProgram

from . import small

STEPS = 4
PPO = {"estimator": "ppo", "policy": PolicyLoss(kind="ppo_clip"), "epochs": 2, "minibatches": 2}


def _stage(*, one_step_off: bool = True, **config: Any) -> Any:
    rounds = (Round(name="rlhf", steps=STEPS, references=("chosen",)),)
    settings = RlConfig(samples_per_prompt=4, one_step_off=one_step_off, **config)
    training = small.rl_training(checkpoint_every=1, rollout_batch=8)
    return small.rl_policy(rl=settings, rounds=rounds, training=training, snapshots=())


def _improver() -> Any:
    rounds = (
        Round(name="first", steps=2, references=("rejected", "chosen")),
        Round(name="second", steps=2, references=("policy", "improver")),
    )
    return dataclasses.replace(_stage(), **{**_parts_of(small.rl_improver()), "rounds": rounds, "policy": "sft_policy"})


def _parts_of(stage: Any) -> dict[str, Any]:
    return {name: vars(stage)[name] for name in ("name", "role", "init_from", "anchor", "reward")}


def test_answers_come_from_the_parameters_before_the_last_update(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    on, off = (
        small.records(small.alone(whole, tmp_path / str(late), _stage(one_step_off=late)).directory, "rl_policy")
        for late in (False, True)
    )
    on, off = ([record for record in records if record["kind"] == "train"] for records in (on, off))
    assert [record["step"] for record in off] == [1, 2, 3, 4]
    for name, value in on[0].items():  # Nothing is older than the first step.
        assert off[0][name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), name
    assert off[0]["weight/mean"] == pytest.approx(1, abs=1e-5)
    for record in off[1:]:
        # The sampler and `logp_old` are of the same parameters; those that are updated are others.
        assert record["sampler_delta/max"] < 1e-4
        assert abs(record["ratio/mean"] - 1) > 1e-5 or record["kl_old"] > 1e-8
    assert off[1]["kl/mean"] == 0, "the second step's answers are drawn before the first update, so from the anchor"
    assert on[1]["kl/mean"] != 0
    assert all(record["kl_old"] < 1e-8 for record in on)


@pytest.mark.parametrize(
    "stage",
    [_stage(), _stage(**PPO), _improver()],
    ids=["rloo", "ppo", "improver"],
)
@pytest.mark.slow
def test_a_restart_between_any_two_steps_changes_nothing(
    whole: pathlib.Path, tmp_path: pathlib.Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    straight = small.alone(whole, tmp_path / "straight", stage)
    advance, last = RlProgram.advance, [0]

    def stopping(self: RlProgram, state: Any, step: int) -> Any:
        if step == last[0]:
            raise Stop
        return advance(self, state, step)

    for last[0] in range(1, STEPS):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(RlProgram, "advance", stopping)
            small.alone(whole, tmp_path / "stopped", stage)
    again = small.alone(whole, tmp_path / "stopped", stage)
    assert small.records(again.directory, stage.name) == small.records(straight.directory, stage.name)
    params = [run.artifact(stage.name).params() for run in (straight, again)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_the_next_answers_are_under_way_before_an_update_begins(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    make_step, rollout_keys = rl.make_step, rl_program.rollout_keys

    def keys(seed: int, step: int, count: int) -> Any:
        events.append(f"answers of {step}")
        return rollout_keys(seed, step, count)

    def noted_step(*arguments: Any, **named: Any) -> Any:
        update = make_step(*arguments, **named)

        def noted(*given: Any) -> Any:
            events.append("update")
            return update(*given)

        return noted

    monkeypatch.setattr(rl_program, "rollout_keys", keys)
    monkeypatch.setattr(rl, "make_step", noted_step)
    small.alone(whole, tmp_path, _stage())
    assert events == [
        "answers of 0", "answers of 1", "update", "answers of 2", "update", "answers of 3", "update", "update",
    ]  # fmt: skip


def test_arrays_go_through_json_bit_for_bit() -> None:
    odd = np.array([[np.nan, -0.0], [1e-45, np.inf]], np.float32)
    for array in (odd, np.zeros((0, 3), bool), np.arange(6, dtype="<i4")):
        again = serialize.array_from_json(serialize.array_to_json(array))
        assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())
