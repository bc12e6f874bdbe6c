"""Programs are compiled several at a time before they are called, and calls find them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from pit_jax.train import compiling
from pit_jax.train.compiling import Compiling, Listed

LONG = 10.0


class Slow:
    """A program whose compilation takes until it is let go."""

    def __init__(self) -> None:
        self.begun, self.released, self.done = threading.Event(), threading.Event(), False

    def compile(self) -> None:
        self.begun.set()
        assert self.released.wait(LONG)
        self.done = True


class Meeting:
    """A program that is compiled only together with others."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def compile(self) -> None:
        self.barrier.wait(LONG)


class Refused:
    """A program that the compiler does not take."""

    def compile(self) -> None:
        raise ValueError("too large")


def test_programs_are_compiled_at_the_same_time() -> None:
    barrier = threading.Barrier(3)
    programs: list[Listed] = [("first", lambda: Meeting(barrier))] * 3
    with Compiling(3, lambda: programs) as at_work:
        at_work.start()
        at_work.wait()
    assert not barrier.broken


def test_what_comes_later_begins_after_the_first_step() -> None:
    first, later = Slow(), Slow()
    lowered: list[str] = []

    def lower(name: str, program: Slow) -> Slow:
        lowered.append(name)
        return program

    programs: list[Listed] = [("later", lambda: lower("later", later)), ("first", lambda: lower("first", first))]
    with Compiling(2, lambda: programs) as at_work:
        at_work.start()
        first.released.set()
        at_work.wait()
        assert first.done
        assert lowered == ["first"]
        at_work.go_on()
        assert lowered == ["first", "later"]
        assert later.begun.wait(LONG)
        assert not later.done
        later.released.set()
        at_work.wait()
        assert later.done


def test_what_the_compiler_refuses_is_said_where_it_would_be_called() -> None:
    with Compiling(1, lambda: [("later", Refused)]) as at_work:
        at_work.start()
        at_work.wait()
        at_work.go_on()
        with pytest.raises(ValueError, match="too large"):
            at_work.wait()


def test_a_stage_that_ends_early_gives_up_what_has_not_begun() -> None:
    running, waiting = Slow(), Slow()
    programs: list[Listed] = [("first", lambda: running), ("first", lambda: waiting)]
    with pytest.raises(KeyboardInterrupt), Compiling(1, lambda: programs) as at_work:
        at_work.start()
        assert running.begun.wait(LONG)
        raise KeyboardInterrupt
    assert not running.done  # nobody waits for it either
    running.released.set()
    assert not waiting.begun.wait(0.2)


def test_without_threads_nothing_is_lowered() -> None:
    def programs() -> Iterator[Listed]:
        pytest.fail("was asked for programs")
        yield

    with Compiling(0, programs) as at_work:
        at_work.start()
        at_work.wait()


def test_functions_are_made_once_a_stage() -> None:
    at_work = Compiling()
    assert at_work.once("step", object) is not at_work.once("step", object)
    with at_work:
        step = at_work.once("step", object)
        assert at_work.once("step", object) is step
        assert at_work.once("other", object) is not step
    with at_work:
        assert at_work.once("step", object) is not step


def test_a_call_finds_what_was_compiled() -> None:
    function = jax.jit(lambda x: jnp.sin(x) @ x.T)
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    x = jnp.ones((8, 8))
    with Compiling(1, lambda: [("first", lambda: function.lower(shape))]) as at_work:
        at_work.start()
        at_work.wait()
        assert at_work.compilation.read() > 0
        function(x)
        assert at_work.compilation.read() == 0
        function(x[:4])
        assert at_work.compilation.read() > 0


@pytest.mark.parametrize(
    ("cores", "setting", "wanted"), [(2, None, 0), (4, None, 4), (64, None, 8), (2, 5, 5), (64, 0, 0)]
)
def test_few_cores_have_no_threads_to_spare(
    cores: int, setting: int | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.os, "cpu_count", lambda: cores)
    assert compiling.threads(setting) == wanted
