"""What `register_preference_tasks` accepts as a source, as SeqIO data sources."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pit_jax.core.errors import DataError
from pit_jax.data.readers import Paths, ReadConfig, ReadReport, find_files, read_jsonl
from pit_jax.data.schema import Record, parse
from pit_jax.data.seqio_preprocessors import JSON, RECORD_FIELDS, SPLIT
from pit_jax.data.seqio_runtime import marked, seqio, tf

TFDS = "tfds:"
_log = logging.getLogger(__name__)

RawRecords = Callable[[], Iterable[Mapping[str, Any]]]
PreferenceSource = Paths | Mapping[str, Paths] | RawRecords | seqio.DataSource


def as_data_source(source: PreferenceSource, read: ReadConfig) -> SplitSource:
    """Return the SeqIO data source of anything `register_preference_tasks` accepts.

    Nothing is opened before the data are read: to register a task costs nothing.

    Raises:
      DataError: it is none of the kinds accepted, or has no `train` split.
    """
    if isinstance(source, seqio.DataSource):
        return SplitSource(source)
    if isinstance(source, str) and source.startswith(TFDS):
        return SplitSource(seqio.TfdsDataSource(source.removeprefix(TFDS), splits={"train": "train"}))
    if callable(source):
        return SplitSource(_python_source({"train": lambda: _parsed(source(), read)}), parsed=True)
    if isinstance(source, Iterator):
        raise DataError(
            f"the source is a {type(source).__name__}, which can be read only once. Give the function that makes it "
            "(without brackets), or a list."
        )
    if isinstance(source, Sequence) and source and isinstance(source[0], Mapping):
        records: Any = source
        return SplitSource(_python_source({"train": lambda: _parsed(records, read)}), parsed=True)
    if not isinstance(source, str | os.PathLike | Sequence | Mapping):
        raise DataError(
            f"the source is a {type(source).__name__}. Give the path of a JSON Lines file, a list or a dict "
            "{'train': path, 'validation': path} of them, 'tfds:<name>', a seqio.DataSource, or a function that "
            "returns records."
        )
    files = source if isinstance(source, Mapping) else {"train": source}
    return SplitSource(
        _python_source(
            {split: functools.partial(_read, paths, read) for split, paths in files.items()},
            check=lambda split: find_files(files[split]),
        ),
        parsed=True,
    )


def _read(paths: Paths, read: ReadConfig) -> Iterator[Record]:
    report = ReadReport()
    yield from read_jsonl(paths, read, report)
    _log.info("%s", report.summary())


def _parsed(raw: Iterable[Mapping[str, Any]], read: ReadConfig) -> Iterator[Record]:
    for number, fields in enumerate(raw):
        try:
            yield parse(fields, read.chat)
        except DataError as error:
            if read.on_bad_record == "fail":
                raise DataError(f"record {number}: {error}") from error


def _python_source(
    splits: Mapping[str, Callable[[], Iterator[Record]]], check: Callable[[str], object] = lambda split: None
) -> seqio.DataSource:
    """Return a data source of records that Python makes; `check` may fail early, before TensorFlow's threads start."""
    signature = {name: tf.TensorSpec([], tf.string) for name in RECORD_FIELDS}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        check(split)

        def rows() -> Iterator[dict[str, str]]:
            with marked():
                for record in splits[split]():
                    yield dataclasses.asdict(record)

        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    return seqio.FunctionDataSource(dataset_fn, splits=tuple(splits))


class SplitSource(seqio.DataSource):
    """Any source of raw records, with the name of the split added to each record as `split`.

    A source without a `validation` split gets one: both are then read from its `train` split, and the preprocessor
    `assign_fold`, which knows the groups, keeps the right ones of each.
    """

    def __init__(self, inner: seqio.DataSource, *, parsed: bool = False) -> None:
        """Wrap a source; `parsed` says that its records are {id, group, prompt, chosen, rejected} already."""
        self.parsed = parsed
        splits = tuple(inner.splits)
        if "train" not in splits:
            raise DataError(
                f"the source has splits {splits}, but no 'train'. Name one of them so, for example "
                "seqio.TfdsDataSource(..., splits={'train': 'all'})."
            )
        self.cut_validation = "validation" not in splits
        self._inner = inner
        super().__init__(
            splits=(*splits, "validation") if self.cut_validation else splits,
            caching_permitted=inner.caching_permitted,
            performs_internal_shuffling=inner.performs_internal_shuffling,
        )

    def __repr__(self) -> str:
        return f"SplitSource({self._inner!r})"

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Whether the source can be cut into any number of shards."""
        return self._inner.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        """Return the names of the source's shards."""
        return self._inner.list_shards(self._read_from(split))

    def num_input_examples(self, split: str) -> int | None:
        """Return the number of records, or None where it is not known."""
        return None if self.cut_validation else self._inner.num_input_examples(split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Return the raw records of a split."""
        del unused
        dataset = self._inner.get_dataset(self._read_from(split), shuffle, seed, shard_info)

        def mark(element: Any) -> dict[str, Any]:
            fields = element if isinstance(element, dict) else {JSON: element}
            return {**fields, SPLIT: tf.constant(split)}

        return dataset.map(mark)

    def _read_from(self, split: str) -> str:
        return "train" if self.cut_validation and split == "validation" else split
