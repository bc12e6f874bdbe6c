"""Tokenizers: SentencePiece models and plain bytes, training the former, and loading tokenizers of every kind."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.hub import is_hub_name, locate
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer
from pit_jax.text.sentencepiece_files import T5_MODEL_FILE, Pieces, SentencePieceFiles
from pit_jax.text.special import TOKENIZER_CONFIG, Facts, ModelDefaults, read_files

METADATA_FILE = "tokenizer.json"
"""Also Hugging Face's name for another thing: ours has the key `kind`, theirs has not."""
MODEL_FILE = "tokenizer.model"
_PROTO: Any = sentencepiece_model_pb2  # generated code without types
_SPACE = "\u2581"  # how SentencePiece writes a space


class Tokenizer(Protocol):
    """Text to token ids and back.

    `encode` adds no special tokens. Every id of `eos_ids` ends a response; the first one is what training
    appends. `pad_id` only fills arrays (masks say what padding is), so it may be an id that also means something.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def pad_id(self) -> int:
        """Id that fills arrays on the right."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id that starts a prompt, if the tokenizer has one."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens have none."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content: equal for equal tokenizers wherever they are stored."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Write everything `load_tokenizer(directory)` needs."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens: 0 is padding, 1 ends a response, 2 is unknown (never produced), byte b is b + 3."""

    vocab_size = 259
    pad_id = 0
    bos_id = None
    eos_ids = (1,)
    _OFFSET = 3

    def encode(self, text: str) -> list[int]:
        """Return one id per byte."""
        return [byte + self._OFFSET for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 (a sample may be cut anywhere) become U+FFFD."""
        known = (int(i) - self._OFFSET for i in ids)
        return bytes(byte for byte in known if 0 <= byte < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """Return the same constant for every instance."""
        return "bytes-v1"

    def save(self, directory: epath.PathLike) -> None:
        """Write the metadata file; there is no model."""
        _write_metadata(epath.Path(directory), {"kind": "bytes"}, self)

    def files(self) -> dict[str, bytes]:
        """Return the configuration by which transformers makes the same tokenizer (ByT5's)."""
        tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0} | tokens
        return {TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


class SentencePieceTokenizer:
    """A SentencePiece model; pad, eos, bos and unk are the model's own.

    User-defined pieces are found in text wherever they stand. Two things differ from the bare library, both so
    that such a piece is one token: the empty word that SentencePiece puts before a text that starts with one is
    left out, and in a model of whole words they need no spaces around them. Text still comes back unchanged.

    Args:
      model: the serialised model, or the path of one.
      files: content of the files beside it that say more of its tokens (see `special.py`); with them the special
        tokens they name are recognised in text, T5's <extra_id_n> among them.
    Raises:
      DataError: there is no such file, it is no SentencePiece model, or nothing says what ends a response.
    """

    def __init__(self, model: bytes | epath.PathLike, files: Mapping[str, bytes] | None = None):
        """Load the model."""
        where = "the given bytes" if isinstance(model, bytes) else str(model)
        self._model = model if isinstance(model, bytes) else _read_model(epath.Path(model))
        self._processor, proto = _processor(self._model, where)
        processor = self._processor
        if processor.eos_id() < 0:
            raise DataError(
                f"{where}: the model has no end-of-sequence piece, so a response could never end. "
                "Train it with eos_id, for example with `pit-jax tokenizer`."
            )
        self.vocab_size: int = processor.vocab_size()
        self.unk_id: int = processor.unk_id()
        self.pad_id: int = processor.pad_id() if processor.pad_id() >= 0 else self.unk_id
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_ids: tuple[int, ...] = (processor.eos_id(),)
        kind = _PROTO.ModelProto.SentencePiece.USER_DEFINED
        self.special_pieces: dict[str, int] = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == kind}
        self._special_ids = frozenset(self.special_pieces.values())
        self._empty_word: int = processor.piece_to_id(_SPACE)
        self._whole_words = proto.trainer_spec.model_type == _PROTO.TrainerSpec.WORD
        longest_first = sorted(self.special_pieces, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self._beside: SentencePieceFiles | None = None
        if files is not None:
            name = MODEL_FILE if isinstance(model, bytes) else epath.Path(model).name
            self._beside = SentencePieceFiles(files, self._pieces(), name, where)
            self.vocab_size, special = self._beside.size, self._beside.special
            self.bos_id, self.pad_id, self.eos_ids = special.bos_id, special.pad_id, special.eos_ids
            self._model_name = name
            proto.normalizer_spec.add_dummy_prefix = False
            self._unspaced = _processor(proto.SerializeToString(), where)[0]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens."""
        if self._beside is not None:
            return self._encode_beside(text, self._beside)
        if self._whole_words and self._cut:
            return [i for section in self._cut.split(text) if section for i in self._encode_words(section)]
        ids = self._processor.encode(text)
        if len(ids) > 1 and ids[0] == self._empty_word and ids[1] in self._special_ids:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control pieces have none, ids beyond the vocabulary are unknown pieces."""
        if self._beside is not None:
            added = set(self._beside.added.values())
            ids = [int(i) for i in ids if int(i) not in added]
        size = self._processor.vocab_size()
        known = [int(i) if 0 <= i < size else self.unk_id for i in ids]
        if not self._whole_words:
            return self._processor.decode(known)
        text: list[str] = []
        start = 0
        for position, i in enumerate(known):
            if i in self._special_ids:
                text += [self._processor.decode(known[start:position]), self._processor.id_to_piece(i)]
                start = position + 1
        return "".join([*text, self._processor.decode(known[start:])])

    def fingerprint(self) -> str:
        """Return a hash of the model's bytes, and of what the files beside it say."""
        digest = hashlib.sha256(self._model)
        if self._beside is not None:
            template = self._beside.chat_template
            said = [self.bos_id, self.pad_id, self.eos_ids, sorted(self._beside.added.items())]
            digest.update(json.dumps([said, None if template is None else template.fingerprint()]).encode())
        return "sentencepiece-" + digest.hexdigest()[:16]

    def files(self) -> dict[str, bytes]:
        """Return the model and the files that say which of its tokens are special, by the names others look for."""
        if self._beside is not None:
            return self._beside.kept | {self._model_name: self._model}
        named = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0], "unk_token": self.unk_id}
        tokens = {role: self._processor.id_to_piece(i) for role, i in named.items() if i is not None}
        config = tokens | {"pad_token": self._processor.id_to_piece(self.pad_id)}
        return {MODEL_FILE: self._model, TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}

    def save(self, directory: epath.PathLike) -> None:
        """Write a copy of the model and the metadata file."""
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        name = MODEL_FILE
        if self._beside is not None:
            name = self._model_name
            for other, content in self._beside.kept.items():
                (folder / other).write_bytes(content)
        (folder / name).write_bytes(self._model)
        _write_metadata(folder, {"kind": "sentencepiece", "model": name}, self)

    def _pieces(self) -> Pieces:
        processor, unknown = self._processor, self.unk_id

        def find(token: str) -> int | None:
            found = processor.piece_to_id(token)
            return found if found != unknown or token == processor.id_to_piece(unknown) else None

        defaults = ModelDefaults(bos_id=self.bos_id, pad_id=self.pad_id, eos_id=self.eos_ids[0])
        return Pieces(size=processor.vocab_size(), find=find, defaults=defaults)

    def _encode_beside(self, text: str, beside: SentencePieceFiles) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in beside.pattern.finditer(text):
            ids += self._encode_section(text[start : match.start()], first=start == 0)
            ids.append(beside.added[match.group()])
            start = match.end()
        return ids + self._encode_section(text[start:], first=start == 0)

    def _encode_section(self, section: str, *, first: bool) -> list[int]:
        assert self._beside is not None
        processor = self._processor if first or self._beside.space_after_special else self._unspaced
        return processor.encode(section) if section else []

    def _encode_words(self, section: str) -> list[int]:
        special = self.special_pieces.get(section)
        return self._processor.encode(section) if special is None else [special]


