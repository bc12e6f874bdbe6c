"""The same work by pit_jax, plain transformers, TRL and Tunix, in turns, and how much faster which is.

    python -m benchmarks.peers.compare --work sft rollout rl --shape nano --peers transformers,trl,tunix
        --python-trl DIR/bin/python --python-tunix DIR/bin/python [--rounds 2] [--steps 5] [--output DIR]

Every program runs in a process of its own, one after the other, `--rounds` times in turns (A B A B), so that whatever
else the machine does hits all of them. Of each project's variants, ours too, the fastest counts. How each peer is
installed is said at the top of benchmarks/peers/*_peer.py; one that fails is named and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import options
from benchmarks.speed import record as records
from benchmarks.speed.record import GIB, Record

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"sft": "sft_step", "rollout": "rollout", "ending": "rollout_ending", "rl": "rl_step"}
NAMES = {"sft": "SFT step", "rollout": "rollout", "ending": "rollout, answers end early", "rl": "RL step"}
_CACHES = ("dynamic", "static")
PEERS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "transformers": {
        "cpu": {"sft": ("sdpa", "eager"), "rollout": ("dynamic",), "ending": ("dynamic",), "rl": ("sdpa", "eager")},
        "gpu": {"sft": ("sdpa", "compile"), "rollout": _CACHES, "ending": _CACHES, "rl": ("sdpa", "compile")},
    },
    "trl": {
        "cpu": {"sft": ("plain",), "rl": ("plain",)},
        "gpu": {"sft": ("plain", "checkpointing"), "rl": ("plain", "checkpointing")},
    },
    "tunix": {
        "cpu": {"sft": ("remat", "plain"), "rollout": ("sampler",), "ending": ("sampler",), "rl": ("grpo",)},
        "gpu": {"sft": ("remat",), "rollout": ("sampler",), "ending": ("sampler",), "rl": ("grpo",)},
    },
}
"""Variants of each peer that may be its best, by platform and work."""
_MICRO, _ONCE = "--training micro_batches=4", "--stage rescore=False"
_REPLACED = "--stage portions=4"
OURS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {
        "sft": {"micro-batches": _MICRO},
        "rollout": {"inverse": "--stage draws=inverse", "two-devices": "--devices 2 --stage draws=inverse"},
        "ending": {"replaced": _REPLACED, "replaced-inverse": f"{_REPLACED} draws=inverse"},
        "rl": {"micro-batches": _MICRO, "scored-once": f"{_MICRO} {_ONCE}"},
    },
    "gpu": {
        "rollout": {"inverse": "--stage draws=inverse"},
        "ending": {"replaced": _REPLACED},
        "rl": {"scored-once": _ONCE},
    },
}
"""The same of ours, beside the defaults. No peer scores its samples a second time before the update."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A program that takes part: `command` without --output, and the name of the file it writes there."""

    by: str
    variant: str
    command: tuple[str, ...]

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return f"{self.by} {self.variant}".strip()


def main() -> None:
    """Run all works that were asked for; print tables and the rows of docs/performance.md."""
    arguments = _parser().parse_args()
    lines = []
    for work in arguments.work:
        found = contest(arguments, work)
        print(f"\n{NAMES[work]}, {arguments.shape}\n\n{comparison(found)}\n", flush=True)
        if ours := best(found, "pit_jax"):
            lines.append(document_row(work, arguments.shape, ours, found))
    print(records.table(DOCUMENT_HEADS, lines))
    print(f"\ncommand: {records.command()}\nmachine: {records.machine_line()}")


def _parser() -> argparse.ArgumentParser:
    parser = options.parser(__doc__)
    parser.add_argument("--work", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--peers", default="transformers,trl,tunix", help="separated by commas; may be empty")
    for peer in PEERS:
        parser.add_argument(f"--python-{peer}", default=sys.executable, help=f"interpreter that has {peer}")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="whose variants of the peers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=ARGUMENTS",
        help="a further variant of ours in all works, such as 'scan=--set scan_layers=True'",
    )  # fmt: skip
    return parser


def entries(arguments: argparse.Namespace, work: str) -> list[Entry]:
    """Return the programs that take part in a work, ours first."""
    sizes = options.sizes(arguments)
    command = (sys.executable, "-m", f"benchmarks.{COMMANDS[work]}", "--no_ceilings", *sizes)
    found = [Entry(by="pit_jax", variant="", command=command)]
    further = dict(text.partition("=")[::2] for text in arguments.ours)
    for name, more in (OURS[arguments.platform].get(work, {}) | further).items():
        found.append(Entry(by="pit_jax", variant=name, command=(*command, f"--variant={name}", *shlex.split(more))))
    for peer in filter(None, arguments.peers.split(",")):
        if peer not in PEERS:
            raise SystemExit(f"--peers {peer!r} must be among {', '.join(PEERS)}")
        python = vars(arguments)[f"python_{peer}"]
        for variant in PEERS[peer][arguments.platform].get(work, ()):
            rest = (f"--work={work}", f"--variant={variant}", *sizes)
            found.append(
                Entry(by=peer, variant=variant, command=(python, "-m", f"benchmarks.peers.{peer}_peer", *rest))
            )
    return found


