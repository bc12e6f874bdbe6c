"""Preference data as SeqIO tasks: one call registers every view of a data set.

    register_preference_tasks("mine", "mine.jsonl", codec=codec)

registers, each with the splits `train` and `validation` (and what else the source has):

    mine_records                         {id, group, prompt, chosen, rejected, fold}   text; all the others come from it
    mine_sft_policy                      {inputs, targets}                               fold sft of train
    mine_sft_improver                    {inputs, reference, targets}                    fold sft of train
    mine_reward_bt, mine_reward_gap      {prompt, chosen, rejected}                      fold rm
    mine_rl                              {prompt, chosen, rejected}                      fold rl
    mine_evaluate                        {prompt, chosen, rejected}                      all of a split

The tokenised tasks hold what `data/views.py` describes. Both SFT tasks train unchanged under T5X: `targets` ends with
EOS already (`add_eos` is False, so that no preprocessor adds a second one), padding is 0, and the examples are made to
fit TASK_FEATURE_LENGTHS, so that SeqIO's trimming, which would cut the EOS off, finds nothing to trim.

pit_jax itself reads a data set by the name of the family (`mine`) with the tokenizer, templates and lengths of the
run, from `mine_records`; or a tokenised task or mixture by its full name. Either way it reads without SeqIO's trimming.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from pit_jax.core.errors import DataError, invalid
from pit_jax.data.folds import Folds
from pit_jax.data.readers import ReadConfig
from pit_jax.data.seqio_preprocessors import (
    FOLD,
    RECORD_FIELDS,
    Convert,
    assign_fold,
    parse_preferences,
    select_fold,
    tokenize_view,
)
from pit_jax.data.seqio_runtime import seqio, tf
from pit_jax.data.seqio_sources import PreferenceSource, as_data_source
from pit_jax.data.seqio_vocabulary import TokenizerVocabulary
from pit_jax.data.views import VIEWS
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

RECORDS = "records"
BYTES = Codec(ByteTokenizer(), Templates(), Lengths(inputs=2048, targets=1024))
"""What tasks are tokenised with unless told otherwise: bytes, with ByT5's ids, which need no file."""

Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


def register_preference_tasks(
    name: str,
    source: PreferenceSource,
    *,
    codec: Codec = BYTES,
    folds: Folds = Folds(),  # noqa: B008 (frozen)
    read: ReadConfig = ReadConfig(),  # noqa: B008 (frozen)
    convert: Convert | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Register the tasks of a preference data set and return their names.

    Args:
      name: of the family; letters, digits and `_ . : #`.
      source: path(s) or glob(s) of JSON Lines files; a dict {"train": paths, "validation": paths} of them;
        "tfds:<name>" (the split `train` is read); any `seqio.DataSource` of raw records (`TfdsDataSource` with a
        validation split, a `TextLineDataSource` of JSON); a list of records, or a function that returns records.
        Raw records have one of the four shapes of `data/schema.py`. A source without a `validation` split gets one,
        cut by the hash of the groups.
      codec: tokenizer, templates and lengths of the tokenised tasks.
      folds: how groups are dealt out to validation and to the three folds of train.
      read: how dialogues are written, and what is done with records that cannot be used.
      convert: turns a raw record with other fields into one of the four shapes; for a `seqio.DataSource` only
        (a function converts its records itself).
      overwrite: replace tasks of the same names, as when a notebook's cell is run again.
    Raises:
      ConfigError: the name cannot be that of a task.
      DataError: the source is of no kind accepted, or a task of that name exists.
    """
    if not re.fullmatch(r"[\w.:#]+", name):
        rule = "consist of letters, digits and _ . : # (SeqIO's rule for task names)"
        better = re.sub(r"[^\w.:#]", "_", name) or "mine"
        raise invalid("register_preference_tasks name", name, rule, f"Use {better!r}.")
    if convert is not None and not isinstance(source, seqio.DataSource):
        raise DataError("`convert` works with a seqio.DataSource. Give a function that returns converted records.")
    names = tuple(f"{name}_{kind}" for kind in (RECORDS, *VIEWS))
    taken = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} & set(names))
    if taken and not overwrite:
        raise DataError(f"task {taken[0]!r} is registered already. Use another name, or overwrite=True.")
    for task in taken:
        seqio.TaskRegistry.remove(task)
    data = as_data_source(source, read)
    steps: list[Preprocessor] = [
        *([] if data.parsed else [functools.partial(parse_preferences, read=read, convert=convert)]),
        functools.partial(assign_fold, folds=folds, cut_validation=data.cut_validation),
        seqio.CacheDatasetPlaceholder(),
    ]
    seqio.TaskRegistry.add(names[0], source=data, preprocessors=steps, output_features=_text_features())
    for view, task in zip(VIEWS, names[1:], strict=True):
        seqio.TaskRegistry.add(
            task, source=data, preprocessors=steps + view_steps(view, codec), output_features=features_of(view, codec)
        )
    return names


def view_steps(view: str, codec: Codec) -> list[Preprocessor]:
    """Return the preprocessors that turn records with their folds into the examples of one view."""
    return [
        functools.partial(select_fold, fold=VIEWS[view].fold),
        functools.partial(tokenize_view, view=view, codec=codec),
    ]


def features_of(view: str, codec: Codec) -> dict[str, seqio.Feature]:
    """Return the output features of one view, whose vocabulary is the codec's tokenizer.

    `reference`, a span and no tokens, is passed along undeclared: both SFT tasks then fit into one SeqIO mixture.
    """
    vocabulary = TokenizerVocabulary(codec.tokenizer)
    tokens = [name for name in VIEWS[view].features if name != "reference"]
    return {name: seqio.Feature(vocabulary, add_eos=False) for name in tokens}


def _text_features() -> dict[str, seqio.Feature]:
    text = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)
    return dict.fromkeys((*RECORD_FIELDS, FOLD), text)
