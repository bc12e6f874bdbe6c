"""The report of a run: tables and pictures as Markdown, one self-contained HTML page, and report.json."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pit_jax.evaluation import page, plots
from pit_jax.evaluation.winrate import Comparison
from pit_jax.io import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with the original and the improved response, for the side-by-side section."""

    prompt: str
    original: str
    improved: str
    score_original: float
    score_improved: float

    @property
    def outcome(self) -> str:
        """Return "win", "lose" or "tie", from the improved response's side."""
        if self.score_improved == self.score_original:
            return "tie"
        return "win" if self.score_improved > self.score_original else "lose"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the report shows.

    comparisons: all win-rate rows, those against the Original first.
    policy_curve: (RLHF steps, rows against the policy stopped there); original_steps is where it was stopped.
    quality: system -> temperature -> (mean score, low, high).
    reward_models: stage -> its held-out evaluation (accuracies with intervals, histograms).
    supervised, reinforced: stage -> metric records of its training, for the curves.
    """

    title: str
    seed: int
    facts: Mapping[str, str]
    notes: Sequence[str]
    comparisons: Sequence[Comparison]
    policy_curve: Sequence[tuple[int, Sequence[Comparison]]]
    original_steps: int | None
    quality: Mapping[str, Mapping[float, tuple[float, float, float]]]
    reward_models: Mapping[str, Mapping[str, Any]]
    supervised: Mapping[str, plots.Records]
    reinforced: Mapping[str, plots.Records]
    examples: Sequence[Example]


def write(report: Report, directory: epath.Path) -> epath.Path:
    """Write the PNG plots, report.md, report.html and, last, report.json; return the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = _draw(report, directory)
    files.write_text(directory / "report.md", markdown(report, pictures))
    files.write_text(directory / "report.html", _html(report, pictures, directory))
    files.write_text(directory / "report.json", json.dumps(_as_json(report), indent=1, allow_nan=False) + "\n")
    return directory / "report.html"


def _as_json(report: Report) -> dict[str, Any]:
    data = dataclasses.asdict(report)
    del data["supervised"], data["reinforced"]
    data["policy_curve"] = [
        {"rlhf_steps": steps, "comparisons": [dataclasses.asdict(row) for row in rows]}
        for steps, rows in report.policy_curve
    ]
    data["quality"] = [
        {"system": name, "temperature": temperature, "mean": mean, "ci95": [low, high]}
        for name, points in report.quality.items()
        for temperature, (mean, low, high) in points.items()
    ]
    return data


def main_rows(report: Report) -> list[Comparison]:
    """Return the rows against the Original by the first judge with both sides at one, the highest, temperature."""
    rows = [row for row in report.comparisons if row.baseline == "original"]
    if not rows:
        return []
    top, judge = max(row.temperature_baseline for row in rows), rows[0].judge
    return [row for row in rows if row.judge == judge and row.temperature_candidate == row.temperature_baseline == top]


def _draw(report: Report, directory: epath.Path) -> dict[str, str]:
    """Draw what there is data for; return {file name: caption}."""
    pictures: dict[str, str] = {}

    def add(name: str, caption: str) -> epath.Path:
        pictures[name] = caption
        return directory / name

    rows = main_rows(report)
    if rows:
        plots.deltas(rows, add("delta.png", "Delta against Original, both sampled at the same temperature."))
    series = {name: points for name, points in report.quality.items() if len(points) > 1}
    if series:
        caption = "Mean score by the judge against the sampling temperature, with 95 % intervals."
        plots.temperatures(series, add("temperature.png", caption))
    iterations = [(_iteration(row), [_renamed(row)]) for row in rows if _iteration(row)]
    if len(iterations) > 1:
        plots.against(iterations, "improvement steps", add("iterations.png", "Iterated improvement."))
    if report.policy_curve:
        caption = "Delta against Originals stopped after different numbers of RLHF steps."
        if report.original_steps is not None:
            caption += f" The Original of this report was stopped after {report.original_steps}."
        plots.against(report.policy_curve, "RLHF steps of the Original", add("policy_steps.png", caption))
    if report.reinforced:
        names = ("reward/mean", "kl/mean", "length/mean", "eos_rate")
        plots.curves(report.reinforced, names, add("reinforcement.png", "Reinforcement learning, step by step."))
    if report.supervised:
        plots.losses(report.supervised, add("losses.png", "Training and held-out losses."))
    for stage, result in report.reward_models.items():
        if "histograms" in result:
            caption = f"{stage}: the four gaps on held-out records. Wanted: better-worse to the right of the rest."
            plots.histograms(result["histograms"], add(f"gaps_{stage}.png", caption))
    return pictures


