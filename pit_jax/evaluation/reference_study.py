"""How the gap model behaves on references that models wrote, against the dataset's, which it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from pit_jax.core.errors import invalid
from pit_jax.evaluation import drawing, estimates
from pit_jax.evaluation.document import Cell, Plot, Table
from pit_jax.evaluation.estimates import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Candidates and their references as the gap model and the judge see them; one entry for each pair.

    gap: r_gap(y, y_ref | x) - r_gap(y_ref, y_ref | x). truth: the judge's score of y minus that of y_ref.
    length: tokens of y minus those of y_ref. same: whether both are the same response. groups: of prompts.
    """

    gap: Float[np.ndarray, " n"]
    truth: Float[np.ndarray, " n"]
    length: Float[np.ndarray, " n"]
    same: Bool[np.ndarray, " n"]
    groups: Sequence[str]

    def __post_init__(self) -> None:
        """Check that there is one entry for each pair."""
        counts = {len(values) for values in vars(self).values()}
        if len(counts) > 1 or counts == {0}:
            raise invalid("Judged", sorted(counts), "have one entry for each of at least 1 pair", "Mend the lists.")

    def and_also(self, other: Judged) -> Judged:
        """Return the pairs of both."""
        return Judged(
            gap=np.concatenate([self.gap, other.gap]),
            truth=np.concatenate([self.truth, other.truth]),
            length=np.concatenate([self.length, other.length]),
            same=np.concatenate([self.same, other.same]),
            groups=[*self.groups, *other.groups],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapBehaviour:
    """What the gap says of candidates, and how far the judge agrees.

    step: of improvement, None for the dataset's replies. changed: share of candidates unlike their reference.
    gap: its mean above its own zero, the reward of RL without the KL term; deviation: its standard deviation.
    truth: mean of the judge's difference. pearson, spearman: of both. right: share of the pairs the judge finds
    different in which the gap has the right sign, a tie counted half. length: correlation of gap and length.
    """

    name: str
    step: int | None
    n: int
    changed: Figure
    gap: Figure
    deviation: float
    truth: Figure
    pearson: Figure
    spearman: Figure
    right: Figure
    length: Figure


def behaviour(name: str, step: int | None, pairs: Judged, *, seed: int, margin: float = 1e-9) -> GapBehaviour:
    """Return the figures of one kind of pairs; intervals are bootstrapped over prompt groups.

    Args:
      name: of the kind.
      step: of improvement, if the pairs are of one.
      pairs: at least one.
      seed: of the bootstrap.
      margin: differences of the judge up to this size are none.
    """
    differ = np.abs(pairs.truth) > margin
    kept = [group for group, there in zip(pairs.groups, differ, strict=True) if there]
    agreement = (pairs.gap * np.sign(pairs.truth))[differ]
    mean = functools.partial(estimates.mean, groups=pairs.groups, seed=seed)
    return GapBehaviour(
        name=name,
        step=step,
        n=len(pairs.gap),
        changed=mean((~pairs.same).astype(np.float64), bounds=(0.0, 1.0)),
        gap=mean(pairs.gap),
        deviation=float(pairs.gap.std()),
        truth=mean(pairs.truth),
        pearson=estimates.pearson(pairs.gap, pairs.truth, pairs.groups, seed=seed),
        spearman=estimates.spearman(pairs.gap, pairs.truth, pairs.groups, seed=seed),
        right=estimates.share(agreement, kept, seed=seed),
        length=estimates.pearson(pairs.gap, pairs.length, pairs.groups, seed=seed),
    )


def table(rows: Sequence[GapBehaviour]) -> Table:
    """Return the figures of all kinds of pairs."""
    cells: list[list[Cell]] = [
        [
            row.name, row.changed.cell(".2f"), row.gap.cell("+.2f"), float(row.deviation), row.truth.cell("+.3f"),
            row.pearson.cell("+.2f"), row.spearman.cell("+.2f"), row.right.cell(".3f"), row.right.n,
            row.length.cell("+.2f"),
        ]
        for row in rows
    ]  # fmt: skip
    return Table(
        title="The gap above its own zero, and what the judge says of the same pairs",
        header=[
            "candidate, reference", "changed", "mean gap", "its deviation", "judge's difference", "Pearson", "Spearman",
            "sign right", "of pairs that differ", "correlation with length",
        ],
        rows=cells,
        note="gap = r_gap(y, y_ref) - r_gap(y_ref, y_ref). `sign right` is over pairs whose judge's difference is not "
        "0; a gap of exactly 0 counts half.",
    )  # fmt: skip


def pictures(rows: Sequence[GapBehaviour], pairs: Mapping[str, Judged]) -> list[Plot]:
    """Return the plots of means and agreement against the step, and of the histograms."""
    return [
        Plot(
            name="agreement.png",
            caption="How far the gap agrees with the judge, by improvement step; dotted: on the dataset's own replies, "
            "in both directions.",
            draw=functools.partial(draw_agreement, rows),
        ),
        Plot(
            name="means.png",
            caption="Mean gap above its own zero, and the judge's mean difference, by improvement step.",
            draw=functools.partial(draw_means, rows),
        ),
        Plot(
            name="histograms.png",
            caption="Gaps above their own zero, of candidates that differ from their reference.",
            draw=functools.partial(draw_histograms, pairs),
        ),
    ]


def draw_agreement(rows: Sequence[GapBehaviour], path: epath.Path) -> None:
    """Draw sign accuracy and correlations against the step; dotted: of the dataset's pairs."""
    measures = {
        "sign right": [row.right for row in rows],
        "Pearson": [row.pearson for row in rows],
        "Spearman": [row.spearman for row in rows],
    }
    # The last row that is no step holds both directions: one direction alone has hardly any spread to correlate with.
    base = max((place for place, row in enumerate(rows) if row.step is None), default=None)
    levels = {} if base is None else {name: figures[base] for name, figures in measures.items()}
    drawing.lines({"agreement with the judge": _by_step(rows, measures)}, levels, "improvement step", path)


def draw_means(rows: Sequence[GapBehaviour], path: epath.Path) -> None:
    """Draw the mean gap and the judge's mean difference against the step, each in a panel of its own scale."""
    measures = {"mean gap": [row.gap for row in rows], "judge's mean difference": [row.truth for row in rows]}
    drawn = {label: {"": points} for label, points in _by_step(rows, measures).items()}
    drawing.lines(drawn, {}, "improvement step", path)


def draw_histograms(pairs: Mapping[str, Judged], path: epath.Path) -> None:
    """Draw the histogram of the gaps of every kind of pairs, in one picture; unchanged answers have no gap."""
    drawn = {"": {name: found.gap[~found.same] for name, found in pairs.items()}}
    drawing.histograms(drawn, "gap above its own zero", "pairs", path)


def _by_step(
    rows: Sequence[GapBehaviour], measures: Mapping[str, Sequence[Figure]]
) -> dict[str, list[tuple[float, Figure]]]:
    """Return (step, figure) of every measure, for the rows that are steps of improvement."""
    steps = [(place, row.step) for place, row in enumerate(rows) if row.step is not None]
    return {name: [(step, figures[place]) for place, step in steps] for name, figures in measures.items()}
