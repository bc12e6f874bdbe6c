"""Preference data as ordinary SeqIO preprocessors (dataset in, dataset out), to be used one by one or together.

    parse_preferences    raw records of any of the four shapes -> {id, group, prompt, chosen, rejected} (text)
    assign_fold          deals the groups out: keeps the records of the split, adds `fold`
    select_fold          keeps one fold of the train split
    tokenize_view        records -> the token ids of one view; drops what makes no example

They call the functions that are used where there is no TensorFlow (`schema.parse`, `Folds`, `views`), so that both
ways give the same examples in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pit_jax.core.errors import DataError, invalid
from pit_jax.data import views
from pit_jax.data.folds import Fold, Folds
from pit_jax.data.readers import ReadConfig
from pit_jax.data.schema import Record, parse
from pit_jax.data.seqio_runtime import marked, tf
from pit_jax.data.seqio_vocabulary import check_padding
from pit_jax.text.codec import Codec, Lengths

RECORD_FIELDS = ("id", "group", "prompt", "chosen", "rejected")
SPLIT = "split"
FOLD = "fold"
JSON = "json"

Convert = Callable[[dict[str, Any]], Mapping[str, Any]]

_log = logging.getLogger(__name__)


def parse_preferences(
    dataset: tf.data.Dataset,
    *,
    read: ReadConfig,
    convert: Convert | None = None,
) -> tf.data.Dataset:
    """Bring records of any of the four shapes to {id, group, prompt, chosen, rejected}.

    An element is a JSON object as text, `{"json": text}`, or a structure of tensors with the fields of a shape;
    messages are `{"role": [n], "content": [n]}`, as TFDS gives them. A field `split` is kept, others are left out.

    Args:
      dataset: the raw records.
      read: how dialogues are written, and whether a record that cannot be used stops the reading or is left out,
        with a line in the log.
      convert: turns a raw record with other fields into one of the four shapes.
    """
    bad = _Counts("records that cannot be read")

    def parse_one(flat: list[Any]) -> list[Any]:
        raw = _plain(tf.nest.pack_sequence_as(dataset.element_spec, flat))
        try:
            raw = _as_object(raw)
            record = dataclasses.asdict(parse(convert(raw) if convert else raw, read.chat))
        except DataError as error:
            if read.on_bad_record == "fail":
                raise
            bad.add(str(error))
            return [np.asarray([b""] * len(RECORD_FIELDS), object), False]
        return [np.asarray([record[name].encode() for name in RECORD_FIELDS], object), True]

    def map_one(element: Any) -> dict[str, tf.Tensor]:
        texts, good = _call(parse_one, tf.nest.flatten(element), [tf.string, tf.bool])
        record = dict(zip(RECORD_FIELDS, tf.unstack(tf.ensure_shape(texts, [5])), strict=True)) | {"_good": good}
        return record | {SPLIT: element[SPLIT]} if isinstance(element, dict) and SPLIT in element else record

    return _drop_bad(dataset.map(map_one))


def assign_fold(dataset: tf.data.Dataset, *, folds: Folds, cut_validation: bool) -> tf.data.Dataset:
    """Add `fold` (sft, rm or rl in train, else empty) by the hash of `group`, and keep the records of their split.

    Args:
      dataset: records, each with the `split` that is being read.
      folds: how groups are dealt out.
      cut_validation: whether `train` and `validation` are read from the same records, of which each keeps its own.
    """

    def assign(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        def place(flat: list[Any]) -> list[Any]:
            group, split = flat[0].decode(), flat[1].decode()
            mine = not cut_validation or folds.split(group) == split
            return [folds.fold(group).encode() if split == "train" else b"", mine]

        fold, mine = _call(place, [element["group"], element[SPLIT]], [tf.string, tf.bool])
        kept = {name: element[name] for name in RECORD_FIELDS}
        return kept | {FOLD: tf.ensure_shape(fold, []), "_good": mine}

    return _drop_bad(dataset.map(assign))


def select_fold(dataset: tf.data.Dataset, *, fold: Fold | None) -> tf.data.Dataset:
    """Keep one fold of the train split; records outside of train have none and are all kept, as with fold = None."""
    if fold is None:
        return dataset
    return dataset.filter(lambda element: (element[FOLD] == fold) | (element[FOLD] == ""))


def tokenize_view(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int | None] | None = None,
    *,
    view: str,
    codec: Codec,
    report: views.DropReport | None = None,
) -> tf.data.Dataset:
    """Turn records into the examples of one view, and leave out those that make none.

    `sequence_length`, which SeqIO and T5X hand over, narrows the codec's lengths. SeqIO would cut what is longer from
    the right, and with it the end of a response; here a prompt loses its beginning and a response is never cut.

    Args:
      dataset: records with at least prompt, chosen and rejected.
      sequence_length: the longest each feature may be.
      view: a name in `views.VIEWS`.
      codec: tokenizer, templates and lengths.
      report: counts what was made and dropped; the log tells it as well.
    Raises:
      ConfigError: `sequence_length` leaves no room for a prompt.
      DataError: there is a `sequence_length`, so SeqIO makes batches, but the tokenizer's id 0 is text.
    """
    if sequence_length:
        check_padding(codec.tokenizer)
    features = views.view(view).features
    codec = narrowed(codec, view, sequence_length or {})
    report = views.DropReport() if report is None else report

    def tokenize(flat: list[Any]) -> list[Any]:
        fields = dict(zip(RECORD_FIELDS, (text.decode() for text in flat), strict=True))
        example = next(views.make_examples(view, [Record(**fields)], codec, report), None)
        if example is None:
            _tell(report, view)
            return [np.zeros(0, np.int32)] * len(features) + [False]
        return [example[name] for name in features] + [True]

    def map_one(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        texts = [element.get(name, tf.constant("")) for name in RECORD_FIELDS]
        *ids, good = _call(tokenize, texts, [tf.int32] * len(features) + [tf.bool])
        return {name: tf.ensure_shape(value, [None]) for name, value in zip(features, ids, strict=True)} | {
            "_good": good
        }

    return _drop_bad(dataset.map(map_one))


def narrowed(codec: Codec, view: str, sequence_length: Mapping[str, int | None]) -> Codec:
    """Return the codec with lengths that fit a feature's `sequence_length`; a missing one or None is no limit.

    Raises:
      ConfigError: no room for a prompt or a response is left.
    """
    features = views.view(view).features
    limits = [sequence_length.get(name) for name in features if name in ("targets", "chosen", "rejected")]
    targets = min([codec.lengths.targets, *(limit for limit in limits if limit is not None)])
    inputs = codec.lengths.inputs
    limit = sequence_length.get(features[0])
    if limit is not None:
        shorter = dataclasses.replace(codec, lengths=Lengths(inputs=inputs, targets=targets))
        width = {"sft_policy": inputs, "sft_improver": shorter.width("improver")}.get(view, codec.prompt_room)
        inputs -= max(0, width - limit)
        if inputs < 1:
            rule = f"be more than {width - codec.lengths.inputs}, what the template and the reference of {view} take"
            raise invalid(f"TASK_FEATURE_LENGTHS[{features[0]!r}]", limit, rule, "Raise it, or lower the targets.")
    return dataclasses.replace(codec, lengths=Lengths(inputs=inputs, targets=targets))


class _Counts:
    """Tells how many things went wrong, at 1, 2, 4, 8, ... of them: neither silence nor a line for each."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._count = 0

    def add(self, message: str) -> None:
        self._count += 1
        if self._count & (self._count - 1) == 0:
            _log.warning("%d %s, the last: %s", self._count, self._what, message)


