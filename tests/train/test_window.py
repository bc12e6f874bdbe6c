"""Phases: every second is counted once, in the phase it was spent in."""

from __future__ import annotations

import time

import jax
import pytest

from pit_jax.train.window import Clock, Compilation, Phases


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


def test_phases_add_up_to_the_time_that_has_passed(now: list[float]) -> None:
    phases = Phases()
    now[0] += 1  # In no phase.
    for name, seconds in (("data", 2), ("update", 3), ("data", 4)):
        phases.enter(name)
        now[0] += seconds
    assert phases.read() == {"data": 6, "update": 3}
    now[0] += 5
    with phases.paused():
        now[0] += 100
    now[0] += 1
    assert phases.read() == {"data": 6}
    now[0] += 7
    phases.enter(None)
    now[0] += 8
    assert phases.read() == {"data": 7}


def test_a_record_has_means_over_its_steps(now: list[float]) -> None:
    phases = Phases()
    clock = Clock(phases, Compilation(), began=90.0)
    for name, seconds in (("generate", 6), ("data", 2)):
        phases.enter(name)
        now[0] += seconds
    assert clock.first_step() == 18
    assert clock.read(2, 40.0) == {
        "timing/generate_seconds": 3,
        "timing/data_seconds": 1,
        "timing/data_share": 0.25,
        "timing/first_step_seconds": 18,
        "timing/seconds": 18,
        "timing/steps_per_second": 0.25,
        "timing/tokens_per_second": 5,
    }
    clock.restart()
    now[0] += 1
    assert "timing/first_step_seconds" not in clock.read(1, 0.0)


def test_compilation_is_noticed_while_somebody_listens() -> None:
    with Compilation() as compilation:
        jax.jit(lambda x: x * 17)(1.0)
        assert compilation.read() > 0 == compilation.read()
    jax.jit(lambda x: x * 19)(1.0)
    assert compilation.read() == 0
