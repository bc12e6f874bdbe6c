"""Batches of comparisons in which the passes of a record share what their prompts have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pit_jax.core.errors import DataError
from pit_jax.core.types import Comparisons, Conditional, Rest
from pit_jax.data.collate import ComparisonCollator, ComparisonView, Pass, comparison_passes
from pit_jax.data.pack import Layout, Size, plan
from pit_jax.data.views import Example
from pit_jax.text.codec import Codec

_ROWS: dict[ComparisonView, tuple[int, ...]] = {"reward_bt": (0, 1), "reward_gap": (0, 2, 1, 3)}
"""The passes of a record in the order of their rows: those with the same prompt are neighbours."""


@dataclasses.dataclass(frozen=True)
class SharedComparisonCollator:
    """Batches of {prompt, chosen, rejected} examples, one record after the other, whose prompts are there once.

    Bradley-Terry: x with the two responses. Gap: what comes before the reference is the beginning of both prompts, and
    each of those has two responses, (x, y_l) those of wl and ll, (x, y_w) those of ww and lw.
    """

    codec: Codec
    layout: Layout
    view: ComparisonView

    def leading(self, examples: Sequence[Example]) -> tuple[Comparisons, int]:
        """Return the batch of as many leading examples as fit, and their number."""
        layout, rows = self.layout, _ROWS[self.view]
        records = [comparison_passes(example, self.codec, self.view) for example in examples[: layout.capacity]]
        used = len(plan([[Size(len(p.prompt.ids), len(p.response)) for p in record] for record in records], layout))
        if not used:
            raise DataError(
                "A batch has no example, so there is no token to train on. See the counts of dropped records."
            )
        batches = layout.micro_batches or 1
        shape = (batches, len(rows), layout.records)
        places = np.argsort(rows)[:, None] + len(rows) * np.arange(layout.records)[None, :]
        index, length = np.broadcast_to(places.astype(np.int32), shape).copy(), np.zeros(shape, np.int32)
        weight = np.zeros((batches, layout.records), np.float32)
        for number, record in enumerate(records[:used]):
            a, b = divmod(number, layout.records)
            weight[a, b] = 1.0
            length[a, :, b] = [len(part.response) for part in record]
        inputs = self._inputs(records[:used])
        if layout.micro_batches is None:
            index, length, weight = index[0], length[0], weight[0]
        return Comparisons(inputs=inputs, index=index, weight=weight, length=length), used  # pyright: ignore[reportArgumentType]

    def _inputs(self, records: Sequence[Sequence[Pass]]) -> Conditional:
        rows, pad = _ROWS[self.view], self.layout.pad_id
        wide, prompts = (self.codec.width("policy"), 0), 0
        if self.view == "reward_gap":
            # A template may begin with the reference: then nothing but the references' prompts are shared.
            before = max(self.codec.beginning_width("gap"), 1)
            wide, prompts = (before, self.codec.width("gap") - self.codec.beginning_width("gap")), 2
        lead = (self.layout.micro_batches or 1, self.layout.records)
        prompt, rest = _Table(lead, 1, wide[0], pad), _Table(lead, prompts, wide[1], pad)
        response = _Table(lead, len(rows), self.codec.lengths.targets, pad)
        for number, record in enumerate(records):
            first = record[0].prompt
            before = first.reference[0] if prompts else len(first.ids)
            prompt.put(number, 0, first.ids[:before])
            for row, one in enumerate(rows):
                response.put(number, row, record[one].response)
            for row in range(prompts):
                one = record[rows[2 * row]].prompt
                start, stop = one.reference
                rest.put(number, row, one.ids[before:], slice(start - before, stop - before))
        flat = self.layout.micro_batches is None
        (tokens, segments, reference), answers, ends = (table.arrays(flat) for table in (prompt, response, rest))
        return Conditional(
            prompt=tokens,
            prompt_segments=segments,
            prompt_reference=reference,
            response=answers[0],
            response_segments=answers[1],
            rest=Rest(tokens=ends[0], segments=ends[1], reference=ends[2]) if prompts else None,
        )


class _Table:
    """Rows of tokens of every record, `each` successive ones."""

    def __init__(self, lead: tuple[int, int], each: int, width: int, pad: int):
        self._records, self._each, shape = lead[1], each, (lead[0], lead[1] * each, width)
        self._tokens, self._segments = np.full(shape, pad, np.int32), np.zeros(shape, np.int32)
        self._reference = np.zeros(shape, bool)

    def put(self, record: int, row: int, ids: tuple[int, ...], reference: slice = slice(0, 0)) -> None:
        a, b = divmod(record, self._records)
        place = (a, b * self._each + row)
        self._tokens[place][: len(ids)], self._segments[place][: len(ids)] = ids, 1
        self._reference[place][reference] = True

    def arrays(self, flat: bool) -> tuple[Any, Any, Any]:
        """Return tokens, segments and marks, without the axis of micro-batches if there is none."""
        tables = (self._tokens, self._segments, self._reference)
        return tables if not flat else (tables[0][0], tables[1][0], tables[2][0])


def with_shared_prompts(collator: ComparisonCollator, parts: int) -> ComparisonCollator | SharedComparisonCollator:
    """Return the collator that shares prompts, or the plain one where rows are packed or cannot be cut evenly.

    Args:
      collator: makes the plain batches.
      parts: devices that the rows of a batch are cut over: each must have whole records.
    """
    layout = collator.layout
    packed = layout.segments > 1 or layout.rows != layout.records * len(_ROWS[collator.view])
    if packed or layout.records % parts:
        return collator
    return SharedComparisonCollator(collator.codec, layout, collator.view)