def _tell(report: views.DropReport, view: str) -> None:
    lost = report.dropped.total()
    if lost & (lost - 1) == 0:
        _log.info("%s: %s", view, report.summary())


def _plain(value: Any) -> Any:
    """Turn what NumPy holds into the Python objects that JSON would give."""
    if isinstance(value, dict):
        fields = {name: _plain(part) for name, part in value.items()}
        if fields.keys() >= {"role", "content"} and isinstance(fields["role"], list):
            return [{"role": r, "content": c} for r, c in zip(fields["role"], fields["content"], strict=True)]
        return fields
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"a text is not UTF-8 ({error}). Convert the data.") from error
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value.tolist()] if value.ndim else _plain(value.item())
    return value.item() if isinstance(value, np.generic) else value


def _as_object(raw: Any) -> dict[str, Any]:
    if isinstance(raw, dict) and JSON not in raw:
        return {name: value for name, value in raw.items() if name != SPLIT}
    text: str = raw[JSON] if isinstance(raw, dict) else raw
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"a line is not JSON ({error}): {text[:80]!r}. Mend it.") from error
    if not isinstance(value, dict):
        raise DataError(f"a line is {type(value).__name__} instead of a JSON object: {text[:80]!r}. Mend it.")
    return value


def _call(function: Callable[[list[Any]], list[Any]], tensors: list[tf.Tensor], types: list[tf.DType]) -> list:
    """Run a Python function of arrays inside of a dataset's map."""

    def guarded(*flat: Any) -> list[Any]:
        with marked():
            return function(list(flat))

    return tf.numpy_function(guarded, tensors, types, stateful=False)


def _drop_bad(dataset: tf.data.Dataset) -> tf.data.Dataset:
    good = dataset.filter(lambda element: element["_good"])
    return good.map(lambda element: {name: value for name, value in element.items() if name != "_good"})
