"""The project's tokenizers as SeqIO vocabularies: the same ids in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pit_jax.core.errors import DataError
from pit_jax.data.seqio_runtime import seqio, tf
from pit_jax.text.tokenizer import Tokenizer


def check_padding(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose id 0 is text where SeqIO or T5X make batches: they pad with 0 and do not train on it.

    pit_jax itself reads tasks without SeqIO's batches, and pads with the tokenizer's own id.

    Raises:
      DataError: id 0 is neither padding nor a special token.
    """
    text = tokenizer.decode([0])
    if tokenizer.pad_id != 0 and text:
        raise DataError(
            f"SeqIO and T5X pad with 0 and train on no token 0, but in this tokenizer it is {text!r} and padding is "
            f"{tokenizer.pad_id}. Train with pit_jax, or use a tokenizer whose id 0 is padding."
        )


class TokenizerVocabulary(seqio.Vocabulary):
    """A SeqIO vocabulary around a tokenizer.

    Two are equal when their tokenizers have the same fingerprint. (SeqIO's own SentencePiece vocabulary compares
    paths, so that a copy of a model counts as another vocabulary, and T5X then refuses to train.)
    SeqIO and T5X pad with 0 (see `check_padding`) and take the first end-of-sequence id only.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(extra_ids=0)
        self.tokenizer = tokenizer

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a text, if the tokenizer has one."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        """First of the ids that end a response."""
        return self.tokenizer.eos_ids[0]

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self.tokenizer.pad_id

    @property
    def unk_id(self) -> int | None:
        """None: what a tokenizer does with unknown text is its own affair."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        specials = {self.tokenizer.pad_id, *self.tokenizer.eos_ids}
        return self.tokenizer.decode([int(token) for token in ids if int(token) not in specials])

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: Any) -> np.ndarray:
            text = np.asarray(text, object).item()  # bytes in a graph, an array of rank 0 outside of one
            return np.asarray(self.tokenizer.encode(text.decode()), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> Any:
            texts = [self.decode(row.tolist()).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.asarray(texts, object).reshape(rows.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __str__(self) -> str:
        return f"TokenizerVocabulary(size={self.vocab_size}, fingerprint={self.fingerprint()})"

    def fingerprint(self) -> str:
        """Hash of the tokenizer's content, the same for every copy of it."""
        return self.tokenizer.fingerprint()
