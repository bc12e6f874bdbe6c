"""Reading SeqIO tasks and mixtures as they are, in a fixed order and without SeqIO's trimming."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from pit_jax.core.errors import DataError, nearest
from pit_jax.data.folds import Fold
from pit_jax.data.schema import Document, Record, content_hash
from pit_jax.data.seqio_preprocessors import FOLD, RECORD_FIELDS
from pit_jax.data.seqio_runtime import seqio, tf, unmarked
from pit_jax.data.seqio_tasks import RECORDS
from pit_jax.data.seqio_vocabulary import TokenizerVocabulary
from pit_jax.data.views import VIEWS, Example
from pit_jax.text.tokenizer import Tokenizer


def import_tasks(module: str) -> None:
    """Import the module that registers a task.

    Raises:
      DataError: there is no such module.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"the task module {module!r} cannot be imported ({error}). Give its import path, such as tasks.hh_rlhf, and"
            " run from the directory that holds it, or put that on PYTHONPATH."
        ) from error


def find_task(name: str, view: str) -> str:
    """Return the task or mixture that gives a view of `name`.

    `name` is that of a task or mixture with the features of the view, or of a family of tasks: then it is the
    family's records, or else its task for the view (for mixtures that were made of tokenised tasks).

    Raises:
      DataError: there is none.
    """
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    for candidate in (name, f"{name}_{RECORDS}", f"{name}_{view}"):
        if candidate in known:
            return candidate
    families = [task.removesuffix(f"_{RECORDS}") for task in known if task.endswith(f"_{RECORDS}")]
    raise DataError(
        f"There is no SeqIO task {name!r}.{nearest(name, [*families, *known])} Known data sets: "
        f"{', '.join(families) or 'none'}. Name the module that registers it, for example tasks.hh_rlhf."
    )


def holds_records(task: str) -> bool:
    """Return whether a task gives records (text) rather than tokens."""
    return FOLD in seqio.get_mixture_or_task(task).output_features


def records_of_task(task: str, split: str, fold: Fold | None) -> Iterator[Record]:
    """Yield the records of a task's split; in train only those of `fold`, unless it is None.

    Raises:
      DataError: the task has no such split, or a record cannot be read.
    """
    for element in _elements(task, split):
        text = {name: value.decode() for name, value in element.items()}
        if fold is None or text[FOLD] in (fold, ""):
            yield Record(**{name: text[name] for name in RECORD_FIELDS})


def examples_of_task(task: str, split: str, view: str) -> Iterator[Example]:
    """Yield the tokenised examples of a task or mixture.

    Raises:
      DataError: the task has no such split, lacks a feature of the view, or a record cannot be read.
    """
    features = VIEWS[view].features
    for element in _elements(task, split, features):
        missing = [name for name in features if name not in element]
        if missing:
            raise DataError(
                f"task {task!r} gives {sorted(element)}, but the view {view!r} needs {list(features)}. Use a task "
                "of that view, or the name of the whole family."
            )
        yield {name: element[name] for name in features}


def documents_of_task(task: str, split: str) -> Iterator[Document]:
    """Yield the texts of a task that has a feature `text`.

    Raises:
      DataError: the task has no such split or feature.
    """
    for element in _elements(task, split):
        if "text" not in element:
            raise DataError(f"task {task!r} gives {sorted(element)}, but the view 'lm' needs the feature `text`.")
        text = element["text"].decode()
        identity = content_hash(text)
        yield Document(id=identity, group=identity, text=text)


def check_vocabulary(task: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenised task whose ids mean something else than the run's.

    Raises:
      DataError: the task was registered with another tokenizer.
    """
    for name, feature in seqio.get_mixture_or_task(task).output_features.items():
        vocabulary = feature.vocabulary
        if isinstance(vocabulary, TokenizerVocabulary) and vocabulary.fingerprint() != tokenizer.fingerprint():
            raise DataError(
                f"task {task!r} has tokenised {name!r} with {vocabulary.fingerprint()}, but the run's tokenizer is "
                f"{tokenizer.fingerprint()}. Register the task with the run's tokenizer, or name the family of tasks "
                "(without the view) to have its records tokenised by the run."
            )


def _elements(task: str, split: str, features: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    provider = seqio.get_mixture_or_task(task)
    if split not in provider.splits:
        raise DataError(f"task {task!r} has no split {split!r}. It has {', '.join(sorted(provider.splits))}.")
    # A mixture keeps declared features only, and goes on for ever, unless told otherwise.
    undeclared = [name for name in features if name not in provider.output_features]
    mixture: dict[str, Any] = {"passthrough_features": undeclared} if isinstance(provider, seqio.Mixture) else {}
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    with unmarked():
        dataset: tf.data.Dataset = provider.get_dataset(
            None,
            split=split,
            use_cached=all(part.cache_dir for part in tasks),
            shuffle=False,
            num_epochs=1,
            trim_output_features=False,
            **mixture,
        )
        yield from dataset.as_numpy_iterator()  # pyright: ignore[reportReturnType]
