"""Progress of a long job: a live bar at a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import IO, Any

PLAIN_SECONDS = 10.0
"""How often a plain line is written where there is no terminal."""


def duration(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def quantity(value: float) -> str:
    """Return a rate or a count in three digits: 950, 12.3k, 4.56M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


class Progress:
    """Shows name, step, loss, tokens per second and time left of a job of `total` steps.

    Use it as a context manager. `enabled=False` (every process but the first) shows nothing. Time left is
    measured on the steps of this process after its first one, which compiles.
    """

    def __init__(self, name: str, total: int, *, start: int, enabled: bool, stream: IO[str] | None = None) -> None:
        self._name, self._total, self._enabled = name, total, enabled
        self._stream = sys.stderr if stream is None else stream
        self._step = start
        self._shown: dict[str, float] = {}
        self._measured_from: tuple[int, float] | None = None
        self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        """Start the bar where there is a terminal."""
        if self._enabled and self._stream.isatty():
            self._bar = _terminal_bar(self._stream)
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._step, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Say that `step` steps are done; `values` may hold `loss` and `tokens_per_second` where known."""
        now = time.monotonic()
        self._step = step
        self._shown.update(values or {})
        if self._measured_from is None:
            self._measured_from = (step, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=self._numbers(now))
        elif self._enabled and (now - self._last_line >= PLAIN_SECONDS or (step == self._total and values)):
            self._last_line = now
            self.message(f"{self._name}  step {step}/{self._total}{self._numbers(now)}")

    def message(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def seconds_left(self, now: float) -> float | None:
        """Return the estimated seconds to the end, or None before there is anything to measure."""
        if self._measured_from is None or self._step <= self._measured_from[0]:
            return None
        per_step = (now - self._measured_from[1]) / (self._step - self._measured_from[0])
        return per_step * (self._total - self._step)

    def _numbers(self, now: float) -> str:
        parts = []
        if "loss" in self._shown:
            parts.append(f"loss {self._shown['loss']:.4g}")
        if "tokens_per_second" in self._shown:
            parts.append(f"{quantity(self._shown['tokens_per_second'])} tokens/s")
        left = self.seconds_left(now)
        if left:
            parts.append(f"{duration(left)} left")
        return "".join(f"  {part}" for part in parts)


def _terminal_bar(stream: IO[str]) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
        console=Console(file=stream), refresh_per_second=4,
    )  # fmt: skip
