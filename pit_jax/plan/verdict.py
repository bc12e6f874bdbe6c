"""What a program needs against what a chip has."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from pit_jax.plan.cost import Collective, Cost
from pit_jax.plan.topology import Chip

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)B?"
_OVERFLOWS = (
    re.compile(rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Ran out of memory in memory space hbm\. Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"[Oo]ut of memory while trying to allocate {_SIZE}(?:ytes)?()()"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip.

    arguments, temporaries, outputs, aliased (outputs that take the place of arguments), code: the compiler's own
    numbers. residents: arrays of other programs that stay. `total` is their sum; for a program that did not compile it
    is what the compiler wanted, and the parts it does not tell are None.
    """

    arguments: int
    residents: int
    total: int
    temporaries: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    code: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What is known of one program on one machine.

    stage, name: which. memory, cost: of one chip; cost is estimated from the program before optimisation where
    `compiled` is False, and then without collectives. problem: the compiler's message, for what it refused.
    seconds: of compilation by the clock, processor_seconds: of all its threads. seconds_estimate: the least a run can
    take, `estimate`.
    """

    stage: str
    name: str
    memory: Memory | None
    cost: Cost | None
    compiled: bool
    seconds: float
    available: int | None
    seconds_estimate: dict[str, float]
    problem: str | None = None
    processor_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether it can run; where the machine's memory is unknown, whether it compiles."""
        if not self.compiled or self.memory is None:
            return False
        return self.available is None or self.memory.total <= self.available

    @property
    def out_of_memory(self) -> bool:
        """Whether memory is all that is wrong with it."""
        return self.memory is not None and not self.fits

    def to_json(self) -> dict[str, Any]:
        """Return the program as it is shown by `--json`."""
        memory, cost = self.memory, self.cost
        least = max(self.seconds_estimate.values(), default=None)
        return {
            "stage": self.stage,
            "name": self.name,
            "fits": self.fits,
            "memory_bytes_per_chip": None if memory is None else memory.total,
            "available_bytes_per_chip": self.available,
            "excess_bytes_per_chip": None
            if memory is None or self.available is None
            else memory.total - self.available,
            "arguments_bytes": None if memory is None else memory.arguments,
            "temporaries_bytes": None if memory is None else memory.temporaries,
            "outputs_bytes": None if memory is None else memory.outputs,
            "aliased_bytes": None if memory is None else memory.aliased,
            "code_bytes": None if memory is None else memory.code,
            "resident_bytes": None if memory is None else memory.residents,
            "flops_per_chip": None if cost is None else cost.flops,
            "bytes_accessed_per_chip": None if cost is None or not self.compiled else cost.bytes,
            "collectives": [] if cost is None else [dataclasses.asdict(entry) for entry in cost.collectives],
            "uncounted": [] if cost is None else list(cost.uncounted),
            "estimated_seconds": least,
            "estimated_seconds_by": self.seconds_estimate,
            "compiled": self.compiled,
            "compile_seconds": round(self.seconds, 3),
            "compile_processor_seconds": round(self.processor_seconds, 3),
            "problem": self.problem,
        }


def overflow(message: str) -> int | None:
    """Return the bytes that a program wanted, from a compiler's message that they are too many; else None."""
    if "RESOURCE_EXHAUSTED" not in message and "memory" not in message:
        return None
    for pattern in _OVERFLOWS:
        if found := pattern.search(message):
            return int(float(found[1]) * _UNITS[found[2] or ""])
    return None


def estimate(cost: Cost, chip: Chip, slices: int) -> dict[str, float]:
    """Return the seconds that a program takes at least: by its FLOPs, its memory traffic and its collectives.

        t >= max(flops / peak, bytes / bandwidth, sent / link + sent between slices / network)

    Everything at the speeds of data sheets and perfectly overlapped, so a real step is slower; for comparing layouts.
    """
    found = {}
    if chip.flops:
        found["flops"] = cost.flops / chip.flops
    if chip.bandwidth:
        found["memory"] = cost.bytes / chip.bandwidth
    if chip.link and chip.network:
        found["collectives"] = sum(_sent(entry, chip, slices) for entry in cost.collectives)
    return found


def _sent(entry: Collective, chip: Chip, slices: int) -> float:
    assert chip.link is not None
    assert chip.network is not None
    return entry.wire_bytes / (chip.network if slices > 1 and "data" in entry.axes.split("+") else chip.link)