def load_tokenizer(spec: epath.PathLike) -> Tokenizer:
    """Return the tokenizer a setting names.

    Args:
      spec: `bytes`, the path of a SentencePiece .model file, or a directory: one that `save` wrote, a Hugging Face
        checkpoint (`tokenizer.json`, or a .model file with `tokenizer_config.json`), or one that holds exactly one
        .model file. Remote paths and names on the Hugging Face hub work.
    Raises:
      DataError: nothing usable is there, or the directory's model is not the one its metadata describe.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = locate(spec) if is_hub_name(os.fspath(spec)) else epath.Path(spec)
    if not path.exists():
        raise DataError(
            f"tokenizer = {str(spec)!r}: there is no such file. Give `bytes`, a .model file or a directory with one; "
            "`pit-jax tokenizer` trains one."
        )
    if not path.is_dir():
        return SentencePieceTokenizer(path)
    found = find_tokenizer(path)
    if found is None:
        raise DataError(
            f"tokenizer = {str(spec)!r}: the directory holds {len(list(path.glob('*.model')))} .model files and no "
            f"{METADATA_FILE}. Name the .model file itself."
        )
    return found


def find_tokenizer(directory: epath.PathLike) -> Tokenizer | None:
    """Return the tokenizer of a directory, None where it has none, or several .model files of unknown names.

    Raises:
      DataError: there is one, but it is broken.
    """
    folder = epath.Path(directory)
    if (folder / METADATA_FILE).exists():
        return _load_saved(folder) if _is_ours(folder) else HuggingFaceTokenizer.read(folder)
    models = [folder / name for name in (T5_MODEL_FILE, MODEL_FILE) if (folder / name).exists()]
    models = models or sorted(folder.glob("*.model"))
    if not models and (folder / TOKENIZER_CONFIG).exists():
        return _without_model(folder)
    return SentencePieceTokenizer(models[0], _beside(folder, models[0].name)) if len(models) == 1 else None


def tokenizer_files(tokenizer: Tokenizer | epath.PathLike) -> dict[str, bytes]:
    """Return the files, by name, from which transformers or vLLM load a tokenizer, or that of a directory.

    Raises:
      DataError: it has no form that other software reads.
    """
    found = load_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
    if isinstance(found, HuggingFaceTokenizer | SentencePieceTokenizer | ByteTokenizer):
        return found.files()
    raise DataError(f"{type(found).__name__} has no files that other software reads. Export without a tokenizer.")


def _beside(folder: epath.Path, model: str) -> dict[str, bytes] | None:
    """Return the files beside a model; None if there are none, when the model alone says everything."""
    files = read_files(folder)
    return files if files or model == T5_MODEL_FILE else None


def _without_model(folder: epath.Path) -> Tokenizer:
    """Return the tokenizer of a configuration that stands alone: ByT5's needs no other file."""
    name = Facts(read_files(folder), str(folder)).config.get("tokenizer_class")
    if name in ("ByT5Tokenizer", "ByT5TokenizerFast"):
        return ByteTokenizer()
    raise DataError(
        f"{folder}: {TOKENIZER_CONFIG} describes a tokenizer ({name}), but there is neither {METADATA_FILE} nor a "
        ".model file. Load it with transformers and save it again, which writes tokenizer.json."
    )


