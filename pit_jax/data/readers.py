"""Streaming readers of JSON Lines and text files: plain, .gz or .xz, globs, local or remote paths."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Literal

from etils import epath

from pit_jax.core.errors import DataError, invalid, nearest
from pit_jax.data.schema import Document, Record, content_hash, parse
from pit_jax.text.chat import ChatFormat
from pit_jax.text.chat_template import TemplateChat

OnBadRecord = Literal["fail", "skip"]
ByteStream = IO[bytes] | gzip.GzipFile | lzma.LZMAFile
Paths = epath.PathLike | Sequence[epath.PathLike]
_WILDCARD = re.compile(r"[*?\[]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How files are read.

    Attributes:
      on_bad_record: "fail" stops at the first line that cannot be used, "skip" counts it and goes on.
      max_line_bytes: a longer line is a bad record; it is never held in memory.
      chat: how prompts are written: a `ChatFormat` (words before each turn), or a `TemplateChat` (a model's own chat
        template).
    """

    on_bad_record: OnBadRecord = "fail"
    max_line_bytes: int = 10_000_000
    chat: ChatFormat | TemplateChat = ChatFormat()

    def __post_init__(self) -> None:
        """Check both settings."""
        if self.on_bad_record not in ("fail", "skip"):
            rule = "be 'fail' or 'skip'"
            raise invalid("ReadConfig.on_bad_record", self.on_bad_record, rule, "Choose one of them.")
        if self.max_line_bytes < 1:
            raise invalid("ReadConfig.max_line_bytes", self.max_line_bytes, "be at least 1", "10000000 is usual.")


@dataclasses.dataclass
class ReadReport:
    """What a reader met. Duplicates and contradictions are counted, not removed.

    Attributes:
      files, lines, records: numbers read so far; `records` are the good ones.
      bad: the first `MOST_SHOWN` unusable lines, each named by file and line.
      bad_count: number of all of them.
      duplicates: records whose prompt and replies occurred before.
      contradictions: records whose prompt and replies occurred before with the replies exchanged.
    """

    MOST_SHOWN = 20

    files: int = 0
    lines: int = 0
    records: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    bad_count: int = 0
    duplicates: int = 0
    contradictions: int = 0
    _seen: set[bytes] = dataclasses.field(default_factory=set, repr=False)

    def add_bad(self, message: str) -> None:
        """Count an unusable line."""
        self.bad_count += 1
        if len(self.bad) < self.MOST_SHOWN:
            self.bad.append(message)

    def add(self, record: Record) -> None:
        """Count a record."""
        self.records += 1
        key = bytes.fromhex(content_hash(record.prompt, record.chosen, record.rejected))
        self.duplicates += key in self._seen
        swapped = bytes.fromhex(content_hash(record.prompt, record.rejected, record.chosen))
        self.contradictions += swapped in self._seen and swapped != key
        self._seen.add(key)

    def summary(self) -> str:
        """Return one line of counts."""
        counts = collections.Counter(
            {"bad lines": self.bad_count, "duplicates": self.duplicates, "contradictions": self.contradictions}
        )
        notes = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"{self.records} records in {self.files} file(s)" + (f"; {notes}" if notes else "")


