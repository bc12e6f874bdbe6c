"""A step is compiled once, and a supervised one is dispatched without waiting for the device."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.data.pack import Packing
from pit_jax.losses.policy import PolicyLoss
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.stages import supervised
from pit_jax.stages.dpo import Dpo
from pit_jax.stages.rl_program import RlProgram
from pit_jax.stages.supervised import SupervisedProgram
from pit_jax.train.loop import Loop
from pit_jax.train.state import TrainState

from . import small

STEPS = 5
SLOW = ("sft packed", "reward", "dpo", "ppo", "rloo", "reinforce", "group", "one step off")
COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"
PPO = PolicyLoss(kind="ppo_clip")
# Records, evaluations and checkpoints between steps 2 and 5 too: what they compile belongs to their first time.
TRAINING = small.training(loop=Loop(steps=STEPS, log_every=1, eval_every=2, checkpoint_every=1))


def _rl(**changes: Any) -> Any:
    config: dict[str, Any] = {"samples_per_prompt": 4} | changes
    rounds = (Round(name="rlhf", steps=STEPS, references=("chosen",)),)
    training = small.rl_training(evaluation_prompts=4, checkpoint_every=1)
    return small.rl_policy(rl=RlConfig(**config), rounds=rounds, training=training)


def _improver() -> Any:
    rounds = (Round(name="sampled", steps=STEPS, references=("policy", "improver", "chosen", "rejected")),)
    return dataclasses.replace(small.rl_improver(), rounds=rounds, policy="sft_policy")


PACKED = dataclasses.replace(TRAINING, packing=Packing(rows=8, inputs=60, targets=42, segments=4))
STAGES = {
    "sft": small.sft("improver", training=TRAINING),
    "sft packed": small.sft("policy", training=PACKED),
    "reward": small.reward("bt", training=TRAINING),
    "gap reward": small.reward("gap", training=dataclasses.replace(TRAINING, micro_batches=2)),
    "dpo": Dpo(name="dpo", init_from="sft_policy", training=TRAINING, beta=0.3, report_records=24),
    "rloo": _rl(),
    "group": _rl(estimator="group"),
    "reinforce": _rl(estimator="reinforce", samples_per_prompt=2),
    "ppo": _rl(estimator="ppo", policy=PPO, epochs=2, minibatches=2),
    "improver": _improver(),
    "one step off": _rl(one_step_off=True),
}


class Counter:
    """Counts what jax traces and compiles while a program takes its steps."""

    def __init__(self) -> None:
        self.of_step: dict[int, collections.Counter[str]] = {}
        self._now: collections.Counter[str] | None = None

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._now is not None and event in (COMPILED, TRACED):
            self._now[event] += 1

    def late(self) -> dict[int, dict[str, int]]:
        """Return what was traced or compiled from step 2 on, counted from 0."""
        return {step: dict(found) for step, found in self.of_step.items() if step >= 2 and found}

    def follow(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method, counted."""

        def counted(program: Any, state: TrainState, step: int) -> Any:
            self._now = self.of_step.setdefault(step, collections.Counter())
            result = advance(program, state, step)
            self._now = None
            return result

        return counted


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    counter = Counter()
    for owner in (SupervisedProgram, RlProgram):
        monkeypatch.setattr(owner, "advance", counter.follow(owner.advance))
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STAGES]
)
def test_nothing_is_compiled_after_the_second_step(
    whole: pathlib.Path, tmp_path: pathlib.Path, name: str, counter: Counter
) -> None:
    jax.clear_caches()  # What earlier tests have compiled would hide that a step compiles something.
    small.alone(whole, tmp_path, STAGES[name])
    assert counter.of_step[0][COMPILED] > 0
    assert list(counter.of_step) == list(range(STEPS))
    assert counter.late() == {}, "steps from 2 on (counted from 0) traced or compiled"


def test_a_step_that_compiles_would_be_found(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, counter: Counter
) -> None:
    take = supervised.take_batch

    def taken(source: Any, collator: Any) -> Any:
        batch = take(source, collator)
        rows = source.state()["index"]  # Another shape at every step.
        jax.block_until_ready(jnp.zeros(rows) + 1)
        return batch

    monkeypatch.setattr(supervised, "take_batch", taken)
    small.alone(whole, tmp_path, STAGES["sft"])
    assert list(counter.late()) == [2, 3, 4]


class Gate:
    """Holds a state back on the device until it is opened; by itself after a while, which the test takes as failure."""

    def __init__(self, seconds: float) -> None:
        self.late = False
        self._seconds = seconds
        self._open = threading.Event()

    def close(self, state: TrainState) -> TrainState:
        """Return the state, which the device has only once the gate is open."""

        def wait(_: np.ndarray) -> np.ndarray:
            self.late |= not self._open.wait(timeout=self._seconds)
            return np.zeros((), np.float32)

        # A program whose arguments are there may run in the thread that calls it; these take the device a while.
        table = jax.ShapeDtypeStruct((1500, 1500), jnp.float32)
        gated = jax.jit(lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x)).lower(table)
        product = jax.jit(lambda x: jnp.tanh(x @ x)).lower(table).compile()
        held, busy = gated.compile(), jax.block_until_ready(jnp.ones(table.shape))
        for _ in range(3):
            busy = product(busy)

        def added(tree: TrainState, zero: jax.Array) -> TrainState:
            return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)

        return jax.jit(added)(state, held(busy))

    def open(self) -> None:
        """Let the device go on."""
        self._open.set()


@contextlib.contextmanager
def _held_back(
    monkeypatch: pytest.MonkeyPatch, *, sync: Callable[[Any], Any] = lambda _: None, seconds: float = 30
) -> Iterator[list[int]]:
    """Hold back the state of step 2; yields the steps that were dispatched while the device waited for it."""
    gate, ahead, advance = Gate(seconds), [], SupervisedProgram.advance

    def advanced(program: Any, state: TrainState, step: int) -> Any:
        if step == 2:
            state = gate.close(state)
        if step == STEPS - 1:
            gate.open()
        state, metrics = advance(program, state, step)
        sync(metrics)
        if 2 <= step < STEPS - 1 and not gate.late and not state.step.is_ready():
            ahead.append(step)
        return state, metrics

    monkeypatch.setattr(SupervisedProgram, "advance", advanced)
    yield ahead


@pytest.mark.parametrize("name", ["sft", "gap reward", pytest.param("dpo", marks=pytest.mark.slow)])
def test_supervised_steps_do_not_wait_for_the_device(
    whole: pathlib.Path, tmp_path: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = Loop(steps=STEPS, log_every=STEPS)
    stage = dataclasses.replace(STAGES[name], training=dataclasses.replace(STAGES[name].training, loop=rare))
    with _held_back(monkeypatch) as ahead:
        small.alone(whole, tmp_path, stage)
    assert ahead == [2, 3]


def test_a_step_that_waits_would_be_found(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = small.sft("policy", training=small.training(loop=Loop(steps=STEPS, log_every=STEPS)))
    with _held_back(monkeypatch, sync=lambda metrics: float(metrics["loss"].total), seconds=1) as ahead:
        small.alone(whole, tmp_path, stage)
    assert ahead == []
