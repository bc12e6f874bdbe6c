"""Steps timed one by one, and what a process has used. Linux; no framework, so that other projects can be timed too."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def since_start() -> float:
    """Return the seconds since this process was started, imports included."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - float(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """Return the most bytes that this process has had in host memory (VmHWM).

    `resource.getrusage` would count the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def others() -> tuple[float, float]:
    """Return (seconds of processors in use on the whole machine, those of this process) so far."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return busy, time.process_time()


@dataclasses.dataclass
class Laps:
    """Durations of steps; the first `warmup` compile and warm caches, and are kept apart.

    processors: seconds of processors that this process has used in each step: what is left of a comparison on a
      machine that does other things too.
    first: seconds from the start of the process to the end of the first step.
    disturbance: processors that other processes kept busy during the measured steps, on average.
    """

    warmup: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    processors: list[float] = dataclasses.field(default_factory=list)
    first: float = 0.0
    _last: tuple[float, float] = (0.0, 0.0)
    _from: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def begin(self) -> None:
        """Start the clock, right before the first step."""
        self._mark()
        self._last = (time.perf_counter(), time.process_time())

    def lap(self) -> None:
        """Note that a step has ended and the next begins."""
        self.seconds.append(time.perf_counter() - self._last[0])
        self.processors.append(time.process_time() - self._last[1])
        if len(self.seconds) == 1:
            self.first = since_start()
        if len(self.seconds) == self.warmup:
            self._mark()
        self._last = (time.perf_counter(), time.process_time())

    def repeat(self, step: Callable[[], object], count: int) -> None:
        """Time `warmup + count` calls."""
        self.begin()
        for _ in range(self.warmup + count):
            step()
            self.lap()

    def _mark(self) -> None:
        self._from = (time.perf_counter(), *others())

    @property
    def measured(self) -> list[float]:
        """Durations after the warm-up."""
        return self.seconds[self.warmup :]

    @property
    def median(self) -> float:
        """Median of them."""
        return statistics.median(self.measured)

    @property
    def disturbance(self) -> float:
        """Processors that others kept busy since the warm-up."""
        started, busy, own = self._from
        wall = time.perf_counter() - started
        now = others()
        return max((now[0] - busy) - (now[1] - own), 0.0) / wall if wall else 0.0
