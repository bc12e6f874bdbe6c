"""Formats and tokenizers that the tests of SRT share."""

from __future__ import annotations

import pathlib

from pit_jax.data.synthetic import PRESETS, SyntheticConfig, vocabulary
from pit_jax.srt.text import SrtText
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import SentencePieceTraining, Tokenizer, train_sentencepiece

SCORES = tuple(f"<{score}>" for score in range(1, 11))
PIECES = ("<reference>", "<answer>", "<feedback>", "<suggestion>", "<refinement>", *SCORES)
SPECIAL = {
    "feedback": "<feedback>",
    "refinement": "<refinement>",
    "weakness": "{weakness}",
    "suggestion": "<suggestion>{suggestion}",
    "score": "<{score}>",
}


def words(directory: pathlib.Path, pieces: tuple[str, ...] = PIECES) -> Tokenizer:
    """Return the tokenizer of the synthetic set, one piece a word."""
    config = SentencePieceTraining(model_type="word", vocab_size=96, special_pieces=pieces)
    every = sorted({word for name in PRESETS for word in vocabulary(SyntheticConfig(difficulty=name))})
    return train_sentencepiece(every, config, directory)


def codec_of(tokenizer: Tokenizer, *, inputs: int = 20, targets: int = 14) -> Codec:
    """Return a run's codec."""
    return Codec(tokenizer, Templates(policy="{prompt}"), Lengths(inputs=inputs, targets=targets))


def special(**changes) -> SrtText:
    """Return the format of the synthetic set."""
    return SrtText(**{"targets": 48, **SPECIAL, **changes})