def contest(arguments: argparse.Namespace, work: str) -> list[Record]:
    """Run all programs of a work in turns, and return what was measured of each in all rounds together."""
    taking_part = entries(arguments, work)
    found: dict[Entry, list[Record]] = {}
    for number in range(arguments.rounds):
        for entry in list(taking_part):
            measured = run(entry)
            if measured is None:
                taking_part.remove(entry)
                continue
            print(f"{work}, round {number + 1}, {entry.label}: {measured.median:.3f} s a step", flush=True)
            found.setdefault(entry, []).append(measured)
    together = [pooled(several) for several in found.values()]
    for one in together:
        name = "-".join(part for part in (work, one.shape.name, one.by, one.variant) if part)
        records.save(arguments.output, name, one.to_json())
    return together


def run(entry: Entry) -> Record | None:
    """Run one program and return its record; None, with the end of what it said, if it fails."""
    with tempfile.TemporaryDirectory() as output:
        command = [*entry.command, f"--output={output}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        written = list(Path(output).glob("*.json"))
        if done.returncode or not written:
            last = "\n".join(done.stderr.strip().splitlines()[-8:])
            print(f"{entry.label} failed and is left out: {shlex.join(command)}\n{last}", flush=True)
            return None
        return records.from_json(json.loads(written[0].read_text()))


def pooled(several: Sequence[Record]) -> Record:
    """Return the steps of several processes as one record: all their times, the highest memory, medians of phases."""
    phases = {name: statistics.median(one.phases[name] for one in several) for name in several[0].phases}
    return dataclasses.replace(
        several[0],
        seconds=tuple(second for one in several for second in one.seconds),
        processors=tuple(second for one in several for second in one.processors),
        first=statistics.median(one.first for one in several),
        first_step=statistics.median(one.first_step for one in several),
        disturbance=max(one.disturbance for one in several),
        memory=max(one.memory for one in several),
        device_memory=max(one.device_memory or 0 for one in several) or None,
        phases=phases,
        extra={**several[0].extra, "tokens": statistics.mean(one.tokens for one in several)},
    )


def best(found: Sequence[Record], by: str) -> Record | None:
    """Return the fastest variant of one project, None if it did not take part."""
    return max((one for one in found if one.by == by), key=lambda one: one.tokens_per_second, default=None)


def times_faster(ours: Record, theirs: Record) -> float:
    """Return how many times the throughput of another program ours is."""
    return ours.tokens_per_second / theirs.tokens_per_second


def comparison(found: Sequence[Record]) -> str:
    """Return the table of a work, with how much faster than each program our best is, and the phases."""
    ours = best(found, "pit_jax")
    rows = []
    for one in found:
        ratio = "" if ours is None or one.by == "pit_jax" else f"{times_faster(ours, one):.2f} x"
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one.phases.items())
        rows.append((*records.row(one), ratio, phases))
    return records.table((*records.HEADS, "pit_jax is", "phases, s"), rows)


DOCUMENT_HEADS = (
    "work", "platform", "pit_jax", "transformers", "ratio", "TRL", "ratio", "Tunix", "ratio", "memory of the least"
)  # fmt: skip


def document_row(work: str, shape: str, ours: Record, found: Sequence[Record]) -> tuple[str, ...]:
    """Return the row of docs/performance.md: our figure, each peer's best and the ratio, and ours to the least memory.

    A figure is tokens a second and peak memory; "-" stands for a peer that has no such work or did not take part.
    """
    platform = "CPU" if ours.device == "cpu" else ours.device.removeprefix("NVIDIA ")
    cells = [f"{NAMES[work]}, {shape}", platform, _figure(ours)]
    rivals = [best(found, peer) for peer in PEERS]
    for rival in rivals:
        cells += ["-", "-"] if rival is None else [_figure(rival), f"{times_faster(ours, rival):.1f} x"]
    least = min((rival.peak for rival in rivals if rival is not None), default=None)
    return (*cells, "-" if least is None else f"{ours.peak / least:.2f} x")


def _figure(one: Record) -> str:
    variant = f" ({one.variant})" if one.variant else ""
    return f"{one.tokens_per_second:,.0f} {one.work.unit}, {one.peak / GIB:.2f} GiB{variant}"


if __name__ == "__main__":
    main()
