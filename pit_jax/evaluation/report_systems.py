"""What the report of an evaluation says of the systems: who wins, ratings, iterations, temperature, and length."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pit_jax.evaluation import plots
from pit_jax.evaluation.document import Block, Bullets, Cell, Estimate, Folded, Plot, Table
from pit_jax.evaluation.plots import Axes, Bar, Point
from pit_jax.evaluation.ratings import Rating, RatingTable
from pit_jax.evaluation.report import BASELINE, Report, against_baseline, length_of, main_rows
from pit_jax.evaluation.report_parts import Rated, families
from pit_jax.evaluation.winrate import Comparison

_MOST_ROWS = 24
"""Rows above which the table of all comparisons is folded up."""


def who_wins(report: Report) -> list[Block]:
    """Return the main table, with its pictures."""
    rows = main_rows(report)
    if not rows:
        return []
    note = (
        f"Each system against `{BASELINE}`, both sampled at temperature {rows[0].temperature_baseline:g}, by judge "
        f"`{rows[0].judge}`, in % of prompts. Delta = win - lose, in points, with its 95 % interval. Length: mean "
        f"tokens; the Original's is {rows[0].length_baseline:.1f}."
    )
    header = ["system", "Delta", "win", "lose", "tie", "n", "length"]
    if report.lengths:
        header += ["p", "Delta at equal lengths"]
        note += " p: exact sign test over prompts."
    cells = [[*_main_cells(row), *(_length_cells(report, row) if report.lengths else ())] for row in rows]
    blocks: list[Block] = [
        Table(header=header, rows=cells, note=note),
        Plot(
            name="delta.png",
            caption="Delta against Original, both sampled at the same temperature.",
            draw=functools.partial(plots.deltas, rows),
        ),
        Plot(
            name="outcomes.png",
            caption="Who wins against Original, in % of prompts.",
            draw=functools.partial(plots.outcomes, rows),
        ),
    ]
    return [*blocks, *_by_judge(against_baseline(report))]


def _main_cells(row: Comparison) -> list[Cell]:
    shares = (f"{share:.1f}" for share in (row.win, row.lose, row.tie))
    return [row.candidate, _delta(row), *shares, row.n, f"{row.length_candidate:.1f}"]


def _delta(row: Comparison) -> Estimate:
    return Estimate(value=row.delta, ci95=row.ci95)


def _length_cells(report: Report, row: Comparison) -> list[Cell]:
    found = length_of(report, row)
    if found is None:
        return ["–", "–"]
    length, sign = found.summary.length, found.summary.sign
    return [f"{sign.p:.2g}", Estimate(value=length.delta, ci95=length.delta_ci95)]


def _by_judge(rows: Sequence[Comparison]) -> list[Block]:
    """Return Delta by each judge, where there are several."""
    judges = list(dict.fromkeys(row.judge for row in rows))
    if len(judges) < 2:
        return []
    found = {(row.candidate, row.judge): _delta(row) for row in rows}
    names = list(dict.fromkeys(row.candidate for row in rows))
    cells = [[name, *(found.get((name, judge), "–") for judge in judges)] for name in names]
    note = "A judge may have been asked about a part of the prompts: `n` stands under All comparisons."
    return [Table(title="Delta against Original by each judge", header=["system", *judges], rows=cells, note=note)]


def ratings(report: Report) -> list[Block]:
    """Return the ratings of all systems, by each judge that was asked for them."""
    return [block for index, rated in enumerate(report.ratings) for block in _rated(rated, index)]


def _rated(rated: Rated, index: int) -> list[Block]:
    """Return one judge's ratings; `index` numbers the judges, for the names of files."""
    tables = {"Bradley-Terry": rated.bradley_terry, "ELO": rated.elo}
    elo = {row.system: row for row in rated.elo.rows}
    cells: list[list[Cell]] = [
        [
            row.system,
            *(Estimate(value=r.rating, ci95=(r.low, r.high), form=".0f") for r in (row, elo[row.system])),
            *(row.wins, row.losses, row.ties),
        ]
        for row in rated.bradley_terry.rows
    ]
    note = (
        f"By judge `{rated.judge}`. {rated.bradley_terry.method}: intervals over prompts. {rated.elo.method}: the "
        "median and the range of 95 %. 400 points are odds of 10 to 1."
    )
    header = ["system", "Bradley-Terry", "ELO", "wins", "losses", "ties"]
    suffix = "" if index == 0 else f"_{index + 1}"
    bars = {name: plots.bars_of(table) for name, table in tables.items()}
    blocks: list[Block] = [
        Table(header=header, rows=cells, note=note),
        Plot(
            name=f"ratings{suffix}.png",
            caption=f"Ratings by judge {rated.judge}, with 95 % intervals.",
            draw=functools.partial(plots.rated, bars, rated.anchor),
        ),
    ]
    series = _rating_series(rated.bradley_terry)
    if series:
        axes = Axes(x="improvement steps", y="Bradley-Terry rating", whole=True)
        caption = f"Ratings by number of improvement steps, by judge {rated.judge}; step 0 is the Original."
        draw = functools.partial(plots.lines, series, axes)
        blocks.append(Plot(name=f"ratings_iterations{suffix}.png", caption=caption, draw=draw))
    notes = [*rated.bradley_terry.notes, *rated.elo.notes]
    return [*blocks, *([Bullets(items=list(dict.fromkeys(notes)))] if notes else [])]


