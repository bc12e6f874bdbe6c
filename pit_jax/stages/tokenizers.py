"""Tokenizers in the directories of a run: a directory, if it exists, is complete."""

from __future__ import annotations

from collections.abc import Iterable

from etils import epath

from pit_jax.text.tokenizer import SentencePieceTraining, Tokenizer, load_tokenizer, train_sentencepiece


def make_tokenizer(chosen: str | SentencePieceTraining, texts: Iterable[str], directory: epath.Path) -> None:
    """Copy or train a tokenizer into a directory, unless it is there.

    Args:
      chosen: a path or "bytes", or how one is to be trained.
      texts: what it is trained on.
      directory: where it is to be.

    Raises:
      DataError: there is no such tokenizer, or the texts do not suffice.
    """
    if directory.exists():
        return
    if isinstance(chosen, str):
        save_tokenizer(load_tokenizer(chosen), directory)
        return
    partial = _partial(directory)
    train_sentencepiece(texts, chosen, partial)
    partial.rename(directory)


def save_tokenizer(tokenizer: Tokenizer, directory: epath.Path) -> None:
    """Save a tokenizer into a directory that does not exist yet."""
    partial = _partial(directory)
    tokenizer.save(partial)
    partial.rename(directory)


def _partial(directory: epath.Path) -> epath.Path:
    return directory.parent / f"{directory.name}.partial"
