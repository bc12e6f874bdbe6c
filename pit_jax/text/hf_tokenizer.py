"""Tokenizers in the form of Hugging Face's `tokenizers` library: a directory with `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import tokenizers
from etils import epath

from pit_jax.core.errors import DataError
from pit_jax.text.chat_template import ChatTemplate, find_chat_template, turn_end
from pit_jax.text.special import TOKENIZER_JSON, Facts, ModelDefaults, kept_files, read_files

_ANCHOR = "a"


class HuggingFaceTokenizer:
    """A `tokenizer.json` with the files beside it that say which tokens are special (see `special.py`).

    Ids are those of transformers' `tokenizer(text, add_special_tokens=False)`: special tokens are not added, but are
    recognised where the text holds them, as that of a chat template does. Decoding leaves them out.

    Args:
      files: content by name, as `special.read_files` gives it; `tokenizer.json` must be among them.
      where: the directory, for errors.
    Raises:
      DataError: a file is broken, or none says what ends a response.
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self._where = where
        self._tokenizer = _parse(files[TOKENIZER_JSON], where)
        facts = Facts(files, where)
        self._add(facts)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self.vocab_size: int = max(self._tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added), 0)
        self.chat_template: ChatTemplate | None = find_chat_template(files, where)
        close, opens = turn_end(self.chat_template, where)
        end = next((i for i in self.encode(close)[:1] if i in self._added_ids), None)
        special = facts.decide(self, ModelDefaults(bos_id=self._leading_id()), close=end, opens_with_bos=opens)
        self.bos_id: int | None = special.bos_id
        self.pad_id: int = special.pad_id
        self.eos_ids: tuple[int, ...] = special.eos_ids
        self._silent = self._special_ids | {i for i in (special.bos_id, *special.eos_ids) if i is not None}
        self._files = kept_files(files, special)
        self._prefixes_space = self._tokenizer.encode(_ANCHOR, add_special_tokens=False).tokens[:1] != [_ANCHOR]

    @classmethod
    def read(cls, folder: epath.PathLike) -> HuggingFaceTokenizer:
        """Return the tokenizer of a directory with `tokenizer.json`; errors as of the class."""
        place = epath.Path(folder)
        return cls(read_files(place, TOKENIZER_JSON), str(place))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens are recognised in it, none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_rest(self, text: str) -> list[int]:
        """Return the ids of a text that goes on where another one ended: without the space put before a first word."""
        if not self._prefixes_space:
            return self.encode(text)
        anchor, joined = self.encode(_ANCHOR), self.encode(_ANCHOR + text)
        return joined[len(anchor) :] if joined[: len(anchor)] == anchor else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens and ids beyond the vocabulary have none."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in self._silent]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary, the special ids and the chat template."""
        template = None if self.chat_template is None else self.chat_template.fingerprint()
        said = [self.bos_id, self.pad_id, self.eos_ids, sorted(self._special_ids), template]
        digest = hashlib.sha256(self._files[TOKENIZER_JSON])
        digest.update(json.dumps(said).encode())
        return "huggingface-" + digest.hexdigest()[:16]

    def files(self) -> dict[str, bytes]:
        """Return the files of a copy that stands alone, by name (see `special.kept_files`)."""
        return dict(self._files)

    def save(self, directory: epath.PathLike) -> None:
        """Write the files of a copy that stands alone."""
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def special_tokens(self) -> dict[int, str]:
        """Return the tokens that have no text of their own, by id."""
        return {i: token for i in sorted(self._silent) if (token := self._tokenizer.id_to_token(i)) is not None}

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None where there is none."""
        return self._tokenizer.token_to_id(token)

    def is_text(self, token_id: int) -> bool:
        """Return whether an id is an ordinary piece of text, or none of this tokenizer's."""
        return token_id not in self._added_ids

    def _add(self, facts: Facts) -> None:
        """Add the tokens that the configuration knows and `tokenizer.json` does not, as transformers does."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        named = list(facts.named().values())
        for token_id, described in facts.added_tokens().items():
            content = described["content"]
            if content in known:
                continue
            flags = {flag: bool(described.get(flag)) for flag in ("single_word", "lstrip", "rstrip")}
            special = bool(described.get("special", True)) or content in named
            token = tokenizers.AddedToken(
                content, **flags, special=special, normalized=bool(described.get("normalized", not special))
            )
            self._tokenizer.add_tokens([token])
            known.add(content)
            if self._tokenizer.token_to_id(content) != token_id:
                raise DataError(
                    f"{self._where}: the token {content!r} must have the id {token_id}, but {TOKENIZER_JSON} leaves it "
                    f"{self._tokenizer.token_to_id(content)}. The files are not of one tokenizer: copy them again."
                )
        missing = [token for token in (*named, *facts.special()) if token not in known]
        self._tokenizer.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in missing])

    def _leading_id(self) -> int | None:
        """Return the special token that the library puts before a text, if it does."""
        encoded = self._tokenizer.encode(_ANCHOR, add_special_tokens=True)
        return encoded.ids[0] if encoded.special_tokens_mask[:1] == [1] and len(encoded.ids) > 1 else None


def _parse(content: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise DataError(f"{where}: {TOKENIZER_JSON} is no tokenizer ({error}). Copy it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
