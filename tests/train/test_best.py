"""Checkpoints kept because they are the best."""

from __future__ import annotations

import importlib.util
import os
import pathlib

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.train.best import Best, KeepBest
from pit_jax.train.loop import Loop, RunFiles, finished, fit

_spec = importlib.util.spec_from_file_location("toy_for_best", pathlib.Path(__file__).with_name("toy_program.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

SCORES = {0: 0.5, 2: 0.7, 4: float("nan"), 6: 0.9, 8: 0.9, 10: 0.1, 12: 0.2}


class Scored(toy.Toy):
    """The toy with evaluations that are given, so that what is best is known."""

    def __init__(self, steps, *, scores, on_step):
        super().__init__(steps, on_step=on_step)
        self.scores = scores

    def evaluate(self, state):
        step = int(state.step)
        self.evaluated.append(step)
        return {"score": self.scores[step], "other": -self.scores[step]}


def train(directory, keep_best=None, *, steps=12, scores=SCORES, on_step=None, **settings):
    every = {"log_every": 4, "eval_every": 2, "checkpoint_every": 4, "keep": 1}
    loop = Loop(steps=steps, keep_best=keep_best, **every | settings)
    program = Scored(steps, scores=scores, on_step=on_step)
    return fit(program, toy.start(steps), loop, RunFiles(directory=directory, name="toy", tensorboard=False)), program


def checkpoints(directory):
    return sorted(int(name.rpartition("_")[2]) for name in os.listdir(directory) if name.startswith("checkpoint_"))


@pytest.mark.parametrize(
    ("best", "kept", "ranking"),
    [
        (None, [12], None),
        (KeepBest(metric="score"), [6, 12], [[6, 0.9]]),
        (KeepBest(metric="other", mode="min"), [6, 12], [[6, -0.9]]),
        (KeepBest(metric="score", count=3), [2, 6, 8, 12], [[6, 0.9], [8, 0.9], [2, 0.7]]),
        (KeepBest(metric="score", mode="min"), [10, 12], [[10, 0.1]]),
    ],
)
def test_the_best_stay_beside_the_newest_and_of_equal_ones_the_older(tmp_path, best, kept, ranking):
    train(tmp_path, best)
    assert checkpoints(tmp_path) == kept
    assert finished(tmp_path).get("best") == ranking


def test_the_parameters_kept_are_those_that_were_evaluated(tmp_path):
    train(tmp_path / "best", KeepBest(metric="score"))
    train(tmp_path / "all", keep=None, checkpoint_every=2)
    shapes = toy.start(12).params
    best, same, next_ = (
        Checkpoints(tmp_path / run, keep=None).restore_params(step, shapes)
        for run, step in (("best", 6), ("all", 6), ("all", 8))
    )
    for name in shapes:
        np.testing.assert_array_equal(best[name], same[name])
        assert np.any(np.asarray(best[name]) != np.asarray(next_[name]))


@pytest.mark.parametrize("step", [1, 5, 6, 7, 9, 11])
def test_a_run_that_dies_keeps_what_one_that_does_not_keeps(tmp_path, step):
    def fail(done):
        if done == step:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, KeepBest(metric="score"), on_step=fail)
    train(tmp_path, KeepBest(metric="score"))
    assert checkpoints(tmp_path) == [6, 12]
    assert finished(tmp_path)["best"] == [[6, 0.9]]


def test_the_best_may_be_the_start(tmp_path):
    settings = {"steps": 2, "scores": SCORES | {0: 2.0}, "eval_at_start": True}
    _, program = train(tmp_path, KeepBest(metric="score"), **settings)
    assert checkpoints(tmp_path) == [0, 2] and program.evaluated == [0, 2]
    (tmp_path / "checkpoint_2").rename(tmp_path / "away")
    _, program = train(tmp_path, KeepBest(metric="score"), **settings)
    assert program.evaluated == [2]  # the record of the start is there already
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "eval"' in line for line in lines) == 2


def test_a_metric_that_is_not_there_is_named_at_the_first_evaluation(tmp_path):
    with pytest.raises(
        ConfigError, match=r"KeepBest.metric = 'scor' must be one of other, score. Did you mean 'score'"
    ):
        train(tmp_path, KeepBest(metric="scor"))
    assert checkpoints(tmp_path) == []


def test_the_ranking_of_another_metric_is_not_taken_up():
    best = Best(KeepBest(metric="score"))
    assert best.takes(3, {"score": 1.0})
    for other in (KeepBest(metric="other"), KeepBest(metric="score", mode="min")):
        fresh = Best(other)
        fresh.restore(best.to_json())
        assert fresh.steps == []


@pytest.mark.parametrize(("field", "value"), [("mode", "best"), ("count", 0)])
def test_bad_settings_of_keep_best_are_named(field, value):
    with pytest.raises(ConfigError, match=f"KeepBest.{field} = "):
        KeepBest(metric="score", **{field: value})
