"""Progress: a bar at a terminal, sparse plain lines in a pipe, silence in other processes."""

from __future__ import annotations

import io

import pytest

from pit_jax.io import progress
from pit_jax.io.progress import Progress, duration, quantity


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_come_every_ten_seconds_and_at_the_end(clock):
    stream = io.StringIO()
    with Progress("sft", 40, start=0, enabled=True, stream=stream) as bar:
        for step in range(1, 41):
            clock.now += 0.7
            bar.advance(step, {"loss": 2.5, "tokens_per_second": 12_345.0} if step % 10 == 0 else None)
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["15/40", "30/40", "40/40"]
    assert lines[0] == "sft  step 15/40  loss 2.5  12.3k tokens/s  0:17 left"


def test_time_left_counts_neither_the_first_step_nor_steps_of_an_earlier_process(clock):
    bar = Progress("rl", 100, start=50, enabled=False)
    clock.now += 60.0  # compilation
    bar.advance(51)
    assert bar.seconds_left(clock.now) is None
    clock.now += 4.0
    bar.advance(53)
    assert bar.seconds_left(clock.now) == pytest.approx(2.0 * 47)


def test_the_bar_shows_numbers_and_messages_pass_above_it():
    stream = Terminal()
    with Progress("gap", 3, start=0, enabled=True, stream=stream) as bar:
        bar.advance(1, {"loss": 0.75})
        bar.message("[kept] as it is")
        bar.advance(3)
    assert "gap" in stream.getvalue() and "loss 0.75" in stream.getvalue() and "3/3" in stream.getvalue()
    assert "[kept] as it is" in stream.getvalue()


def test_other_processes_are_silent():
    stream = Terminal()
    with Progress("sft", 1, start=0, enabled=False, stream=stream) as bar:
        bar.advance(1)
        bar.message("no")
    assert stream.getvalue() == ""


def test_numbers_for_people():
    assert [duration(seconds) for seconds in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
    assert [quantity(value) for value in (950, 12_345, 4_560_000, 2e9)] == ["950", "12.3k", "4.56M", "2G"]
