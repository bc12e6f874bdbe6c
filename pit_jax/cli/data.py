"""The verbs that look at data or prepare them: inspect-data, cache and tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Iterator

from etils import epath
from rich.console import Console

from pit_jax.cli.stages import build_recipe
from pit_jax.core.errors import ConfigError, DataError
from pit_jax.data.inspect import check_preferences, show_check, show_examples
from pit_jax.data.open import DataSpec, open_examples, open_records, write_view_cache
from pit_jax.data.readers import ReadConfig, ReadReport, read_documents, read_jsonl
from pit_jax.data.schema import Record
from pit_jax.stages.lm import LanguageModel
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.run import Run
from pit_jax.text.codec import Codec
from pit_jax.text.tokenizer import SentencePieceTraining, train_sentencepiece


def inspect(args: argparse.Namespace) -> None:
    """`pit-jax inspect-data`: check a raw preference file, or show a view's examples as they are trained on."""
    console = Console(soft_wrap=True)
    if args.input and not args.gin_file:
        config = _reading(ReadConfig(), args)
        _check(args.input, config, console, codec=None, views=())
        _show_records(itertools.islice(read_jsonl(args.input, config, ReadReport()), args.number), console)
        return
    with _opened(args) as opened:
        if opened is None:
            return
        recipe, run = opened
        if args.input:
            views = () if args.view == "lm" else (args.view,)
            _check(args.input, _reading(run.experiment.data.read, args), console, codec=run.codec, views=views)
            return
        spec, codec = _data_of(args.view, recipe, run)
        spec = dataclasses.replace(spec, read=_reading(spec.read, args))
        examples = open_examples(spec, view=args.view, split=args.split, codec=codec, limit=args.number)
        show_examples(args.view, examples, codec, console)


def _reading(config: ReadConfig, args: argparse.Namespace) -> ReadConfig:
    """Return how files are read: the flag, if given, wins over the recipe."""
    return dataclasses.replace(config, on_bad_record=args.on_bad_record) if args.on_bad_record else config


def _check(path: str, config: ReadConfig, console: Console, *, codec: Codec | None, views: tuple[str, ...]) -> None:
    check = check_preferences(path, config, codec=codec, views=views)
    if not check.read.records:
        raise DataError(f"{path}: there is no usable record ({check.read.summary()}). Write one JSON object a line.")
    show_check(check, console)


def cache(args: argparse.Namespace) -> None:
    """`pit-jax cache`: write a view's examples where `DataSpec(cache=DIR)` finds them."""
    with _opened(args) as opened:
        if opened is None:
            return
        spec, codec = _data_of(args.view, *opened)
        written = write_view_cache(
            spec, args.output, view=args.view, split=args.split, codec=codec, overwrite=args.overwrite
        )
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(written.dropped.items()))
    print(f"{args.output}: {written.count} examples of {args.view}, {args.split}; dropped: {dropped or 'none'}")


def tokenizer(args: argparse.Namespace) -> None:
    """`pit-jax tokenizer`: train a SentencePiece vocabulary on files, or on a recipe's records."""
    if args.input:
        if args.gin_file:
            raise ConfigError("tokenizer takes --input or --gin_file, not both. Leave one out.")
        _train(args, None, _file_texts(args))
        return
    with _opened(args) as opened:
        if opened is None:
            return
        _, run = opened
        wanted = run.experiment.tokenizer
        training = wanted if isinstance(wanted, SentencePieceTraining) else None
        _train(args, training, _record_texts(open_records(run.experiment.data, "train")))


def _train(args: argparse.Namespace, training: SentencePieceTraining | None, texts: Iterable[str]) -> None:
    """Train as the recipe says, flags first; without a recipe `--vocab_size` is needed."""
    output = epath.Path(args.output)
    if output.exists():
        raise ConfigError(f"--output={args.output} exists already. Name a new directory, or delete it.")
    flags = {"vocab_size": args.vocab_size, "seed": args.seed}
    changes = {name: value for name, value in flags.items() if value is not None}
    if training is None and args.vocab_size is None:
        raise ConfigError("tokenizer needs --vocab_size=N: nothing else says how many pieces there should be.")
    training = SentencePieceTraining(**changes) if training is None else dataclasses.replace(training, **changes)
    made = train_sentencepiece(texts, training, output)
    print(f"{args.output}: {made.vocab_size} pieces ({training.model_type})")


@contextlib.contextmanager
def _opened(args: argparse.Namespace) -> Iterator[tuple[Recipe, Run] | None]:
    """Yield the recipe and the run that it describes, for reading; None after `--print_config`.

    A tokenizer that the run has made already is used; one that it would make is made in a scratch directory,
    because looking at data must not begin a run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        recipe, text = build_recipe(args, defaults=(f"MODEL_DIR={scratch!r}",))
        if args.print_config:
            print(text)
            yield None
            return
        begun = (epath.Path(recipe.model_dir) / "tokenizer").exists()
        yield recipe, Run(recipe.model_dir if begun else scratch, recipe.seed, recipe.experiment)


def _data_of(view: str, recipe: Recipe, run: Run) -> tuple[DataSpec, Codec]:
    """Return the data and the codec of a view: of the recipe's language-model stage for `lm`."""
    if view != "lm":
        return run.experiment.data, run.codec
    stage = next((stage for stage in recipe.stages if isinstance(stage, LanguageModel)), None)
    if stage is None:
        raise ConfigError("The recipe has no stage that trains on text, so there is no view lm. Name another view.")
    return stage.data, stage.codec(run)


def _file_texts(args: argparse.Namespace) -> Iterator[str]:
    config = ReadConfig()
    for path in args.input:
        kind = args.input_format or ("preferences" if ".json" in epath.Path(path).name else "text")
        if kind == "preferences":
            yield from _record_texts(read_jsonl(path, config, ReadReport()))
        else:
            yield from (document.text for document in read_documents(path, config, ReadReport()))


def _record_texts(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        yield from (record.prompt, record.chosen, record.rejected)


def _show_records(records: Iterable[Record], console: Console) -> None:
    for record in records:
        console.print(f"--- {record.id} (group {record.group})", style="bold", markup=False, highlight=False)
        for name, text, style in (
            ("prompt", record.prompt, "dim"),
            ("chosen", record.chosen, "green"),
            ("rejected", record.rejected, "red"),
        ):
            console.print(f"[{name}] {text}", style=style, markup=False, highlight=False)
