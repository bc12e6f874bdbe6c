"""What the report of an evaluation says of its judges."""

from __future__ import annotations

from pit_jax.evaluation import document
from pit_jax.evaluation.document import Block, Bullets, Cell, Estimate, Table
from pit_jax.evaluation.report import Report


def judges(report: Report) -> list[Block]:
    """Return the judges' facts, and how far they agree."""
    blocks: list[Block] = []
    if report.judges:
        header = ["judge", "kind", "questions", "no verdict", "requests", "from disk", "tokens read / written", "cost"]
        cells: list[list[Cell]] = [
            [
                judge.name,
                judge.kind,
                *(document.count(count) for count in (judge.questions, judge.unanswered, judge.requests, judge.known)),
                "–" if judge.tokens is None else f"{judge.tokens[0]:,} / {judge.tokens[1]:,}",
                "–" if judge.cost is None else f"{judge.cost:.2f}",
            ]
            for judge in report.judges
        ]
        blocks.append(Table(header=header, rows=cells))
        said = [sentence for judge in report.judges for sentence in judge.sentences()]
        if said:
            blocks.append(Bullets(items=said))
    return [*blocks, *_agreement(report)]


def _agreement(report: Report) -> list[Block]:
    """Return how far the judges agree: a matrix of kappa, the pairs with intervals, and all together."""
    found = report.agreement
    if found is None:
        return []
    names = list(dict.fromkeys(name for pair in found.pairs for name in (pair.first, pair.second)))
    kappa = {(pair.first, pair.second): pair.kappa.value for pair in found.pairs}
    matrix = [
        [row, *("1" if row == column else _two(kappa.get((row, column), kappa.get((column, row)))) for column in names)]
        for row in names
    ]
    pairs: list[list[Cell]] = [
        [
            f"{pair.first}, {pair.second}",
            Estimate(value=100 * pair.raw.value, ci95=_scaled(pair.raw.ci95, 100), form=".1f"),
            Estimate(value=pair.kappa.value, ci95=pair.kappa.ci95, form=".2f"),
            pair.raw.items,
        ]
        for pair in found.pairs
    ]
    whole = ", ".join(
        f"{measure.name} {Estimate(value=measure.value, ci95=measure.ci95, form='.2f').text} ({measure.items} items)"
        for measure in (found.raw, found.alpha, found.fleiss)
    )
    blocks: list[Block] = []
    if len(names) > 2:
        blocks.append(Table(title="Agreement of judges: Cohen's kappa", header=["", *names], rows=matrix))
    note = f"All together: {whole}. Kappa is 1 for full agreement and 0 for what chance alone would give."
    title, header = "Agreement of pairs of judges", ["judges", "same verdict, %", "Cohen's kappa", "questions"]
    return [*blocks, Table(title=title, header=header, rows=pairs, note=note)]


def _two(value: float | None) -> str:
    return "–" if value is None else document.number(value, ".2f")


def _scaled(ends: tuple[float, float], factor: float) -> tuple[float, float]:
    return factor * ends[0], factor * ends[1]
