"""What the doctor has found: checks, their table and their JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "problem"]
_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    name: what. status: ok, warning (the run works, but worse than it could) or problem (it will fail).
    found: what is there. fix: what to do, empty where all is well. host: number of the process, None for all together.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
    host: int | None = None


def ok(name: str, found: str) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name=name, status="ok", found=found)


def warning(name: str, found: str, fix: str) -> Check:
    """Return a check that found something a run survives."""
    return Check(name=name, status="warning", found=found, fix=fix)


def problem(name: str, found: str, fix: str) -> Check:
    """Return a check that found something a run will fail of."""
    return Check(name=name, status="problem", found=found, fix=fix)


def count(checks: Sequence[Check], status: Status) -> int:
    """Return how many checks have this status."""
    return sum(check.status == status for check in checks)


def from_dict(data: dict[str, Any]) -> Check:
    """Return the check that `dataclasses.asdict` has written."""
    return Check(**data)


def as_json(checks: Sequence[Check]) -> str:
    """Return the report as JSON: `ok`, the numbers of problems and warnings, and the checks in their order."""
    problems = count(checks, "problem")
    report = {
        "ok": problems == 0,
        "problems": problems,
        "warnings": count(checks, "warning"),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def print_table(checks: Sequence[Check], console: Console) -> None:
    """Print a line a check, what to do below those that need it, and a summary."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        place = "" if check.host is None else f"host {check.host}: "
        text = Text(place + check.found)
        if check.fix:
            text.append(f"\n{check.fix}", style="italic")
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, text)
    console.print(table)
    problems, warnings = count(checks, "problem"), count(checks, "warning")
    console.print(f"{_plural(problems, 'problem')}, {_plural(warnings, 'warning')}")


def _plural(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
