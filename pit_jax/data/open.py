"""From a description of data to examples: files, generators and caches without TensorFlow, SeqIO tasks with it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pit_jax.core.errors import ConfigError, DataError, invalid, nearest
from pit_jax.data import cache
from pit_jax.data.folds import Fold, Folds, Split
from pit_jax.data.readers import ReadConfig, ReadReport, find_files, read_documents, read_jsonl
from pit_jax.data.schema import Document, Record, parse
from pit_jax.data.source import BlockProvider, ListBlocks, ShuffledSource
from pit_jax.data.stream import StreamBlocks
from pit_jax.data.views import DropReport, Example, fold_for, lm_examples, make_examples
from pit_jax.data.views import view as view_named
from pit_jax.io.files import json_hash
from pit_jax.io.serialize import to_json
from pit_jax.text.chat_template import TemplateChat
from pit_jax.text.codec import Codec

RECORDS = "records"
_log = logging.getLogger(__name__)
_KINDS = ("task", "path", "cache", "generator")
# Records of files and generators are kept between the stages of a run, unless they are larger than this.
_KEEP_CHARACTERS = 300_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where data come from: exactly one of `task`, `path`, `cache` and `generator`.

    Attributes:
      task: a SeqIO task or mixture, or the name of a family that `register_preference_tasks` registered. It brings
        its own folds and reading.
      module: imported before `task` is looked up, such as "tasks.hh_rlhf".
      path: JSON Lines file(s) or glob(s) of preferences; for the view `lm` also of texts.
      validation_path: the same for the validation split, which is otherwise cut out of `path`.
      cache: a directory that `pit-jax cache` wrote.
      generator: a function that returns raw records, or its import path, such as "pit_jax.data.synthetic:generate".
      config: what the generator is called with; None calls it without arguments.
      folds: how the groups of files and generators are dealt out.
      read: how files are read; a cache of prompts that a chat template wrote is opened with the same one.
      document: whether a document of a plain text file (view `lm`) is a line or the whole file.
      window: number of examples that are shuffled together; all of them if it is at least as large as the data.
    """

    task: str | None = None
    module: str | None = None
    path: str | Sequence[str] | None = None
    validation_path: str | Sequence[str] | None = None
    cache: str | None = None
    generator: str | Callable[..., Iterable[Mapping[str, Any]]] | None = None
    config: Any = None
    folds: Folds = Folds()
    read: ReadConfig = ReadConfig()
    document: Literal["line", "file"] = "line"
    window: int = 20_000

    def __post_init__(self) -> None:
        """Check that one source is given, and nothing that belongs to another."""
        values = {"task": self.task, "path": self.path, "cache": self.cache, "generator": self.generator}
        given = [name for name, value in values.items() if value]
        if len(given) != 1:
            rule = f"name exactly one of {', '.join(_KINDS)}"
            raise invalid("DataSpec", given, rule, "Set one, for example path = 'my.jsonl'.")
        for name, value, owner in (
            ("module", self.module, "task"),
            ("validation_path", self.validation_path, "path"),
            ("config", self.config, "generator"),
        ):
            if value and given != [owner]:
                raise invalid(f"DataSpec.{name}", value, f"be set only beside {owner}", "Remove it.")
        if self.document not in ("line", "file"):
            raise invalid("DataSpec.document", self.document, "be 'line' or 'file'", "Choose one of them.")
        if self.window < 1:
            raise invalid("DataSpec.window", self.window, "be at least 1", "1 does not shuffle; 20000 is usual.")


def open_source(spec: DataSpec, *, view: str, split: Split, codec: Codec, seed: int) -> ShuffledSource:
    """Return an endless, seeded stream of the examples of one view.

    Where the data come from decides nothing about their order: a SeqIO task, its cache, its file and a list of its
    examples give the same stream.

    Raises:
      DataError: the data cannot be read, or hold no example of the view.
    """
    return ShuffledSource(open_blocks(spec, view=view, split=split, codec=codec), window=spec.window, seed=seed)


def open_blocks(spec: DataSpec, *, view: str, split: Split, codec: Codec) -> BlockProvider:
    """Return the examples of one view, in the data's own order.

    Raises:
      DataError: the data cannot be read, or hold no example of the view.
    """
    if spec.cache:
        return cache.CacheBlocks(_open_cache(spec, view, split, codec))
    reports = [DropReport()]

    def opened() -> Iterator[Example]:
        reports[0] = DropReport()
        yield from iterate_examples(spec, view=view, split=split, codec=codec, report=reports[0])
        _log.info("view %s, split %s: %s", view, split, reports[0].summary())

    blocks: BlockProvider = StreamBlocks(opened) if spec.task else ListBlocks(list(opened()))
    if len(blocks) == 0:
        raise DataError(
            f"There is no example of the view {view!r} in the split {split!r} ({reports[0].summary()}). Give more data,"
            " raise the lengths, or change DataSpec.folds; `pit-jax inspect-data` shows the records."
        )
    return blocks


