"""Gap reward models side by side on held-out records: which of the five comparisons hold, and where zero lies.

The four gaps of a record are wl, ww, ll, lw = r_gap(candidate, reference | x) with w the better and l the worse reply.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.evaluation import drawing, estimates
from pit_jax.evaluation.document import Cell, Plot, Table
from pit_jax.evaluation.estimates import Figure
from pit_jax.evaluation.rewards import COMPARISONS

PASSES = ("wl", "ww", "ll", "lw")
"""Candidate, then reference."""
NAMES = tuple(f"{a} > {b}" for a, b in COMPARISONS)
Gaps = Mapping[str, Float[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """What is known of each held-out record besides the gaps.

    groups: of prompts, by which intervals are clustered. length: tokens of y_w minus those of y_l.
    quality: the exact judge's score of y_w minus that of y_l, None without such a judge.
    """

    groups: Sequence[str]
    length: Float[np.ndarray, " n"]
    quality: Float[np.ndarray, " n"] | None

    def __post_init__(self) -> None:
        """Check that there is one entry for each record."""
        counts = {len(self.groups), len(self.length), *([] if self.quality is None else [len(self.quality)])}
        if len(counts) > 1 or counts == {0}:
            raise invalid("Labelled", sorted(counts), "have one entry for each of at least 1 record", "Mend the lists.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapQuality:
    """What one gap model is worth on held-out records.

    holds: comparison -> share of records in which it holds, a tie counted half. all_hold: all five, without ties.
    zero: mean of ww and ll; drift: mean of ww - ll; spread: standard deviation of ww and ll over records. All three
      in units of the mean gap (wl - lw) / 2: a zero that wanders by 1 is as loud as the signal.
    at_own_zero: share of the 2 n decisions "is the candidate better?" that are right by gap > gap(reference,
      reference), the accept rule; at_0: by gap > 0, without calibration.
    quality, length: correlation of the calibrated gap (wl - ll, and lw - ww with the opposite difference) with the
      difference of quality (None without a judge) and of length.
    """

    name: str
    n: int
    holds: Mapping[str, Figure]
    all_hold: Figure
    zero: Figure
    drift: Figure
    spread: float
    at_own_zero: Figure
    at_0: Figure
    quality: Figure | None
    length: Figure


def from_rewards(chosen: Float[np.ndarray, " n"], rejected: Float[np.ndarray, " n"]) -> Gaps:
    """Return the gaps of R_P(x, y1) - R_P(x, y2), the gap model that needs no training of its own."""
    nothing = np.zeros_like(chosen)
    return {"wl": chosen - rejected, "ww": nothing, "ll": nothing, "lw": rejected - chosen}


def gap_quality(name: str, gaps: Gaps, known: Labelled, *, seed: int) -> GapQuality:
    """Return the figures of one model; intervals are bootstrapped over prompt groups.

    Raises:
      ConfigError: the gaps are not those four, one for each record.
    """
    sizes = {pass_name: len(values) for pass_name, values in gaps.items()}
    if sizes != dict.fromkeys(PASSES, len(known.groups)):
        rule = f"have {len(known.groups)} values of each of {PASSES}"
        raise invalid("gaps", sizes, rule, "Score every record four times.")
    wl, ww, ll, lw = (np.asarray(gaps[pass_name], np.float64) for pass_name in PASSES)
    share = functools.partial(estimates.share, seed=seed)
    margins = {text: gaps[a] - gaps[b] for text, (a, b) in zip(NAMES, COMPARISONS, strict=True)}
    both = [*known.groups, *known.groups]
    signal = float(np.mean(wl - lw)) / 2
    unit = abs(signal) if signal else 1.0
    calibrated = np.concatenate([wl - ll, lw - ww])
    correlate = functools.partial(estimates.pearson, calibrated, groups=both, seed=seed)
    every = np.all([margin > 0 for margin in margins.values()], axis=0).astype(np.float64)
    return GapQuality(
        name=name,
        n=len(wl),
        holds={text: share(margin, known.groups) for text, margin in margins.items()},
        all_hold=estimates.mean(every, known.groups, seed=seed, bounds=(0.0, 1.0)),
        zero=estimates.mean((ww + ll) / (2 * unit), known.groups, seed=seed),
        drift=estimates.mean((ww - ll) / unit, known.groups, seed=seed),
        spread=float(np.concatenate([ww, ll]).std()) / unit,
        at_own_zero=share(np.concatenate([wl - ll, ww - lw]), both),
        at_0=share(np.concatenate([wl, -lw]), both),
        quality=None if known.quality is None else correlate(np.concatenate([known.quality, -known.quality])),
        length=correlate(np.concatenate([known.length, -known.length])),
    )


def tables(rows: Sequence[GapQuality]) -> list[Table]:
    """Return the shares of the five comparisons, and what is known of zero and of correlations."""
    shares: list[list[Cell]] = [
        [row.name, *(figure.cell(".3f") for figure in row.holds.values()), row.all_hold.cell(".3f"), row.n]
        for row in rows
    ]
    others: list[list[Cell]] = [
        [
            row.name,
            row.at_own_zero.cell(".3f"),
            row.at_0.cell(".3f"),
            row.zero.cell("+.2f"),
            row.drift.cell("+.2f"),
            float(row.spread),
            "" if row.quality is None else row.quality.cell("+.2f"),
            row.length.cell("+.2f"),
        ]
        for row in rows
    ]
    return [
        Table(
            title="Share of held-out records in which a comparison holds",
            header=["gap model", *NAMES, "all five", "n"],
            rows=shares,
            note="`wl` = gap(better, worse), candidate first. A tie counts half, in `all five` as a failure.",
        ),
        Table(
            title="Where zero lies, and what the gap follows",
            header=[
                "gap model", "right at its own zero", "right at 0", "zero", "drift ww - ll", "spread of zero",
                "correlation with quality", "with length",
            ],
            rows=others,
            note="`right`: share of pairs, each in both directions, in which the candidate is taken exactly if its "
            "label says it is the better one: by gap > gap(reference, reference), as the accept rule does, and by "
            "gap > 0. Zero, drift and spread are of gap(y, y), in units of the mean gap (wl - lw) / 2. Correlations "
            "are of the gap above its own zero, over both directions.",
        ),
    ]  # fmt: skip


def pictures(rows: Sequence[GapQuality], gaps: Mapping[str, Gaps]) -> list[Plot]:
    """Return the plots of the five comparisons, and of the four histograms of the models that `gaps` names."""
    return [
        Plot(
            name="comparisons.png",
            caption="Share of held-out records in which each comparison holds, with 95 % intervals.",
            draw=functools.partial(draw_comparisons, rows),
        ),
        Plot(
            name="gaps.png",
            caption="The four gaps of each model on held-out records.",
            draw=functools.partial(draw_gaps, gaps),
        ),
    ]


def draw_comparisons(rows: Sequence[GapQuality], path: epath.Path) -> None:
    """Draw the shares as dots with intervals: a band for each comparison, a colour for each model."""
    series = {row.name: [*row.holds.values(), row.at_own_zero] for row in rows}
    drawing.dots(series, [*NAMES, "right at own zero"], "share of held-out records", path)


def draw_gaps(gaps: Mapping[str, Gaps], path: epath.Path) -> None:
    """Draw the histograms of the four gaps, a panel for each model."""
    drawing.histograms(gaps, "gap", "records", path)