def find_files(paths: Paths) -> list[epath.Path]:
    """Return the files that paths and globs name, each glob's in alphabetical order.

    Raises:
      DataError: a path does not exist or is a directory, or a glob matches nothing.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    files = [file for path in several for file in _expand(str(path))]
    if not files:
        raise DataError("No data file is given. Name at least one path or glob.")
    return files


def _expand(path: str) -> list[epath.Path]:
    wild = _WILDCARD.search(path)
    if wild:
        folder, slash, _ = path[: wild.start()].rpartition("/")
        root = epath.Path(folder + slash or ".")
        files = sorted(file for file in root.glob(path[len(folder + slash) :]) if not file.is_dir())
        if not files:
            raise DataError(f"{path}: no file matches. Check the pattern; quote it in a shell.")
        return files
    file = epath.Path(path)
    if file.is_dir():
        raise DataError(f"{path}: is a directory. Name its files, for example {path.rstrip('/')}/*.jsonl")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{path}: there is no such file.{nearest(file.name, siblings)} Check the path.")
    return [file]


@contextlib.contextmanager
def _open(file: epath.Path) -> Iterator[ByteStream]:
    """Open a file for reading bytes, decompressed as its name says."""
    with contextlib.ExitStack() as stack:
        stream: ByteStream = stack.enter_context(file.open("rb"))
        if file.suffix == ".gz":
            stream = stack.enter_context(gzip.open(stream))
        elif file.suffix == ".xz":
            stream = stack.enter_context(lzma.open(stream))
        yield stream


@dataclasses.dataclass(frozen=True)
class Line:
    """One line and its place; where it cannot be used, `problem` says why."""

    place: str
    text: str
    problem: str = ""


def _lines(file: epath.Path, max_line_bytes: int) -> Iterator[Line]:
    number = 0
    try:
        with _open(file) as stream:
            while data := stream.readline(max_line_bytes + 1):
                number += 1
                place = f"{file}:{number}"
                if len(data) > max_line_bytes and not data.endswith(b"\n"):
                    while data and not data.endswith(b"\n"):
                        data = stream.readline(max_line_bytes)
                    problem = f"the line has more than {max_line_bytes} bytes. Split it, or raise max_line_bytes."
                    yield Line(place, "", problem)
                    continue
                yield _decode(place, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file}: the compressed file breaks off or is damaged after line {number}: {error}."
        ) from error


def _decode(place: str, data: bytes) -> Line:
    try:
        text = data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start + 1} of the line is 0x{data[error.start]:02x}). Convert the file."
        return Line(place, "", problem)
    return Line(place, text)


def _json_object(line: Line) -> dict[str, object]:
    if line.problem:
        raise DataError(line.problem)
    if not line.text.strip():
        raise DataError("the line is empty. Remove it.")
    try:
        value = json.loads(line.text)
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON ({error.msg}, column {error.colno}). Write one object per line.") from error
    except RecursionError as error:
        raise DataError("is nested too deeply. Write one flat object per line.") from error
    if not isinstance(value, dict):
        raise DataError(f"must be a JSON object, not {type(value).__name__}. Write one object per line.")
    return value


def refuse(line: Line, problem: str, config: ReadConfig, report: ReadReport) -> None:
    """Count a bad line, or stop at it."""
    message = f"{line.place}: {problem}"
    if config.on_bad_record == "fail":
        raise DataError(
            f"{message} To leave such lines out, use --on-bad-record=skip, or in a recipe "
            "readers.ReadConfig.on_bad_record = 'skip'."
        )
    report.add_bad(message)


def read_jsonl(paths: Paths, config: ReadConfig, report: ReadReport) -> Iterator[Record]:
    """Yield the preference records of JSON Lines files, in order; `report` is filled on the way.

    Raises:
      DataError: a file is missing or damaged; with `on_bad_record="fail"` also the first line that is not UTF-8,
        not a JSON object, empty, enormous, or no record (see `schema.parse`), named by file and line.
    """
    for line, raw in read_objects(paths, config, report):
        try:
            record = parse(raw, config.chat)
        except DataError as error:
            refuse(line, str(error), config, report)
            continue
        report.add(record)
        yield record


def read_objects(paths: Paths, config: ReadConfig, report: ReadReport) -> Iterator[tuple[Line, dict[str, object]]]:
    """Yield the JSON object of every line, with its place, whatever its fields are; errors as of `read_jsonl`."""
    for file in find_files(paths):
        report.files += 1
        for line in _lines(file, config.max_line_bytes):
            report.lines += 1
            try:
                raw = _json_object(line)
            except DataError as error:
                refuse(line, str(error), config, report)
                continue
            yield line, raw


def read_documents(
    paths: Paths, config: ReadConfig, report: ReadReport, *, unit: Literal["line", "file"] = "line"
) -> Iterator[Document]:
    """Yield texts for language-model pre-training.

    Files named .jsonl or .json (compressed or not) hold objects with a field `text`, and optionally `id` and
    `group`; all others are plain text, in which a document is a line that is not empty, or the whole file
    (`unit`). Errors as of `read_jsonl`.
    """
    for file in find_files(paths):
        if {".jsonl", ".json"} & set(file.suffixes):
            for line, raw in read_objects(file, config, report):
                try:
                    document = _document(raw)
                except DataError as error:
                    refuse(line, str(error), config, report)
                    continue
                report.records += 1
                yield document
        else:
            for text in _plain_texts(file, config, report, unit):
                report.records += 1
                yield _document({"text": text})


def _plain_texts(file: epath.Path, config: ReadConfig, report: ReadReport, unit: str) -> Iterator[str]:
    report.files += 1
    if unit == "file":
        with _open(file) as stream:
            lines: Iterable[Line] = [_decode(str(file), stream.read())]
    else:
        lines = _lines(file, config.max_line_bytes)
    for line in lines:
        report.lines += 1
        if line.problem:
            refuse(line, line.problem, config, report)
        elif line.text.strip():
            yield line.text


def _document(raw: Mapping[str, object]) -> Document:
    text = raw.get("text")
    if not isinstance(text, str):
        kind = "is missing" if text is None else f"must be a text, not {type(text).__name__}"
        raise DataError(f"field 'text' {kind}. A document needs it.")
    if not text.strip():
        raise DataError("field 'text' is empty. Remove the document.")
    identity = str(raw.get("id") or content_hash(text))
    return Document(id=identity, group=str(raw.get("group") or identity), text=text)