def open_examples(spec: DataSpec, *, view: str, split: Split, codec: Codec, limit: int | None = None) -> list[Example]:
    """Return the first `limit` examples of one view (all, if None), in the data's own order.

    Raises:
      DataError: the data cannot be read.
    """
    return list(
        itertools.islice(iterate_examples(spec, view=view, split=split, codec=codec, report=DropReport()), limit)
    )


def iterate_examples(spec: DataSpec, *, view: str, split: Split, codec: Codec, report: DropReport) -> Iterator[Example]:
    """Yield the examples of one view, in the data's own order, counting in `report` what is dropped.

    Raises:
      DataError: the data cannot be read.
      ConfigError: a chat template writes the prompts, but the codec's templates are not its own.
    """
    if spec.cache:
        cached = _open_cache(spec, view, split, codec)
        report.kept += len(cached)
        report.dropped.update(cached.metadata.dropped)
        yield from cached
    elif view == "lm":
        for document in open_documents(spec, split):
            for example in lm_examples(document, codec):
                report.kept += 1
                yield example
    elif spec.task and (task := _tokenised_task(spec, view, codec)):
        from pit_jax.data import seqio_live

        for example in seqio_live.examples_of_task(task, split, view):
            report.kept += 1
            yield example
    else:
        if isinstance(spec.read.chat, TemplateChat) and not spec.task:
            spec.read.chat.check(codec.templates)
        yield from make_examples(view, open_records(spec, split, fold=fold_for(view)), codec, report)


def open_records(spec: DataSpec, split: Split, *, fold: Fold | None = None) -> Iterator[Record]:
    """Yield the records (text) of a split; in train only those of `fold`, unless it is None.

    Raises:
      DataError: the data cannot be read, or hold tokens only.
    """
    if spec.task:
        yield from _task_records(spec, split, fold)
    elif spec.cache:
        if fold is not None:
            raise DataError("A cache of records does not know the folds. Read all of the split, or a view's cache.")
        place = _place(spec.cache, RECORDS, split)
        for fields in cache.open_cache(place, view=RECORDS, split=split, codec=_cache_key(spec, RECORDS, None)):
            yield Record(**fields)
    elif spec.validation_path:
        for record in _all_records(spec, split):
            if fold is None or split == "validation" or spec.folds.fold(record.group) == fold:
                yield record
    else:
        for record in _all_records(spec, "train"):
            if spec.folds.holds(record.group, split, fold):
                yield record


def open_documents(spec: DataSpec, split: Split) -> Iterator[Document]:
    """Yield the texts of a split, for the view `lm`.

    Raises:
      DataError: the data cannot be read.
    """
    if spec.task:
        from pit_jax.data import seqio_live

        _import_tasks(spec)
        yield from seqio_live.documents_of_task(seqio_live.find_task(spec.task, "lm"), split)
        return
    if not spec.path:
        raise DataError(
            "The view 'lm' reads texts. Give DataSpec.path, a SeqIO task with a feature `text`, or a cache."
        )
    paths = spec.validation_path if spec.validation_path and split == "validation" else spec.path
    report = ReadReport()
    for document in read_documents(paths, spec.read, report, unit=spec.document):
        if spec.validation_path or spec.folds.split(document.group) == split:
            yield document
    _say(report)


def write_view_cache(
    spec: DataSpec, directory: str | os.PathLike[str], *, view: str, split: Split, codec: Codec, overwrite: bool = False
) -> cache.CacheMetadata:
    """Write the cache of one view and split below `directory`, where `DataSpec(cache=directory)` finds it.

    The view "records" keeps the text, which evaluation and `open_records` need.

    Raises:
      DataError: the data cannot be read or hold no example, or the cache exists and `overwrite` is false.
    """
    report = DropReport()
    if view == RECORDS:
        examples: Iterator[Mapping[str, Any]] = map(dataclasses.asdict, open_records(spec, split))
        codec_key, tokenizer = _cache_key(spec, view, None), ""
    else:
        examples = iterate_examples(spec, view=view, split=split, codec=codec, report=report)
        codec_key, tokenizer = _cache_key(spec, view, codec), codec.tokenizer.fingerprint()
    metadata = cache.CacheMetadata(view=view, split=split, codec=codec_key, tokenizer=tokenizer, dropped=report.dropped)
    return cache.write_cache(examples, _place(directory, view, split), metadata, overwrite=overwrite)


def view_fingerprint(codec: Codec, view: str) -> str:
    """Return a hash of everything about a codec that the examples of a view depend on.

    That is the tokenizer and the lengths, the policy's template (which decides the room for prompts), and for
    `sft_improver` the improver's; other templates are applied when batches are made.
    """
    templates = codec.templates
    used = {
        "tokenizer": codec.tokenizer.fingerprint(),
        "lengths": to_json(codec.lengths),
        "policy": None if view == "lm" else [templates.policy, templates.bos],
        "improver": templates.improver if view == "sft_improver" else None,
    }
    return json_hash(used)[:16]


def _cache_key(spec: DataSpec, view: str, codec: Codec | None) -> str:
    """Return a hash of what a cache depends on: the codec, if it holds tokens, and the chat template of the prompts."""
    key = "" if codec is None else view_fingerprint(codec, view)
    chat = spec.read.chat
    return key if view == "lm" or not isinstance(chat, TemplateChat) else f"{key}-chat-{chat.fingerprint()}"


