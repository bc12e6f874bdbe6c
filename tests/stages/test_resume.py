"""A run that is stopped again and again ends as one that never was: records, results and report."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import pytest

from pit_jax.io import files
from pit_jax.stages.answers import Answers
from pit_jax.stages.rl_program import RlProgram
from pit_jax.stages.supervised import SupervisedProgram
from pit_jax.train.loop import Interrupted

from . import kill_demo, small


class Killed(BaseException):
    """Stands for `kill -9`: nothing in the package may catch it."""


class Trouble:
    """Stops the n-th step or response file of each attempt: with SIGINT at even attempts, at once at odd ones.

    The very first response file meets a SIGINT too: how many steps an attempt has left depends on whether the last
    one's checkpoint was complete, so by counting alone the evaluation would not always be interrupted.
    """

    def __init__(self, after: int) -> None:
        self.after, self.attempt, self.count = after, 0, 0
        self.met: set[type[BaseException]] = set()
        self.answered = False

    def meet(self) -> None:
        self.count += 1
        if self.count < self.after:
            return
        if self.attempt % 2 == 0:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            raise Killed

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name in ((SupervisedProgram, "advance"), (RlProgram, "advance"), (Answers, "_write")):
            patch.setattr(owner, name, self._followed(vars(owner)[name]))

    def _followed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if original.__name__ == "_write" and not self.answered:
                self.answered = True
                os.kill(os.getpid(), signal.SIGINT)
            self.meet()
            return result

        return wrapped


@pytest.mark.slow
def test_interrupted_pipeline_ends_as_the_uninterrupted_one(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(after=5)
    trouble.patch(monkeypatch)
    for _ in range(20):
        trouble.count = 0
        try:
            with small.devices(1):
                small.recipe(tmp_path).run()
            break
        except (Interrupted, Killed, KeyboardInterrupt) as error:
            trouble.met.add(type(error))
            trouble.attempt += 1
    assert trouble.met == {Interrupted, Killed, KeyboardInterrupt}
    assert trouble.attempt >= 5
    assert kill_demo.differences(whole, tmp_path) == []


def test_a_tokenizer_whose_writing_was_killed_is_made_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with small.devices(1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("pit_jax.text.tokenizer._write_metadata", killed)
            small.recipe(tmp_path).run(["sft_policy"])
        assert not (tmp_path / "tokenizer").exists()
        small.recipe(tmp_path, stages=()).run()
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    assert files.read_json(tmp_path / "run.json")["seed"] == 0


@pytest.mark.slow
def test_demo_killed_at_random_moments(tmp_path: pathlib.Path) -> None:
    assert kill_demo.main([str(tmp_path), "--kills=3", "--seed=0", *kill_demo.SHRUNK]) == 0
