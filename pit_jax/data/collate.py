"""From examples to batches: templates are applied, rows filled, segments numbered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.types import Comparisons, Conditional
from pit_jax.data.pack import Layout, Packing, Place, Size, plan
from pit_jax.data.source import Source
from pit_jax.data.views import Example
from pit_jax.text.codec import Codec, PromptRow
from pit_jax.text.template import PromptKind

ComparisonView = Literal["reward_bt", "reward_gap"]
TrainingView = Literal["sft_policy", "sft_improver", "lm", "reward_bt", "reward_gap"]
_PROMPT_OF: dict[str, PromptKind] = {
    "sft_policy": "policy",
    "sft_improver": "improver",
    "lm": "policy",
    "reward_bt": "policy",
    "reward_gap": "gap",
}
_PASSES = {"sft_policy": 1, "sft_improver": 1, "lm": 1, "reward_bt": 2, "reward_gap": 4}

Batch = TypeVar("Batch", covariant=True)


class Pass(NamedTuple):
    """One prompt with one response: what goes through a model together."""

    prompt: PromptRow
    response: tuple[int, ...]


def sft_pass(example: Example) -> Pass:
    """Return the one pass of an {inputs, targets} or {inputs, reference, targets} example."""
    start, stop = example["reference"].tolist() if "reference" in example else (0, 0)
    return Pass(PromptRow(tuple(example["inputs"].tolist()), (start, stop)), tuple(example["targets"].tolist()))


def comparison_passes(example: Example, codec: Codec, view: ComparisonView) -> tuple[Pass, ...]:
    """Return the passes of a {prompt, chosen, rejected} example.

    Bradley-Terry: (chosen, rejected). Gap: (wl, ww, ll, lw), where wl reads the candidate y_w against the
    reference y_l.
    """
    prompt = example["prompt"].tolist()
    chosen, rejected = tuple(example["chosen"].tolist()), tuple(example["rejected"].tolist())
    if view == "reward_bt":
        row = codec.policy_prompt(prompt)
        return Pass(row, chosen), Pass(row, rejected)
    against_chosen, against_rejected = codec.gap_prompt(prompt, chosen), codec.gap_prompt(prompt, rejected)
    return (
        Pass(against_rejected, chosen),
        Pass(against_chosen, chosen),
        Pass(against_rejected, rejected),
        Pass(against_chosen, rejected),
    )


def layout_for(
    view: TrainingView, codec: Codec, *, batch_size: int, micro_batches: int | None, packing: Packing | None
) -> Layout:
    """Return the shape of a view's batches.

    Args:
      view: what the batches are made of.
      codec: gives the widths.
      batch_size: records of a whole batch; with packing the most there may be.
      micro_batches: number of parts a batch is cut into (leading axis), None for no such axis.
      packing: rows to pack into, or None for one example a row.
    Raises:
      ConfigError: the batch size does not divide, or a packed row is narrower than one example.
    """
    parts = 1 if micro_batches is None else micro_batches
    if parts < 1:
        raise invalid("micro_batches", micro_batches, "be at least 1", "1 does not cut the batch.")
    if batch_size < 1 or batch_size % parts:
        rule = f"be a positive multiple of the {parts} micro-batches"
        raise invalid("batch_size", batch_size, rule, "Change either of them.")
    inputs, targets = codec.width(_PROMPT_OF[view]), codec.lengths.targets
    records = batch_size // parts
    if packing is None:
        packing = Packing(rows=records * _PASSES[view], inputs=inputs, targets=targets, segments=1)
    for field, value, least in (("inputs", packing.inputs, inputs), ("targets", packing.targets, targets)):
        if value < least:
            rule = f"be at least {least}, the width of one example of {view}"
            raise invalid(f"Packing.{field}", value, rule, f"Raise it, or lower Lengths.{field}.")
    if packing.rows * packing.segments < _PASSES[view]:
        rule = f"have room for the {_PASSES[view]} passes of one record of {view}"
        raise invalid("Packing.rows", packing.rows, rule, "Raise it.")
    return Layout(micro_batches=micro_batches, records=records, pad_id=codec.pad_id, **dataclasses.asdict(packing))


class Collator(Protocol[Batch]):
    """Makes batches of one kind and shape."""

    @property
    def layout(self) -> Layout:
        """Shape of the batches."""
        ...

    def leading(self, examples: Sequence[Example]) -> tuple[Batch, int]:
        """Return the batch of as many leading examples as fit, and their number."""
        ...


@dataclasses.dataclass(frozen=True)
class SftCollator:
    """Batches of {inputs, targets} examples."""

    layout: Layout

    def leading(self, examples: Sequence[Example]) -> tuple[Conditional, int]:
        """Return the batch of as many leading examples as fit, and their number."""
        records, places = _placed(((sft_pass(example),) for example in examples), self.layout)
        return _conditional(records, places, self.layout), len(places)


@dataclasses.dataclass(frozen=True)
class ComparisonCollator:
    """Batches of {prompt, chosen, rejected} examples for a reward model."""

    codec: Codec
    layout: Layout
    view: ComparisonView

    def leading(self, examples: Sequence[Example]) -> tuple[Comparisons, int]:
        """Return the batch of as many leading examples as fit, and their number."""
        layout = self.layout
        made = (comparison_passes(example, self.codec, self.view) for example in examples)
        records, places = _placed(made, layout)
        shape = (layout.micro_batches or 1, _PASSES[self.view], layout.records)
        index, length = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weight = np.zeros((shape[0], shape[2]), np.float32)
        used = [0] * shape[0]
        for record, where in zip(records, places, strict=False):
            a = where[0].micro_batch
            b = used[a]
            used[a] += 1
            weight[a, b] = 1.0
            index[a, :, b] = [place.row * layout.segments + place.segment - 1 for place in where]
            length[a, :, b] = [len(part.response) for part in record]
        inputs = _conditional(records, places, layout)
        if layout.micro_batches is None:
            index, weight, length = index[0], weight[0], length[0]
        return Comparisons(inputs=inputs, index=index, weight=weight, length=length), len(places)  # pyright: ignore[reportArgumentType]


def collator_for(
    view: TrainingView, codec: Codec, *, batch_size: int, micro_batches: int | None, packing: Packing | None
) -> SftCollator | ComparisonCollator:
    """Return what makes the batches of a view; arguments and errors as of `layout_for`."""
    layout = layout_for(view, codec, batch_size=batch_size, micro_batches=micro_batches, packing=packing)
    if view == "reward_bt" or view == "reward_gap":
        return ComparisonCollator(codec, layout, view)
    return SftCollator(layout)


def take_batch(source: Source, collator: Collator[Batch]) -> Batch:
    """Return the next batch of a stream, and leave the stream's position behind its last example."""
    examples = source.take(collator.layout.capacity)
    batch, used = collator.leading(examples)
    source.give_back(len(examples) - used)
    return batch


