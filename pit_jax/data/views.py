"""The views of a record: what each stage trains on, as token ids.

    view                                  example                      fold
    sft_policy                            {inputs, targets}            sft     x -> y_w
    sft_improver                          {inputs, reference, targets} sft     (x, y_l) -> y_w
    reward_bt, reward_gap                 {prompt, chosen, rejected}   rm      DPO reads reward_bt
    rl                                    {prompt, chosen, rejected}   rl
    evaluate                              {prompt, chosen, rejected}   all of a split
    lm                                    {inputs, targets}            all of a split; of documents

`inputs` is an assembled prompt, `reference` the half-open span [start, stop] of y_l in it (a model may embed its
tokens differently), and `targets` a response with its EOS. `prompt` holds the prompt's ids without
template (cut on the left), `chosen` and `rejected` those of the replies, each with its EOS: templates are applied
when a batch is made. Every value is a one-dimensional int32 array.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from pit_jax.core.errors import DataError, nearest
from pit_jax.data.folds import Fold
from pit_jax.data.schema import Document, Record
from pit_jax.text.codec import Codec, ResponseTooLong

Example = dict[str, Int[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True)
class Drop:
    """Why a record gives no example: empty_prompt, empty_*, too_long_* (chosen, rejected) or identical_replies."""

    reason: str


@dataclasses.dataclass
class DropReport:
    """How many examples were made, and how many records were dropped for which reason."""

    kept: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def summary(self) -> str:
        """Return one line such as "kept 95 of 100; dropped 5: too_long_chosen 3, identical_replies 2"."""
        lost = self.dropped.total()
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
        return f"kept {self.kept} of {self.kept + lost}" + (f"; dropped {lost}: {reasons}" if lost else "")


@dataclasses.dataclass(frozen=True)
class View:
    """One view: its features in order, the fold it reads, and the function of a record that makes an example."""

    features: tuple[str, ...]
    fold: Fold | None
    make: Callable[[Record, Codec], Example | Drop]


def _array(ids: Sequence[int]) -> Int[np.ndarray, " n"]:
    return np.asarray(ids, np.int32)


def _response(text: str, name: str, codec: Codec) -> tuple[int, ...] | Drop:
    try:
        ids = codec.response_ids(text)
    except ResponseTooLong:
        return Drop(f"too_long_{name}")
    return ids if len(ids) > 1 else Drop(f"empty_{name}")


def sft_policy(record: Record, codec: Codec) -> Example | Drop:
    """Return x -> y_w."""
    prompt = codec.prompt_ids(record.prompt)
    if not prompt:
        return Drop("empty_prompt")
    chosen = _response(record.chosen, "chosen", codec)
    if isinstance(chosen, Drop):
        return chosen
    return {"inputs": _array(codec.policy_prompt(prompt).ids), "targets": _array(chosen)}


def comparison(record: Record, codec: Codec) -> Example | Drop:
    """Return the ids of a prompt and its two replies, which must differ."""
    prompt = codec.prompt_ids(record.prompt)
    if not prompt:
        return Drop("empty_prompt")
    chosen = _response(record.chosen, "chosen", codec)
    if isinstance(chosen, Drop):
        return chosen
    rejected = _response(record.rejected, "rejected", codec)
    if isinstance(rejected, Drop):
        return rejected
    if chosen == rejected:
        return Drop("identical_replies")
    return {"prompt": _array(prompt), "chosen": _array(chosen), "rejected": _array(rejected)}


def sft_improver(record: Record, codec: Codec) -> Example | Drop:
    """Return (x, y_l) -> y_w."""
    ids = comparison(record, codec)
    if isinstance(ids, Drop):
        return ids
    row = codec.improver_prompt(ids["prompt"].tolist(), ids["rejected"].tolist())
    return {"inputs": _array(row.ids), "reference": _array(row.reference), "targets": ids["chosen"]}


_PAIR = ("prompt", "chosen", "rejected")
VIEWS: dict[str, View] = {
    "sft_policy": View(("inputs", "targets"), "sft", sft_policy),
    "sft_improver": View(("inputs", "reference", "targets"), "sft", sft_improver),
    "reward_bt": View(_PAIR, "rm", comparison),
    "reward_gap": View(_PAIR, "rm", comparison),
    "rl": View(_PAIR, "rl", comparison),
    "evaluate": View(_PAIR, None, comparison),
}
"""The views of preference records by name; `lm`, of documents, is `lm_examples`."""


def view(name: str) -> View:
    """Return a view of preference records by name.

    Raises:
      DataError: there is none of that name.
    """
    if name not in VIEWS:
        raise DataError(f"There is no view {name!r}.{nearest(name, VIEWS)} Use one of {', '.join(VIEWS)}.")
    return VIEWS[name]


def fold_for(name: str) -> Fold | None:
    """Return the fold of the train split that a view reads; None is all of it."""
    return None if name == "lm" else view(name).fold


def make_examples(name: str, records: Iterable[Record], codec: Codec, report: DropReport) -> Iterator[Example]:
    """Yield the examples of a view, in the order of the records, counting what is dropped in `report`."""
    make = view(name).make
    for record in records:
        made = make(record, codec)
        if isinstance(made, Drop):
            report.dropped[made.reason] += 1
        else:
            report.kept += 1
            yield made


def lm_examples(document: Document, codec: Codec) -> Iterator[Example]:
    """Yield a document in pieces of `lengths.targets` tokens, each with up to `lengths.inputs` tokens before it.

    Every token of the document and a final EOS is a target exactly once. The first piece follows the tokenizer's
    BOS, or EOS where there is none (the document before it has just ended). Use `Lengths.inputs` = 1 for ordinary
    language modelling, more for a prefix language model.
    """
    tokenizer = codec.tokenizer
    start = tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id
    ids = _array([start, *tokenizer.encode(document.text), tokenizer.eos_ids[0]])
    for at in range(1, len(ids), codec.lengths.targets):
        yield {
            "inputs": ids[max(0, at - codec.lengths.inputs) : at],
            "targets": ids[at : at + codec.lengths.targets],
        }
