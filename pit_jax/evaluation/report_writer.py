"""Writes the report of an evaluation: Markdown, one self-contained HTML page, report.json, and PNG pictures."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from etils import epath

from pit_jax.evaluation import document, plots, report_judges, report_systems
from pit_jax.evaluation.cards import Cards
from pit_jax.evaluation.document import Block, Bullets, Cell, Estimate, Facts, Plot, Section, Table, Warnings
from pit_jax.evaluation.report import Report


def write(report: Report, directory: epath.Path) -> epath.Path:
    """Write the PNG plots, report.md, report.html and, last, report.json; return the page's path."""
    return document.write(report.title, sections(report), as_json(report), directory)


def as_json(report: Report) -> dict[str, Any]:
    """Return all figures of the report, but for the curves of training, which the stages have in metrics.jsonl."""
    data = dataclasses.asdict(dataclasses.replace(report, supervised={}, reinforced={}))
    del data["supervised"], data["reinforced"]
    data["warnings"] = report.all_warnings()
    data["policy_curve"] = [
        {"rlhf_steps": steps, "comparisons": [dataclasses.asdict(row) for row in rows]}
        for steps, rows in report.policy_curve
    ]
    data["quality"] = [
        {"system": name, "temperature": temperature, "mean": mean, "ci95": [low, high]}
        for name, points in report.quality.items()
        for temperature, (mean, low, high) in points.items()
    ]
    for entry, example in zip(data["examples"], report.examples, strict=True):
        entry["opinions"] = [dataclasses.asdict(opinion) for opinion in example.said]
    return data


def sections(report: Report) -> list[Section]:
    """Return the parts of the report that there is something to say in, in their order."""
    head: list[Block] = [Facts(items=report.facts)]
    if report.all_warnings():
        head.append(Warnings(items=report.all_warnings()))
    found = [
        ("Summary", [*head, *report_systems.who_wins(report)]),
        (
            "Ratings",
            report_systems.ratings(report),
        ),
        ("Iterations and temperature", report_systems.sweeps(report)),
        ("Length", report_systems.length(report)),
        ("Judges", report_judges.judges(report)),
        ("RLHF steps of the Original", report_systems.policy_curve(report)),
        ("Reward models", _reward_models(report)),
        ("Training", _training(report)),
        ("All comparisons", report_systems.all_comparisons(report)),
        ("Side by side", [Cards(examples=report.examples)] if report.examples else []),
        ("Left out", _dropped(report)),
        ("Notes", [Bullets(items=report.notes)] if report.notes else []),
        ("Run it again", [report.rerun] if report.rerun is not None else []),
    ]
    return [Section(title=title, blocks=blocks) for title, blocks in found if blocks]


def _reward_models(report: Report) -> list[Block]:
    rows: list[list[Cell]] = []
    blocks: list[Block] = []
    for stage, result in report.reward_models.items():
        for name, value in result.get("accuracy", {}).items():
            low, high = value["ci95"]
            rows.append([stage, name, Estimate(value=value["value"], ci95=(low, high), form=".3f"), value["n"]])
        rows += [[stage, name, f"{value:.3f}", "–"] for name, value in result.get("scalars", {}).items()]
        if "histograms" in result:
            caption = f"{stage}: the four gaps on held-out records. Wanted: better-worse to the right of the rest."
            draw = functools.partial(plots.histograms, result["histograms"])
            blocks.append(Plot(name=f"gaps_{_slug(stage)}.png", caption=caption, draw=draw))
    table = Table(header=("stage", "on held-out records", "value", "n"), rows=rows)
    return [table, *blocks] if rows else blocks


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _training(report: Report) -> list[Block]:
    blocks: list[Block] = []
    if report.reinforced:
        names = ("reward/mean", "kl/mean", "length/mean", "eos_rate")
        draw = functools.partial(plots.curves, report.reinforced, names)
        blocks.append(Plot(name="reinforcement.png", caption="Reinforcement learning, step by step.", draw=draw))
    if report.supervised:
        draw = functools.partial(plots.losses, report.supervised)
        blocks.append(Plot(name="losses.png", caption="Training and held-out losses.", draw=draw))
    return blocks


def _dropped(report: Report) -> list[Block]:
    if not report.dropped:
        return []
    rows: list[list[Cell]] = [
        [entry.what, entry.reason, entry.count, document.count(entry.total), document.short(entry.example)]
        for entry in report.dropped
    ]
    return [Table(header=("what", "why", "count", "of", "such as"), rows=rows)]
