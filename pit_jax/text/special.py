"""What a checkpoint's own files say about its special tokens: the one place where BOS, padding and EOS are decided.

    bos       the token that `tokenizer_config.json`, else `special_tokens_map.json`, names; null there means none, and
              so does `add_bos_token: false` unless the chat template writes it. Where neither file names one: what the
              tokenizer's post-processor puts first, else what the model itself holds.
    eos set   the union of what `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and
              `config.json` say (ids or tokens, one or several), and of the token by which the chat template ends an
              assistant's turn. First, and so what training appends, is the chat template's token, else the first in the
              order of the files above.
    padding   the named pad token, else the id of `generation_config.json` or `config.json`, else the first EOS: it
              only fills arrays.

An id of a model's config that is an ordinary piece of text is a leftover of another vocabulary and is left out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from etils import epath

from pit_jax.core.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
COPIED = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, CHAT_TEMPLATE)
"""Files that belong to a tokenizer whatever its kind, and are kept word for word."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_log = logging.getLogger(__name__)


class Vocabulary(Protocol):
    """What deciding special tokens needs of a tokenizer."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None where there is none."""
        ...

    def is_text(self, token_id: int) -> bool:
        """Return whether an id is an ordinary piece of text, or no id of this tokenizer at all."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids with a role; `eos_ids` is the set that ends a response, its first is what training appends."""

    bos_id: int | None
    pad_id: int
    eos_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """What the tokenizer's model holds by itself, for what no file names."""

    bos_id: int | None = None
    pad_id: int | None = None
    eos_id: int | None = None


