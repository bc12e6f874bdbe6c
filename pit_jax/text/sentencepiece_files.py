"""What the files beside a SentencePiece model add to it, in a checkpoint of T5, Llama, Mistral or Gemma."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from pit_jax.core.errors import DataError
from pit_jax.text.chat_template import ChatTemplate, find_chat_template, turn_end
from pit_jax.text.special import TOKENIZER_CONFIG, Facts, ModelDefaults, SpecialTokens, kept_files

T5_MODEL_FILE = "spiece.model"
_T5_EXTRA_IDS = 100
_T5_CLASSES = ("", "T5Tokenizer", "T5TokenizerFast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """What is asked of a SentencePiece model: its size, its piece of a name, and what it holds by itself."""

    size: int
    find: Callable[[str], int | None]
    defaults: ModelDefaults


class SentencePieceFiles:
    """The tokens that are recognised in text beside a model's own pieces, and the special ids.

    T5's models end with the pieces <extra_id_99>, ..., <extra_id_0>, which are no part of the file.

    Args:
      files: content by name (see `special.read_files`).
      pieces: the model.
      model_name: name of the model's file, by which T5's is known where no file names the tokenizer's class.
      where: the directory, for errors.
    Raises:
      DataError: the files are broken, or do not belong to the model.
    """

    def __init__(self, files: Mapping[str, bytes], pieces: Pieces, model_name: str, where: str) -> None:
        facts = Facts(files, where)
        self._pieces = pieces
        self.added = _added(facts, pieces, model_name)
        self.size = max(pieces.size, *(i + 1 for i in self.added.values()), 0)
        self.chat_template: ChatTemplate | None = find_chat_template(files, where)
        close, opens = turn_end(self.chat_template, where)
        first = self.pattern.match(close) if self.added else None
        end = self.added[first.group()] if first else None
        self.special: SpecialTokens = facts.decide(self, pieces.defaults, close=end, opens_with_bos=opens)
        self.kept: dict[str, bytes] = kept_files(files, self.special)
        # Llama's newer form puts no space before the words that follow a special token; T5 puts one before every word.
        legacy = facts.config.get("legacy")
        self.space_after_special = _is_t5(facts, model_name) or legacy is True

    @property
    def pattern(self) -> re.Pattern[str]:
        """What cuts a text at the added tokens, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.added, key=len, reverse=True))))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None where there is none."""
        return self.added.get(token, self._pieces.find(token))

    def is_text(self, token_id: int) -> bool:
        """Return whether an id is an ordinary piece of text, or none at all."""
        defaults = self._pieces.defaults
        own = (defaults.bos_id, defaults.eos_id, defaults.pad_id)
        return token_id not in self.added.values() and token_id not in own


def _is_t5(facts: Facts, model_name: str) -> bool:
    return model_name == T5_MODEL_FILE and facts.config.get("tokenizer_class", "") in _T5_CLASSES


def _added(facts: Facts, pieces: Pieces, model_name: str) -> dict[str, int]:
    """Return token -> id of everything that is one token wherever it stands in a text."""
    found: dict[str, int] = {}
    for token_id, described in facts.added_tokens().items():
        found[described["content"]] = token_id
    extra = facts.config.get("extra_ids", _T5_EXTRA_IDS if _is_t5(facts, model_name) else 0)
    for n in range(extra):
        found.setdefault(f"<extra_id_{n}>", pieces.size + extra - 1 - n)
    for token in (*facts.named().values(), *facts.special()):
        if token in found:
            continue
        own = pieces.find(token)
        found[token] = max(pieces.size, *(i + 1 for i in found.values()), 0) if own is None else own
    clashes = [token for token, i in found.items() if i < pieces.size and pieces.find(token) != i]
    if clashes:
        raise DataError(
            f"{facts.where}: {TOKENIZER_CONFIG} gives {clashes[0]!r} the id {found[clashes[0]]}, that of another piece "
            "of the model. The files are not of one tokenizer: copy them again."
        )
    return found