def _rating_series(table: RatingTable) -> dict[str, list[Point]]:
    """Return the ratings of each family of iterated systems, beginning with the Original where it is rated."""
    place = families(row.system for row in table.rows)
    rows = {row.system: row for row in table.rows}
    series: dict[str, list[Point]] = {}
    for name, (family, step) in place.items():
        series.setdefault(family, []).append(_rating_point(step, rows[name]))
    if BASELINE in rows:
        series = {family: [_rating_point(0, rows[BASELINE]), *points] for family, points in series.items()}
    return dict(sorted(series.items()))


def _rating_point(step: int, row: Rating) -> Point:
    return Point(step, row.rating, row.low, row.high)


def sweeps(report: Report) -> list[Block]:
    """Return the pictures of what depends on the number of steps and on the temperature."""
    rows = main_rows(report)
    place = families(row.candidate for row in rows)
    steps: dict[str, list[Point]] = {}
    for row in rows:
        if row.candidate in place:
            family, step = place[row.candidate]
            steps.setdefault(family, []).append(Point(step, row.delta, *row.ci95))
    blocks: list[Block] = []
    if steps:
        axes = Axes(x="improvement steps", y="Delta against Original, points", zero=0.0, whole=True)
        draw = functools.partial(plots.lines, steps, axes)
        blocks.append(Plot(name="iterations.png", caption="Iterated improvement, with 95 % intervals.", draw=draw))
    warm: dict[str, list[Point]] = {}
    for row in report.comparisons:
        same = row.temperature_candidate == row.temperature_baseline
        if rows and same and row.baseline == BASELINE and row.judge == rows[0].judge:
            warm.setdefault(row.candidate, []).append(Point(row.temperature_candidate, row.delta, *row.ci95))
    warm = {name: points for name, points in warm.items() if len(points) > 1}
    if warm:
        axes = Axes(x="sampling temperature of both", y="Delta against Original, points", zero=0.0)
        caption = "Delta against Original at the same temperature, with 95 % intervals."
        blocks.append(
            Plot(name="temperature_delta.png", caption=caption, draw=functools.partial(plots.lines, warm, axes))
        )
    quality = {name: points for name, points in report.quality.items() if len(points) > 1}
    if quality:
        caption = "Mean score by the judge against the sampling temperature, with 95 % intervals."
        draw = functools.partial(plots.temperatures, quality)
        blocks.append(Plot(name="temperature.png", caption=caption, draw=draw))
    return [*blocks, *([_mean_scores(report)] if report.quality else [])]