def _is_ours(folder: epath.Path) -> bool:
    """Return whether `tokenizer.json` describes a directory that `save` wrote, rather than being a tokenizer itself."""
    try:
        content = json.loads((folder / METADATA_FILE).read_bytes())
    except ValueError as error:
        raise DataError(
            f"{folder / METADATA_FILE}: is no tokenizer description ({error!r}). Name the .model file itself."
        ) from error
    return not (isinstance(content, dict) and "model" in content and "kind" not in content)


def _load_saved(folder: epath.Path) -> Tokenizer:
    where = folder / METADATA_FILE
    try:
        metadata = json.loads(where.read_text())
        kind = metadata["kind"]
        expected = metadata["fingerprint"]
        model = folder / metadata["model"] if kind == "sentencepiece" else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: is no tokenizer description ({error!r}). Name the .model file itself.") from error
    if kind not in ("bytes", "sentencepiece"):
        raise DataError(f"{where}: kind = {kind!r} must be 'bytes' or 'sentencepiece'. Name the .model file itself.")
    tokenizer: Tokenizer = ByteTokenizer() if model is None else _saved_model(folder, model)
    if tokenizer.fingerprint() != expected:
        raise DataError(
            f"{folder}: the tokenizer is {tokenizer.fingerprint()}, but {METADATA_FILE} was written for {expected}. "
            "The model file was replaced: restore it, or save the new tokenizer in a directory of its own."
        )
    return tokenizer


def _saved_model(folder: epath.Path, model: epath.Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model, _beside(folder, model.name))


