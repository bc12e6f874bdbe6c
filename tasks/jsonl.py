"""Any JSON Lines file as a SeqIO task, from a gin file alone.

pit_jax needs no task for that (bind `DataSpec.path`). Under T5X, or another program that asks for the name of a task:

    from __gin__ import dynamic_registration
    from tasks import jsonl

    MIXTURE_OR_TASK_NAME = @jsonl.task()
    jsonl.task.path = 'mine.jsonl'
    jsonl.task.view = 'sft_improver'
    jsonl.task.tokenizer = 'spm.model'
    jsonl.task.inputs = 512
    jsonl.task.targets = 128
    TASK_FEATURE_LENGTHS = {'inputs': 700, 'targets': 128}

`inputs` is the room for the prompt; the improver's prompt holds a reference and the template's own words besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import seqio

from pit_jax.data.seqio_tasks import RECORDS, register_preference_tasks
from pit_jax.data.views import view as view_named
from pit_jax.io.files import json_hash
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import load_tokenizer


def task(
    path: str | Sequence[str],
    view: str,
    inputs: int,
    targets: int,
    tokenizer: str = "bytes",
    validation_path: str | Sequence[str] | None = None,
    templates: Templates = Templates(),  # noqa: B008 (frozen)
) -> str:
    """Return the name of the task of one view of preference files, registering their family at the first call.

    Args:
      path: JSON Lines file(s) or glob(s), in any of the shapes of `pit_jax/data/schema.py`.
      view: sft_policy, sft_improver, reward_bt, reward_gap, rl, evaluate or records.
      inputs: tokens of a prompt.
      targets: tokens of a response, its EOS included.
      tokenizer: "bytes", a SentencePiece model, or a directory with one.
      validation_path: the files of the validation split, which is otherwise cut out of `path`.
      templates: how a prompt and a reference become one prompt.
    Raises:
      DataError: there is no such view.
    """
    if view != RECORDS:
        view_named(view)
    codec = Codec(load_tokenizer(tokenizer), templates, Lengths(inputs=inputs, targets=targets))
    marks = [path, validation_path, inputs, targets, codec.tokenizer.fingerprint(), repr(templates)]
    family = f"jsonl_{json_hash(marks)[:12]}"
    if f"{family}_{view}" not in seqio.TaskRegistry.names():
        source = {"train": path, "validation": validation_path} if validation_path else path
        register_preference_tasks(family, source, codec=codec)
    return f"{family}_{view}"
