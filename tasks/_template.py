"""Copy this file, name it after your data set, and change the names below.

A source is JSON Lines (a path, a glob, or {"train": ..., "validation": ...}), "tfds:<name>", any `seqio.DataSource`,
or a function that returns records. A record has `chosen` and `rejected`, and a `prompt` unless these are whole
dialogues; texts or lists of messages. Then train on it:

    pit-jax pipeline --gin_file=... --gin.MIXTURE_OR_TASK_MODULE="'tasks.mine'" --gin.MIXTURE_OR_TASK_NAME="'mine'"
"""

from pit_jax.data.seqio_tasks import register_preference_tasks
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

register_preference_tasks(
    "mine",
    "data/mine-*.jsonl.gz",
    # Only other programs (T5X) read the tasks as they are tokenised here; pit_jax uses the tokenizer of its recipe.
    codec=Codec(ByteTokenizer(), Templates(), Lengths(inputs=1024, targets=512)),
)