def _place(root: str | os.PathLike[str], view: str, split: str) -> Path:
    return Path(root) / view / split


def _open_cache(spec: DataSpec, view: str, split: str, codec: Codec) -> cache.CachedExamples:
    root = spec.cache
    assert root
    if view != "lm":
        view_named(view)
    if not Path(root).is_dir():
        raise DataError(f"DataSpec.cache = {root!r}: there is no such directory. Write it with `pit-jax cache`.")
    place = _place(root, view, split)
    if not place.is_dir():
        held = sorted(str(path.parent.relative_to(root)) for path in Path(root).glob(f"*/*/{cache.METADATA}"))
        raise DataError(
            f"the cache {root} has no {view}/{split}. It holds {', '.join(held) or 'nothing'}. Add it with "
            "`pit-jax cache`."
        )
    return cache.open_cache(place, view=view, split=split, codec=_cache_key(spec, view, codec))


def _import_tasks(spec: DataSpec) -> None:
    from pit_jax.data import seqio_live

    if spec.module:
        seqio_live.import_tasks(spec.module)


def _tokenised_task(spec: DataSpec, view: str, codec: Codec) -> str | None:
    """Return the tokenised task a spec means, after checking its vocabulary; None if it means records."""
    from pit_jax.data import seqio_live

    assert spec.task
    view_named(view)
    _import_tasks(spec)
    task = seqio_live.find_task(spec.task, view)
    if seqio_live.holds_records(task):
        return None
    seqio_live.check_vocabulary(task, codec.tokenizer)
    return task


def _task_records(spec: DataSpec, split: Split, fold: Fold | None) -> Iterator[Record]:
    from pit_jax.data import seqio_live

    assert spec.task
    _import_tasks(spec)
    task = seqio_live.find_task(spec.task, RECORDS)
    if not seqio_live.holds_records(task):
        raise DataError(f"task {task!r} holds tokens, not text. Name the family of tasks, without the view.")
    yield from seqio_live.records_of_task(task, split, fold)


def _all_records(spec: DataSpec, split: Split) -> Sequence[Record]:
    """Return all records of a file or generator, kept from the last call if nothing has changed."""
    paths = spec.validation_path if spec.validation_path and split == "validation" else spec.path
    stamps = []
    if paths:
        for file in find_files(paths):
            stat = file.stat()
            stamps.append((str(file), stat.length, stat.mtime))
    # Two functions may have the same name; the request keeps the function alive, so its id is not used again.
    identity = id(spec.generator) if callable(spec.generator) else 0
    return _load(
        _Request(spec, split, json_hash([to_json(spec), identity, split, stamps, spec.read.chat.fingerprint()]))
    )


@dataclasses.dataclass(frozen=True)
class _Request:
    """Key of the kept records; two are the same when their hashes are."""

    spec: DataSpec = dataclasses.field(compare=False)
    split: Split = dataclasses.field(compare=False)
    key: str


def _load(request: _Request) -> Sequence[Record]:
    records = _kept(request)
    if sum(len(r.prompt) + len(r.chosen) + len(r.rejected) for r in records) > _KEEP_CHARACTERS:
        _kept.cache_clear()
    return records


@functools.lru_cache(maxsize=2)
def _kept(request: _Request) -> Sequence[Record]:
    spec = request.spec
    if spec.path:
        report = ReadReport()
        paths = spec.validation_path if spec.validation_path and request.split == "validation" else spec.path
        records = tuple(read_jsonl(paths, spec.read, report))
        _say(report)
        return records
    return tuple(_generated(spec))


def _say(report: ReadReport) -> None:
    """Log what a reader met; lines that were left out are named, each by file and line."""
    for message in report.bad:
        _log.warning("left out: %s", message)
    if report.bad_count > len(report.bad):
        _log.warning("left out: %d more lines", report.bad_count - len(report.bad))
    _log.info("%s", report.summary())


def _generated(spec: DataSpec) -> Iterator[Record]:
    function = _function(spec.generator) if isinstance(spec.generator, str) else spec.generator
    assert function
    bad = 0
    for number, raw in enumerate(function() if spec.config is None else function(spec.config)):
        try:
            yield parse(raw, spec.read.chat)
        except DataError as error:
            if spec.read.on_bad_record == "fail":
                raise DataError(f"record {number} of {spec.generator}: {error}") from error
            bad += 1
    if bad:
        _log.warning("%d records of %s cannot be used and were left out", bad, spec.generator)


def _function(path: str) -> Callable[..., Iterable[Mapping[str, Any]]]:
    module, colon, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    fix = "Give module:function, such as 'pit_jax.data.synthetic:generate'."
    if not (module and name):
        raise invalid("DataSpec.generator", path, "be the import path of a function", fix)
    try:
        found = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        raise ConfigError(f"DataSpec.generator = {path!r}: {error}. {fix}") from error
    if not callable(found.get(name)):
        raise ConfigError(f"DataSpec.generator = {path!r}: {module} has no function {name!r}.{nearest(name, found)}")
    return found[name]