class Facts:
    """The small JSON files of a tokenizer's directory.

    Args:
      files: their content by name; missing ones say nothing.
      where: the directory, for errors.
    Raises:
      DataError: a file is not a JSON object.
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self.where = where
        self.config = _object(files, TOKENIZER_CONFIG, where)
        self.special_map = _object(files, SPECIAL_TOKENS_MAP, where)
        self.added = _object(files, ADDED_TOKENS, where)
        self.generation = _object(files, GENERATION_CONFIG, where)
        self.model = _object(files, MODEL_CONFIG, where)

    def named(self) -> dict[str, str]:
        """Return the special tokens by role ("bos_token", ...), as chat templates read them."""
        return {role: token for role in _NAMED if (token := self.token(role)) is not None}

    def token(self, role: str) -> str | None:
        """Return the token of a role; `tokenizer_config.json` wins, also when it says null."""
        for file in (self.config, self.special_map):
            if role in file:
                return _content(file[role])
        return None

    def says(self, role: str) -> bool:
        """Return whether a file of the tokenizer speaks of a role, null included."""
        return role in self.config or role in self.special_map

    def special(self) -> dict[str, None]:
        """Return every token that a file calls special beyond the roles, in order."""
        found: dict[str, None] = {}
        for file in (self.config, self.special_map):
            for field in ("additional_special_tokens", "extra_special_tokens"):
                value = file.get(field) or ()
                items = value.values() if isinstance(value, Mapping) else value
                found |= {token: None for item in items if (token := _content(item)) is not None}
        return found

    def added_tokens(self) -> dict[int, Mapping[str, Any]]:
        """Return `added_tokens_decoder` of `tokenizer_config.json`, and `added_tokens.json`: id to description."""
        listed: dict[int, Mapping[str, Any]] = {int(i): {"content": token} for token, i in self.added.items()}
        for i, token in (self.config.get("added_tokens_decoder") or {}).items():
            listed[int(i)] = token if isinstance(token, Mapping) else {"content": str(token)}
        return dict(sorted(listed.items()))

    def decide(
        self, vocabulary: Vocabulary, defaults: ModelDefaults, *, close: int | None, opens_with_bos: bool
    ) -> SpecialTokens:
        """Return the special ids, by the rules of this module.

        Args:
          vocabulary: of the tokenizer.
          defaults: what its model holds by itself.
          close: the id by which the chat template ends an assistant's turn.
          opens_with_bos: whether the chat template writes BOS.
        Raises:
          DataError: nothing ends a response, or a named token is not in the vocabulary.
        """
        eos = dict.fromkeys([close] if close is not None else [])
        for role_id in (*self._named_ids("eos_token", vocabulary), *self._config_ids("eos_token_id", vocabulary)):
            eos[role_id] = None
        if not eos and defaults.eos_id is not None:
            eos[defaults.eos_id] = None
        if not eos:
            raise DataError(
                f"{self.where}: no file names a token that ends a response. Set eos_token in {TOKENIZER_CONFIG}, or "
                f"eos_token_id in {GENERATION_CONFIG}."
            )
        pads = [*self._named_ids("pad_token", vocabulary), *self._config_ids("pad_token_id", vocabulary)]
        pad = next(iter(pads), defaults.pad_id)
        eos_ids = tuple(eos)
        return SpecialTokens(
            bos_id=self._bos(vocabulary, defaults, opens_with_bos),
            pad_id=eos_ids[0] if pad is None else pad,
            eos_ids=eos_ids,
        )

    def _bos(self, vocabulary: Vocabulary, defaults: ModelDefaults, opens_with_bos: bool) -> int | None:
        if self.config.get("add_bos_token") is False and not opens_with_bos:
            return None
        if self.says("bos_token"):
            return next(self._named_ids("bos_token", vocabulary), None)
        if defaults.bos_id is not None or self.config or self.special_map:
            return defaults.bos_id
        return next(self._config_ids("bos_token_id", vocabulary), None)

    def _named_ids(self, role: str, vocabulary: Vocabulary) -> Iterator[int]:
        files = (self.config, self.special_map) if role == "eos_token" else ({role: self.token(role)},)
        for file in files:
            token = _content(file.get(role))
            if token is None:
                continue
            token_id = vocabulary.token_id(token)
            if token_id is None:
                raise DataError(
                    f"{self.where}: {role} = {token!r} must be a token of the vocabulary. Correct {TOKENIZER_CONFIG}."
                )
            yield token_id

    def _config_ids(self, field: str, vocabulary: Vocabulary) -> Iterator[int]:
        inner = self.model.get("text_config")
        for name, file in (
            (GENERATION_CONFIG, self.generation),
            (MODEL_CONFIG, self.model),
            (f"text_config of {MODEL_CONFIG}", inner if isinstance(inner, Mapping) else {}),
        ):
            value = file.get(field)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is None or token_id == -1:
                    continue
                if isinstance(token_id, bool) or not isinstance(token_id, int):
                    raise DataError(
                        f"{self.where}: {field} of {name} is {value!r}, but must be an id or a list of ids. Correct it."
                    )
                if vocabulary.is_text(token_id):
                    message = "%s: %s = %d of %s is no special token of this tokenizer, and was left out"
                    _log.warning(message, self.where, field, token_id, name)
                    continue
                yield token_id


def read_files(folder: epath.Path, *names: str) -> dict[str, bytes]:
    """Return the content of those files of a directory that exist, among `names` and all that say special tokens."""
    wanted = dict.fromkeys((*names, *COPIED, GENERATION_CONFIG, MODEL_CONFIG))
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).exists()}


def kept_files(files: Mapping[str, bytes], special: SpecialTokens) -> dict[str, bytes]:
    """Return the files a copy of a tokenizer consists of.

    The model's `config.json` is not among them; what it says about special tokens is put into
    `generation_config.json`, so that the copy has the same ones.
    """
    generation = _object(files, GENERATION_CONFIG, GENERATION_CONFIG)
    eos = list(special.eos_ids)
    said = {"bos_token_id": special.bos_id, "pad_token_id": special.pad_id}
    said |= {"eos_token_id": eos if len(eos) > 1 else eos[0]}
    generation |= {field: value for field, value in said.items() if value is not None}
    kept = {name: content for name, content in files.items() if name not in (GENERATION_CONFIG, MODEL_CONFIG)}
    return kept | {GENERATION_CONFIG: (json.dumps(generation, indent=2) + "\n").encode()}


def _content(token: object) -> str | None:
    """Return the text of a token, which files write as text or as an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: {name} is not JSON ({error}). Copy it again from the checkpoint.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {name} must hold a JSON object, not {type(value).__name__}. Copy it again.")
    return value