def _mean_scores(report: Report) -> Block:
    """Return the mean score of every system at every temperature."""
    temperatures = sorted({t for points in report.quality.values() for t in points}, reverse=True)
    rows: list[list[Cell]] = []
    for name, points in report.quality.items():
        found = {t: Estimate(value=mean, ci95=(low, high), form=".3f") for t, (mean, low, high) in points.items()}
        rows.append([name, *(found.get(t, "–") for t in temperatures)])
    header = ["system", *(f"T = {t:g}" for t in temperatures)]
    return Folded(title="Mean scores by the first judge", blocks=[Table(header=header, rows=rows)])


def length(report: Report) -> list[Block]:
    """Return what length explains of Delta."""
    if not report.lengths:
        return []
    cells: list[list[Cell]] = [
        [
            row.candidate,
            f"{row.baseline} ({row.judge}, T = {row.temperature_candidate:g})",
            f"{row.difference:+.1f}",
            Estimate(value=row.summary.delta, ci95=row.summary.ci95),
            Estimate(value=row.summary.length.delta, ci95=row.summary.length.delta_ci95),
            Estimate(value=row.longer, ci95=row.longer_ci95),
            Estimate(value=row.summary.longer.percent, ci95=row.summary.longer.ci95, form=".0f"),
        ]
        for row in report.lengths
    ]
    header = ["system", "against", "tokens", "Delta", "Delta at equal lengths", "longer-wins Delta", "longer wins, %"]
    note = (
        "Tokens: how much longer than the other side's, on average. Delta at equal lengths: as it would be if both "
        "were equally long (logistic regression). Longer-wins Delta: what a judge would say that always prefers the "
        "longer response. Longer wins: how often this judge's winner is the longer response; far from 50 %, length "
        "may decide."
    )
    marks = [
        plots.LengthMark(
            name=f"{row.candidate} ({row.difference:+.1f} tokens)",
            delta=Bar("", row.summary.delta, *row.summary.ci95),
            controlled=Bar("", row.summary.length.delta, *row.summary.length.delta_ci95),
            longer=row.longer,
        )
        for row in report.lengths
        if (row.baseline, row.judge) == (BASELINE, report.lengths[0].judge)
        and row.temperature_candidate == report.lengths[0].temperature_candidate
    ]
    blocks: list[Block] = [Table(header=header, rows=cells, note=note)]
    if marks:
        caption = f"What length explains of Delta against Original, by judge {report.lengths[0].judge}."
        blocks.append(Plot(name="length.png", caption=caption, draw=functools.partial(plots.lengths, marks)))
    return blocks


_HEADER = ("candidate", "against", "T", "judge", "n", "win", "lose", "tie", "Delta", "length")


def _cells(row: Comparison) -> list[Cell]:
    temperatures = dict.fromkeys(f"{t:g}" for t in (row.temperature_candidate, row.temperature_baseline))
    return [
        row.candidate, row.baseline, " / ".join(temperatures), row.judge, row.n,
        *(f"{share:.1f}" for share in (row.win, row.lose, row.tie)), _delta(row),
        f"{row.length_candidate:.1f} / {row.length_baseline:.1f}",
    ]  # fmt: skip


def all_comparisons(report: Report) -> list[Block]:
    """Return every row of the report, folded up where there are many."""
    if not report.comparisons:
        return []
    note = "Two temperatures or lengths are the candidate's and the other side's."
    table = Table(header=_HEADER, rows=[_cells(row) for row in report.comparisons], note=note)
    if len(table.rows) <= _MOST_ROWS:
        return [table]
    return [Folded(title=f"{len(table.rows)} comparisons", blocks=[table])]


def policy_curve(report: Report) -> list[Block]:
    """Return Delta against Originals that were stopped earlier or later."""
    if not report.policy_curve:
        return []
    caption = "Delta against Originals stopped after different numbers of RLHF steps."
    if report.original_steps is not None:
        caption += f" The Original of this report was stopped after {report.original_steps}."
    rows: list[list[Cell]] = [[steps, *_cells(row)] for steps, group in report.policy_curve for row in group]
    return [
        Plot(
            name="policy_steps.png",
            caption=caption,
            draw=functools.partial(plots.against, report.policy_curve, "RLHF steps of the Original"),
        ),
        Table(header=("RLHF steps", *_HEADER), rows=rows),
    ]
