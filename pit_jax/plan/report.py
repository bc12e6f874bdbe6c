"""What a plan says: a table a stage for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pit_jax.io.progress import quantity
from pit_jax.plan.topology import Target, describe
from pit_jax.plan.verdict import Planned

_GIB = 2**30
_WIDTH = 150


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change to a recipe, and what became of the programs that did not fit before it.

    changes: settings and their new values, in words. fits: whether all of `programs` fit with it.
    """

    changes: tuple[str, ...]
    programs: tuple[Planned, ...]

    @property
    def fits(self) -> bool:
        """Whether all of the programs fit."""
        return all(program.fits for program in self.programs)

    def to_json(self) -> dict[str, Any]:
        """Return it as `--json` shows it."""
        programs = [program.to_json() for program in self.programs]
        return {"changes": list(self.changes), "fits": self.fits, "programs": programs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on a machine: every program, remarks on what was assumed, and what was tried where one does not fit."""

    machine: Target
    mesh: Mapping[str, int]
    programs: tuple[Planned, ...]
    remarks: tuple[str, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all programs fit."""
        return all(program.fits for program in self.programs)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        chip = {name: value for name, value in dataclasses.asdict(self.machine.chip).items() if value is not None}
        return {
            "topology": str(self.machine),
            "devices": self.machine.devices,
            "hosts": self.machine.hosts,
            "slices": self.machine.slices,
            "chip": chip,
            "mesh": dict(self.mesh),
            "fits": self.fits,
            "programs": [program.to_json() for program in self.programs],
            "remarks": list(self.remarks),
            "suggestions": [suggestion.to_json() for suggestion in self.suggestions],
        }


def show(plan: Plan, console: Console | None = None) -> None:
    """Print a plan for people."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH, file=console.file)
    sizes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(Text(f"{describe(plan.machine)}; mesh: {sizes}"))
    for stage in dict.fromkeys(program.stage for program in plan.programs):
        console.print()
        console.print(_table(stage, [program for program in plan.programs if program.stage == stage]))
    console.print()
    for remark in plan.remarks:
        console.print(Text(f"Note: {remark}"))
    for line in _verdict(plan):
        console.print(Text(line))


def _table(stage: str, programs: Sequence[Planned]) -> Table:
    """Return the table of one stage; sizes are of one chip."""
    table = Table(title=Text(stage, style="bold"), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("program", "memory", "arguments", "activations", "other arrays", "TFLOP", "moved"):
        table.add_column(name, justify="left" if name == "program" else "right", no_wrap=name != "program")
    table.add_column("sent in collectives")
    table.add_column("at least", justify="right")
    table.add_column("compiled in", justify="right")
    table.add_column("verdict")
    for program in programs:
        table.add_row(program.name, *_cells(program), _fate(program))
    return table


def _cells(program: Planned) -> list[str]:
    memory, cost = program.memory, program.cost
    sizes = ["?"] * 4
    if memory is not None:
        activations = None if memory.temporaries is None else memory.total - memory.arguments - memory.residents
        sizes = [_size(memory.total), _size(memory.arguments), _size(activations), _size(memory.residents)]
    numbers = ["?", "?", "?"]
    if cost is not None:
        moved = _bytes(cost.bytes) if program.compiled else "?"
        numbers = [f"{cost.flops / 1e12:.3g}", moved, _collectives(program) if program.compiled else "?"]
    estimate = program.seconds_estimate
    least = max(estimate.items(), key=lambda item: item[1], default=None)
    return [*sizes, *numbers, "" if least is None else f"{_time(least[1])} {least[0]}", f"{program.seconds:.0f} s"]


def _size(size: int | None) -> str:
    """Return a size in the unit that suits it."""
    if size is None:
        return "?"
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"


def _bytes(count: float) -> str:
    return f"{quantity(count)}B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _collectives(program: Planned) -> str:
    """Return what is sent by kind and mesh axis, the most first; what is under a hundredth of it is left out."""
    assert program.cost is not None
    sent: dict[str, float] = {}
    for entry in program.cost.collectives:
        name = f"{entry.kind} {entry.axes}"
        sent[name] = sent.get(name, 0.0) + entry.wire_bytes
    total = sum(sent.values())
    shown = sorted(((size, name) for name, size in sent.items() if size >= total / 100), reverse=True)
    return ", ".join(f"{name} {_bytes(size)}" for size, name in shown)


def _fate(program: Planned) -> Text:
    if program.fits:
        return Text("fits", style="green")
    if program.memory is None or program.available is None:
        return Text("not compiled", style="bold red")
    return Text(f"does not fit, by {_size(program.memory.total - program.available)}", style="bold red")


def _verdict(plan: Plan) -> list[str]:
    """Return the last lines: does it fit, by how much, what to change."""
    failed = [program for program in plan.programs if not program.fits]
    sized = [program for program in plan.programs if program.memory is not None]
    tried = [_tried(suggestion) for suggestion in plan.suggestions]
    if not failed:
        top = max(sized, key=lambda program: program.memory.total if program.memory else 0, default=None)
        if top is None or top.memory is None or top.available is None:
            return ["Everything compiles.", *tried]
        share = top.memory.total / top.available
        return [
            f"Fits. The largest program, {top.stage} / {top.name}, takes {_size(top.memory.total)} of "
            f"{_size(top.available)} a chip ({share:.0%}).",
            *tried,
        ]
    lines = [f"Does not fit: {len(failed)} of {len(plan.programs)} programs."]
    lines += [f"{p.stage} / {p.name}: {p.problem}" for p in failed if p.problem and p.memory is None]
    return lines + tried


def _tried(suggestion: Suggestion) -> str:
    found = "this fits" if suggestion.fits else "still does not fit"
    largest = max((p.memory.total for p in suggestion.programs if p.memory is not None), default=None)
    size = "" if largest is None else f", {_size(largest)} a chip"
    return f"Tried: {'; '.join(suggestion.changes)}: {found}{size}."
