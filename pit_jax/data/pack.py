"""Where examples go in a batch of fixed shape: one a row, or several packed into it.

The scheme is exact and needs no memory: examples are taken in the order of the stream and each goes into the
first row with room for it; the first one that fits nowhere ends the batch and starts the next. So a batch
holds a contiguous stretch of the stream, and the stream's position is all there is to save. Without packing a row
holds one example, and the same rule gives every batch the same number of examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pit_jax.core.errors import DataError, invalid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows that hold several examples; where this is not given a row holds one.

    Attributes:
      rows: rows of a micro-batch.
      inputs: width of a row's half for prompts, at least that of one prompt.
      targets: width of its half for responses, at least that of one response.
      segments: most examples in a row.
    """

    rows: int
    inputs: int
    targets: int
    segments: int

    def __post_init__(self) -> None:
        """Check that all are positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise invalid(f"Packing.{field.name}", value, "be at least 1", "Raise it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of every batch of one kind.

    Attributes:
      micro_batches: A, the leading axis; None leaves the axis out.
      rows, inputs, targets: B, S and T of a micro-batch.
      segments: M, most examples in a row; 1 is not packed.
      records: most records in a micro-batch (a comparison takes several examples).
      pad_id: what fills the arrays.
    """

    micro_batches: int | None
    rows: int
    inputs: int
    targets: int
    segments: int
    records: int
    pad_id: int

    @property
    def capacity(self) -> int:
        """Most records of a batch; without packing always so many."""
        return self.records * (self.micro_batches or 1)


class Size(NamedTuple):
    """Tokens of one example's prompt and of its response."""

    inputs: int
    targets: int


class Place(NamedTuple):
    """Where one example is: in which row, with which segment number (from 1), and where its halves start."""

    micro_batch: int
    row: int
    segment: int
    inputs_at: int
    targets_at: int


class _Rows:
    """What is taken in the rows of one micro-batch."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._inputs = np.zeros(layout.rows, np.int64)
        self._targets = np.zeros(layout.rows, np.int64)
        self._segments = np.zeros(layout.rows, np.int64)
        self._records = 0

    def add(self, record: Sequence[Size], micro_batch: int) -> list[Place] | None:
        """Place all examples of a record, or none."""
        if self._records == self._layout.records:
            return None
        before = (self._inputs.copy(), self._targets.copy(), self._segments.copy())
        places: list[Place] = []
        for size in record:
            fits = (
                (self._inputs + size.inputs <= self._layout.inputs)
                & (self._targets + size.targets <= self._layout.targets)
                & (self._segments < self._layout.segments)
            )
            row = int(np.argmax(fits))
            if not fits[row]:
                self._inputs, self._targets, self._segments = before
                return None
            self._segments[row] += 1
            places.append(
                Place(micro_batch, row, int(self._segments[row]), int(self._inputs[row]), int(self._targets[row]))
            )
            self._inputs[row] += size.inputs
            self._targets[row] += size.targets
        self._records += 1
        return places


def plan(records: Iterable[Sequence[Size]], layout: Layout) -> list[list[Place]]:
    """Return the places of the leading records that fit into one batch, in order.

    All examples of a record are in one micro-batch. No record is asked for after the first that does not fit.

    Raises:
      DataError: an example is larger than a row, or the first record does not fit into an empty batch.
    """
    micro_batches = [_Rows(layout) for _ in range(layout.micro_batches or 1)]
    placed: list[list[Place]] = []
    for n, record in enumerate(records):
        _check_sizes(n, record, layout)
        found = (rows.add(record, a) for a, rows in enumerate(micro_batches))
        places = next((places for places in found if places is not None), None)
        if places is None and not placed:
            raise DataError(
                f"One record takes {len(record)} examples, which do not fit into {layout.rows} rows of "
                f"{layout.inputs} + {layout.targets} tokens. Raise Packing.rows."
            )
        if places is None:
            break
        placed.append(places)
    return placed


def _check_sizes(n: int, record: Sequence[Size], layout: Layout) -> None:
    for size in record:
        if size.targets == 0:
            raise DataError(f"Example {n} of the batch has no token to train on. Remove empty responses from the data.")
        if size.inputs > layout.inputs or size.targets > layout.targets:
            raise DataError(
                f"Example {n} of the batch has {size.inputs} + {size.targets} tokens, more than a row's "
                f"{layout.inputs} + {layout.targets}. The examples were made for other lengths: use the same Lengths, "
                "and remake a cache that was written with others."
            )