def _iteration(row: Comparison) -> int:
    """Return k for a row named pit_iterK or pit_raw_iterK, 1 for their first step, 0 for other rows."""
    if row.candidate in ("pit", "pit_raw"):
        return 1
    stem, _, number = row.candidate.rpartition("_iter")
    return int(number) if stem in ("pit", "pit_raw") and number.isdigit() else 0


def _renamed(row: Comparison) -> Comparison:
    stem = row.candidate.rpartition("_iter")[0] or row.candidate
    label = {"pit": "accept rule", "pit_raw": "always accept"}[stem]
    return dataclasses.replace(row, candidate=label)


_HEADER = ("candidate", "T", "against", "T", "judge", "n", "win", "lose", "tie", "Delta", "95 % interval", "length")


def _cells(row: Comparison) -> tuple[str, ...]:
    return (
        row.candidate, f"{row.temperature_candidate:g}", row.baseline, f"{row.temperature_baseline:g}", row.judge,
        str(row.n), f"{row.win:.1f}", f"{row.lose:.1f}", f"{row.tie:.1f}", f"{row.delta:+.1f}",
        f"[{row.ci95[0]:+.1f}, {row.ci95[1]:+.1f}]", f"{row.length_candidate:.1f} / {row.length_baseline:.1f}",
    )  # fmt: skip


def reward_cells(report: Report) -> list[tuple[str, ...]]:
    """Return the rows (stage, measure, value, interval, n) of the reward models' table."""
    rows = []
    for stage, result in report.reward_models.items():
        for name, value in result.get("accuracy", {}).items():
            low, high = value["ci95"]
            rows.append((stage, name, f"{value['value']:.3f}", f"[{low:.3f}, {high:.3f}]", str(value["n"])))
        for name, value in result.get("scalars", {}).items():
            rows.append((stage, name, f"{value:.3f}", "", ""))
    return rows


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """Return the report as Markdown; pictures are linked by their file names."""
    lines = [f"# {report.title}", ""]
    lines += [f"* **{name}:** {value}" for name, value in report.facts.items()]
    lines += ["", "## Who wins", "", _table(_HEADER, [_cells(row) for row in main_rows(report)]), ""]
    lines += [f"![{caption}]({name})\n\n{caption}\n" for name, caption in pictures.items()]
    lines += ["## All comparisons", "", _table(_HEADER, [_cells(row) for row in report.comparisons])]
    if report.reward_models:
        header = ("stage", "on held-out records", "value", "95 % interval", "n")
        lines += ["", "## Reward models", "", _table(header, reward_cells(report))]
    if report.policy_curve:
        rows = [(str(steps), *_cells(row)) for steps, group in report.policy_curve for row in group]
        lines += ["", "## Delta against the number of RLHF steps of the Original", ""]
        lines += [_table(("RLHF steps", *_HEADER), rows)]
    lines += ["", "## Side by side", ""]
    for example in report.examples[:12]:
        lines += [
            f"* *{_inline(example.prompt)}*",
            f"  * original ({example.score_original:.2f}): {_inline(example.original)}",
            f"  * improved ({example.score_improved:.2f}, {example.outcome}): {_inline(example.improved)}",
        ]
    lines += ["", "## Notes", ""] + [f"* {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _html(report: Report, pictures: Mapping[str, str], directory: epath.Path) -> str:
    header = ("stage", "on held-out records", "value", "95 % interval", "n")
    sections = [
        page.definition_list(report.facts),
        page.section("Who wins", page.table(_HEADER, [_cells(row) for row in main_rows(report)])),
        "".join(_picture(directory / name, caption) for name, caption in pictures.items()),
        page.section("All comparisons", page.table(_HEADER, [_cells(row) for row in report.comparisons])),
    ]
    if report.reward_models:
        sections.append(page.section("Reward models", page.table(header, reward_cells(report))))
    if report.policy_curve:
        rows = [(str(steps), *_cells(row)) for steps, group in report.policy_curve for row in group]
        title = "Delta against the number of RLHF steps of the Original"
        sections.append(page.section(title, page.table(("RLHF steps", *_HEADER), rows)))
    cards = [
        page.side_by_side(
            example.prompt, (example.original, example.score_original), (example.improved, example.score_improved),
            example.outcome,
        )
        for example in report.examples
    ]  # fmt: skip
    sections.append(page.section("Side by side", page.filters(["win", "lose", "tie"]) + "".join(cards)))
    sections.append(
        page.section("Notes", "<ul>" + "".join(f"<li>{html.escape(n)}</li>" for n in report.notes) + "</ul>")
    )
    return page.document(report.title, "".join(sections))


def _picture(path: epath.Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