def _write_metadata(folder: epath.Path, content: dict[str, object], tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content |= {"fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}
    (folder / METADATA_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _processor(model: bytes, where: str) -> tuple[sentencepiece.SentencePieceProcessor, Any]:
    """Return a model ready for use, and what it consists of."""
    processor = sentencepiece.SentencePieceProcessor()
    proto = _PROTO.ModelProto()
    try:
        processor.LoadFromSerializedProto(model)
        proto.ParseFromString(model)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{where}: is no SentencePiece model ({error}). Give a .model file, or `bytes`.") from error
    return processor, proto


def _read_model(path: epath.Path) -> bytes:
    if not path.exists() or path.is_dir():
        raise DataError(f"{path}: there is no such tokenizer model. Give a SentencePiece .model file, or `bytes`.")
    return path.read_bytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceTraining:
    """How a SentencePiece vocabulary is trained; pad, eos and unk are always the ids 0, 1 and 2.

    Attributes:
      vocab_size: number of pieces; for model_type "word" at most so many (rarer words are then unknown).
      model_type: "bpe", "unigram", or "word": one piece per word, lossless for known words separated by single
        spaces.
      special_pieces: pieces that are never split, for templates or separators; they take the ids after unk.
      byte_fallback: write unknown characters as bytes, so that no text is unknown (bpe and unigram).
      bos: whether there is a piece <s> that starts a prompt.
      sentences: train on a random sample of so many lines, more than 100; 0 takes all.
      seed: of that sample.
    """

    vocab_size: int
    model_type: Literal["bpe", "unigram", "word"] = "bpe"
    special_pieces: tuple[str, ...] = ("\n",)
    byte_fallback: bool = True
    bos: bool = False
    sentences: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what the trainer would only report as an internal error."""
        name = type(self).__name__
        if self.model_type not in ("bpe", "unigram", "word"):
            raise invalid(f"{name}.model_type", self.model_type, "be bpe, unigram or word", "Choose one of them.")
        reserved = 3 + self.bos + len(self.special_pieces) + (256 if self.uses_bytes else 0)
        if self.vocab_size <= reserved:
            rule = f"be more than {reserved}, the number of special and byte pieces"
            raise invalid(f"{name}.vocab_size", self.vocab_size, rule, "Raise it, or set byte_fallback = False.")
        if len(set(self.special_pieces)) != len(self.special_pieces) or not all(self.special_pieces):
            raise invalid(f"{name}.special_pieces", self.special_pieces, "be different, not empty", "Mend the list.")
        taken = {"<pad>", "</s>", "<unk>", "<s>"} & set(self.special_pieces)
        if taken:
            raise invalid(f"{name}.special_pieces", self.special_pieces, f"not name {sorted(taken)}", "Rename them.")
        if self.sentences and self.sentences <= 100:
            rule = "be 0 (all) or more than 100"
            raise invalid(f"{name}.sentences", self.sentences, rule, "Use 0 for all lines.")

    @property
    def uses_bytes(self) -> bool:
        """Whether the vocabulary has the 256 byte pieces."""
        return self.byte_fallback and self.model_type != "word"


def train_sentencepiece(
    texts: Iterable[str], config: SentencePieceTraining, output: epath.PathLike
) -> SentencePieceTokenizer:
    """Train a SentencePiece vocabulary on `texts`, save it in the directory `output`, and return it.

    The same texts and config give the same bytes. Text comes back unchanged from decode(encode(text)), line
    breaks and runs of spaces included (for model_type "word" see there).

    Raises:
      DataError: there is no text, or too little of it for the vocabulary.
    """
    sentencepiece.set_random_generator_seed(config.seed)
    model = io.BytesIO()
    lines = _lines(texts, config.special_pieces)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, **_trainer_options(config)
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece could not train {config.vocab_size} pieces: {error}. "
            "Give more text, or lower SentencePieceTraining.vocab_size."
        ) from error
    tokenizer = SentencePieceTokenizer(_as_user_defined(model.getvalue(), config.special_pieces))
    tokenizer.save(output)
    return tokenizer


def _trainer_options(config: SentencePieceTraining) -> dict[str, Any]:
    whole_words = config.model_type == "word"
    return {
        "vocab_size": config.vocab_size,
        "model_type": config.model_type,
        "byte_fallback": config.uses_bytes,
        "hard_vocab_limit": not whole_words,
        # See _as_user_defined.
        "control_symbols" if whole_words else "user_defined_symbols": list(config.special_pieces),
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": 3 if config.bos else -1,
        # Text must come back unchanged; a word model has no piece for an empty word.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": whole_words,
        "character_coverage": 1.0,
        "input_sentence_size": config.sentences,
        "shuffle_input_sentence": config.sentences > 0,
        # The default would leave long lines out without a word.
        "max_sentence_length": 1 << 20,
        # The number of threads decides how sums are rounded, so it may not depend on the machine.
        "num_threads": 4,
        "minloglevel": 2,
    }


def _lines(texts: Iterable[str], special_pieces: Sequence[str]) -> Iterator[str]:
    # The trainer would take a special piece of a word model as part of a word.
    cut = re.compile("|".join(map(re.escape, ("\n", *special_pieces))))
    for text in texts:
        yield from (line for line in cut.split(text) if line.strip())


def _as_user_defined(model: bytes, special_pieces: Sequence[str]) -> bytes:
    """Mark the special pieces as user-defined.

    For word models the trainer would add a useless second piece, with a space, for each user-defined symbol, so
    they are trained as control symbols, which is a word model's only other way to reserve ids.
    """
    proto = _PROTO.ModelProto()
    proto.ParseFromString(model)
    for piece in proto.pieces:
        if piece.piece in special_pieces:
            piece.type = _PROTO.ModelProto.SentencePiece.USER_DEFINED
    return proto.SerializeToString(deterministic=True)