def all_batches(examples: Sequence[Example], collator: Collator[Batch]) -> Iterator[Batch]:
    """Yield batches that hold every example once, in order; the last is filled up with rows of weight zero."""
    start = 0
    while start < len(examples):
        batch, used = collator.leading(examples[start : start + collator.layout.capacity])
        start += used
        yield batch


def sft(examples: Sequence[Example], layout: Layout) -> Conditional:
    """Return the batch of {inputs, targets} examples.

    Raises:
      DataError: there are none, they do not fit, or one has no token to train on.
    """
    return _whole(examples, SftCollator(layout))


def comparisons(examples: Sequence[Example], codec: Codec, layout: Layout, view: ComparisonView) -> Comparisons:
    """Return the batch of {prompt, chosen, rejected} examples for a reward model; errors as of `sft`."""
    return _whole(examples, ComparisonCollator(codec, layout, view))


def _whole(examples: Sequence[Example], collator: Collator[Batch]) -> Batch:
    batch, used = collator.leading(examples)
    if used < len(examples):
        raise DataError(f"Only {used} of {len(examples)} examples fit into the batch. Raise the layout's rows.")
    return batch


def _placed(records: Iterable[tuple[Pass, ...]], layout: Layout) -> tuple[list[tuple[Pass, ...]], list[list[Place]]]:
    """Return the leading records that fit into a batch, with their places; what follows them is not made."""
    made: list[tuple[Pass, ...]] = []

    def sizes() -> Iterator[list[Size]]:
        for record in records:
            made.append(record)
            yield _sizes(record)

    places = plan(sizes(), layout)
    return made[: len(places)], places


def _sizes(record: Sequence[Pass]) -> list[Size]:
    return [Size(len(part.prompt.ids), len(part.response)) for part in record]


def _conditional(records: Sequence[Sequence[Pass]], places: Sequence[Sequence[Place]], layout: Layout) -> Conditional:
    if not places:
        raise DataError("A batch has no example, so there is no token to train on. See the counts of dropped records.")
    lead = (layout.micro_batches or 1, layout.rows)
    prompt = np.full((*lead, layout.inputs), layout.pad_id, np.int32)
    response = np.full((*lead, layout.targets), layout.pad_id, np.int32)
    prompt_segments, response_segments = np.zeros_like(prompt), np.zeros_like(response)
    reference = np.zeros(prompt.shape, bool)
    for record, where in zip(records, places, strict=False):
        for part, place in zip(record, where, strict=True):
            row = (place.micro_batch, place.row)
            inputs = (*row, slice(place.inputs_at, place.inputs_at + len(part.prompt.ids)))
            targets = (*row, slice(place.targets_at, place.targets_at + len(part.response)))
            prompt[inputs], prompt_segments[inputs] = part.prompt.ids, place.segment
            response[targets], response_segments[targets] = part.response, place.segment
            start, stop = part.prompt.reference
            reference[(*row, slice(place.inputs_at + start, place.inputs_at + stop))] = True
    arrays = {
        "prompt": prompt,
        "prompt_segments": prompt_segments,
        "prompt_reference": reference,
        "response": response,
        "response_segments": response_segments,
    }
    if layout.micro_batches is None:
        arrays = {name: array[0] for name, array in arrays.items()}
    return Conditional(**arrays)  # pyright: ignore[reportArgumentType]
