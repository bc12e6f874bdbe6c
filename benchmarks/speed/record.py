"""What one measurement says, as JSON and as a line of a table."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.speed.clock import Laps, peak_memory
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work, operations

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One program's steps of one work.

    by: whose program ("pit_jax", "transformers", ...); variant: which settings of it.
    device: kind of the device ("cpu", or a GPU's name); device_memory: its peak in bytes, None on a CPU.
    first: seconds from the start of the process to the end of the first step.
    phases: median seconds of the parts of a step, by name. extra: further numbers.
    """

    work: Work
    shape: Shape
    by: str
    variant: str
    device: str
    seconds: Sequence[float]
    processors: Sequence[float]
    first: float
    first_step: float
    disturbance: float
    memory: int
    device_memory: int | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def processor(self) -> float:
        """Median seconds of processors of a step."""
        return statistics.median(self.processors)

    @property
    def tokens(self) -> float:
        """Tokens of a step: those of the work, or what was made where answers end early (`extra["tokens"]`)."""
        return self.extra["tokens"] if self.work.mean_length else self.work.tokens

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the median step."""
        return self.tokens / self.median

    @property
    def flops(self) -> float | None:
        """Operations a second, by the count of `work.operations`; None where answers end early, which it is not for."""
        return None if self.work.mean_length else operations(self.shape, self.work) / self.median

    @property
    def peak(self) -> int:
        """Peak memory: of the device where it has its own, else of the process."""
        return self.memory if self.device_memory is None else self.device_memory

    def to_json(self) -> dict[str, Any]:
        """Return everything, with the command and the machine."""
        return {
            **dataclasses.asdict(self),
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "tokens_per_second": self.tokens_per_second,
            "flops_per_second": self.flops,
            "command": command(),
            "machine": machine(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def from_json(data: Mapping[str, Any]) -> Record:
    """Return the record that `Record.to_json` wrote."""
    fields = {field.name: data[field.name] for field in dataclasses.fields(Record)}
    return Record(**(fields | {"work": Work(**data["work"]), "shape": Shape(**data["shape"])}))


def of_laps(laps: Laps, **fields: Any) -> Record:
    """Return the record of a process that has just timed its steps; `fields` are those the clock does not know."""
    return Record(
        seconds=tuple(laps.measured),
        processors=tuple(laps.processors[laps.warmup :]),
        first=laps.first,
        first_step=laps.seconds[0],
        disturbance=laps.disturbance,
        memory=peak_memory(),
        **fields,
    )


def command() -> str:
    """Return the command of this process, as it is typed in the repository's root."""
    spec = sys.modules["__main__"].__spec__
    program = sys.argv[0] if spec is None else f"-m {spec.name}"
    return " ".join(["python", program, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Return what is to be known of the computer: processor, cores that may be used, memory, load, system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "preloaded": [Path(library).name for library in os.environ.get("LD_PRELOAD", "").split(":") if library],
    }


def machine_line() -> str:
    """Return the same in a line, without the load."""
    found = machine()
    parts = [found["processor"], f"{found['cores']} cores", f"{found['memory_gib']} GiB", found["system"]]
    return ", ".join([*parts, *found["preloaded"]])


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {package: metadata.version(package) for package in packages}


def save(output: Path | None, name: str, data: Any) -> None:
    """Write `data` as DIR/name.json where there is such a directory; None writes nothing."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are as wide as their widest cell.

    Raises:
      ValueError: a row has another number of cells than the head.
    """
    if any(len(row) != len(heads) for row in rows):
        raise ValueError(f"every row must have the {len(heads)} cells of the head, found {[len(row) for row in rows]}")
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [heads, ["-" * max(width, 3) for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


HEADS = (
    "program",
    "s/step: median (min-max)",
    "processor s",
    "tokens/s",
    "GFLOP/s",
    "peak GiB",
    "first step after, s",
    "others busy",
)


def row(record: Record) -> tuple[str, ...]:
    """Return the cells of one record under `HEADS`."""
    spread = f"{record.median:.3f} ({min(record.seconds):.3f}-{max(record.seconds):.3f})"
    return (
        f"{record.by} {record.variant}".strip(),
        spread,
        f"{record.processor:.3f}",
        f"{record.tokens_per_second:,.0f}",
        "-" if record.flops is None else f"{record.flops / 1e9:,.1f}",
        f"{record.peak / GIB:.2f}",
        f"{record.first:.1f}",
        f"{record.disturbance:.1f}",
    )
