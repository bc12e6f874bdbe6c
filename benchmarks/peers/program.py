"""What the programs of all peers have in common: their arguments, and where the measurement goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from benchmarks.speed import options
from benchmarks.speed import record as records
from benchmarks.speed.clock import Laps
from benchmarks.speed.record import Record
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work

Measurement = Callable[[Shape, Work, str, Laps, int], Record]
"""(shape, work, variant, clock, number of steps to time) -> record."""


def main(description: str | None, by: str, measurements: Mapping[str, Measurement]) -> None:
    """Measure the work that the command line names and write it to --output as BY-WORK-SHAPE-VARIANT.json."""
    parser = options.parser(description)
    parser.add_argument("--work", choices=tuple(measurements), required=True)
    arguments = parser.parse_args()
    shape, work = options.asked(arguments, arguments.work)
    laps = Laps(warmup=arguments.warmup)
    found = measurements[arguments.work](shape, work, arguments.variant, laps, arguments.steps)
    records.save(arguments.output, name_of(by, arguments.work, shape.name, arguments.variant), found.to_json())
    print(records.table(records.HEADS, [records.row(found)]))


def name_of(by: str, work: str, shape: str, variant: str) -> str:
    """Return the name of the file of a measurement."""
    return "-".join(part for part in (work, shape, by, variant) if part)


class Phases:
    """Seconds of the parts of steps; a part may come several times in a step."""

    def __init__(self) -> None:
        self._now: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []

    @contextmanager
    def of(self, name: str, wait: Callable[[], object]) -> Iterator[None]:
        """Time what is inside of a `with`, and `wait` after it."""
        start = time.perf_counter()
        yield
        wait()
        self._now[name] = self._now.get(name, 0.0) + time.perf_counter() - start

    def end_step(self) -> None:
        """Note that a step has ended."""
        self._steps.append(self._now)
        self._now = {}

    def medians(self, warmup: int) -> dict[str, float]:
        """Return the median seconds of each part after the first `warmup` steps."""
        names = {name: None for step in self._steps for name in step}
        return {name: statistics.median(step.get(name, 0.0) for step in self._steps[warmup:]) for name in names}
