"""Pictures of what the benchmarks have written: a roofline, the comparison, and where the time of an RL step goes.

    python -m benchmarks.plots RESULTS [--output docs/images]

RESULTS holds the JSON files of `--output` (those of the comparison in RESULTS/peers).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.peers import compare
from benchmarks.peers.compare import COMMANDS, PEERS, best, times_faster
from benchmarks.speed.record import Record, from_json
from benchmarks.speed.work import decoding, decoding_bytes, least_bytes, operations

NAMES = compare.NAMES | {"gap": "gap step"}
COLOURS = {"sft": "#1b6ca8", "gap": "#3f8f5f", "rollout": "#b5651d", "rl": "#7b4b94"}


class Point(NamedTuple):
    """A measurement in the roofline: operations for each byte that must be moved, and operations a second."""

    label: str
    colour: str
    intensity: float
    speed: float


def main() -> None:
    """Draw what there is to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    ours = {path.stem: json.loads(path.read_text()) for path in sorted(arguments.results.glob("*-pit_jax*.json"))}
    measured = [found for found in ours.values() if "ceilings" in found["extra"]]
    if measured:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        draw_roofline(axes, ceilings(measured), points([from_json(found) for found in measured]))
        figure.savefig(arguments.output / "roofline.png", dpi=150)
    compared: dict[str, list[Record]] = {}
    for path in sorted((arguments.results / "peers").glob("*.json")):
        compared.setdefault(path.stem.partition("-")[0], []).append(from_json(json.loads(path.read_text())))
    if any(one.by != "pit_jax" for several in compared.values() for one in several):
        figure, axes = plt.subplots(figsize=(7, 0.9 * len(compared) + 1.2), layout="constrained")
        draw_ratios(axes, compared)
        figure.savefig(arguments.output / "against_others.png", dpi=150)
    phased = [one for one in compared.get("rl", ()) if one.phases]
    if phased:
        figure, axes = plt.subplots(figsize=(7, 0.6 * len(phased) + 1.4), layout="constrained")
        draw_phases(axes, phased)
        figure.savefig(arguments.output / "rl_phases.png", dpi=150)


def ceilings(found: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return (operations, bytes) a second: the best that was measured beside any of the records."""
    limits = [one["extra"]["ceilings"] for one in found]
    return max(limit["peak"] or limit["matmul"] for limit in limits), max(limit["copy"] for limit in limits)


def points(found: Sequence[Record]) -> list[Point]:
    """Return a point for each record, and one for the decoding of rollouts."""
    made = []
    for one in found:
        shape, work = one.shape, one.work
        label = f"{NAMES[work.kind]} {one.variant}".strip()
        intensity = operations(shape, work) / least_bytes(shape, work)
        assert one.flops is not None
        made.append(Point(label, COLOURS[work.kind], intensity, one.flops))
        if work.kind == "rollout":
            count = decoding(shape, work)
            speed = count / one.phases["decode"]
            made.append(Point(f"{label}: decoding", COLOURS[work.kind], count / decoding_bytes(shape, work), speed))
    return made


def draw_roofline(axes: Axes, limits: tuple[float, float], drawn: Sequence[Point]) -> None:
    """Draw the roof, the lower of (bytes a second times operations a byte) and operations a second, and the points."""
    peak, bandwidth = limits
    ridge = peak / bandwidth
    ends = [*(point.intensity for point in drawn), ridge]
    span = np.geomspace(min(ends) / 3, max(ends) * 3, 200)
    axes.plot(span, np.minimum(span * bandwidth, peak) / 1e9, color="black", linewidth=1.2)
    axes.annotate(f"{peak / 1e9:,.0f} GFLOP/s", (span[-1], peak / 1e9), (-4, 4), textcoords="offset points", ha="right")
    axes.annotate(
        f"{bandwidth / 1e9:,.1f} GB/s", (span[0], span[0] * bandwidth / 1e9), (8, 2), textcoords="offset points"
    )
    for number, point in enumerate(sorted(drawn)):
        share = point.speed / min(point.intensity * bandwidth, peak)
        marker = "osD^vP*X"[number % 8]
        axes.plot(
            point.intensity,
            point.speed / 1e9,
            marker,
            color=point.colour,
            label=f"{point.label}, {share:.0%} of the roof",
        )
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte that must be moved", ylabel="GFLOP/s")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right", fontsize="small")


def draw_ratios(axes: Axes, compared: Mapping[str, Sequence[Record]]) -> None:
    """Draw for each work a bar for each peer, as long as we are faster than its fastest variant with ours."""
    works = [work for work in COMMANDS if best(compared.get(work, ()), "pit_jax") is not None]
    for place, peer in enumerate(PEERS):
        for row, work in enumerate(works):
            ours, theirs = best(compared[work], "pit_jax"), best(compared[work], peer)
            if ours is None or theirs is None:
                continue
            ratio, height = times_faster(ours, theirs), 0.8 / len(PEERS)
            at = row - 0.4 + (place + 0.5) * height
            bar = axes.barh(at, ratio, height * 0.9, color=f"C{place}")
            axes.bar_label(bar, [f"{ratio:.1f} x"], padding=3, fontsize="small")
    axes.barh([0] * len(PEERS), 0, color=[f"C{place}" for place in range(len(PEERS))], label=list(PEERS))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(works)), [NAMES[work] for work in works])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="tokens/s of pit_jax to those of others")
    axes.legend(ncols=len(PEERS), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small", frameon=False)


def draw_phases(axes: Axes, found: Sequence[Record]) -> None:
    """Draw a bar for each program, cut into the phases of its step; what no phase has is "other"."""
    names = list(dict.fromkeys(name for one in found for name in one.phases))
    labels = [f"{one.by} {one.variant}".strip() for one in found]
    palette = {name: f"C{number}" for number, name in enumerate(names)} | {"other": "#c8c8c8"}
    left = np.zeros(len(found))
    for name in [*names, "other"]:
        spent = np.array([_spent(one, name) for one in found])
        axes.barh(labels, spent, left=left, color=palette[name], label=name)
        left += spent
    axes.invert_yaxis()
    axes.set(xlabel="seconds of an RL step", xlim=(0, left.max() * 1.02))
    axes.legend(ncols=len(names) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small", frameon=False)


def _spent(one: Record, name: str) -> float:
    return max(one.median - sum(one.phases.values()), 0.0) if name == "other" else one.phases.get(name, 0.0)


if __name__ == "__main__":
    main()
