"""`pit-jax improve` without a file: prompts that are typed at a terminal, or piped, a line each."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import re
import select
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from pit_jax.core.errors import ConfigError, DataError, PitError
from pit_jax.data.readers import Line, ReadConfig, ReadReport, refuse
from pit_jax.sharding import processes
from pit_jax.stages.improve import Draft, Request, Session
from pit_jax.stages.improve_output import Output, Row, open_output

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 16
_RED, _GREEN, _PLAIN = "\x1b[31;9m", "\x1b[32m", "\x1b[0m"


def improve_typed(request: Request) -> None:
    """Improve prompts from standard input, a line each, to which the run's policy writes the responses.

    At a terminal this is a conversation: a prompt, optionally a draft, then the original and the improved response with
    their difference, until Ctrl-D. Otherwise rows as of `improve_file` are written as soon as they are there; lines
    that are there at the same time are improved together.

    Raises:
      CheckpointError: the directory has no improver.
      ConfigError: there are several hosts, which do not share a standard input.
      DataError: there is no line, a line is bad, or the output was begun by another command.
    """
    if processes.count() > 1:
        raise ConfigError("Prompts cannot be typed or piped to several hosts. Give all of them --input=FILE.")
    talk = sys.stdin.isatty() and sys.stdout.isatty()
    session = Session(request, request.candidates if talk else None)
    with contextlib.closing(open_output(request.output, session.settings())) as output:
        if talk:
            _converse(session, output, keep=request.output is not None)
        else:
            _answer_lines(session, output)


def _answer_lines(session: Session, output: Output) -> None:
    """Answer piped lines, a portion at a time."""
    left, report = output.begin(), ReadReport()
    count = 0
    lines = Lines(sys.stdin.fileno())
    while portion := lines.take(session.portion):
        drafts, bad = _drafts(portion, session, report)
        begun, drafts = drafts[: max(0, len(left) - count)], drafts[max(0, len(left) - count) :]
        for number, draft in enumerate(begun, start=count):
            if not draft.made(left[number]):
                raise output.other(f"row {number + 1} is of another prompt than the input's")
        session.skip(begun)
        if drafts:
            output.add(session.rows(drafts))
        if bad is not None:
            raise bad
        count += len(begun) + len(drafts)
    if report.bad_count:
        _LOG.warning("%s: %s", report.summary(), "; ".join(report.bad))
    if count < len(left):
        raise output.other(f"it has {len(left)} rows, and the input only {count} lines")
    if not count:
        raise DataError("Standard input has no line to improve. Pipe prompts, a line each, or give --input=FILE.")
    output.finish()


def _drafts(lines: Sequence[Line], session: Session, report: ReadReport) -> tuple[list[Draft], DataError | None]:
    """Return the drafts of lines, up to a bad one where that is to stop, with its error."""
    config = ReadConfig(on_bad_record=session.request.on_bad_record)
    drafts: list[Draft] = []
    for line in lines:
        try:
            if line.problem:
                raise DataError(line.problem)
            drafts.append(session.draft({"prompt": line.text}))
        except PitError as error:
            try:
                refuse(line, str(error), config, report)
            except DataError as bad:
                return drafts, bad
            continue
        report.records += 1
    return drafts, None


class Lines:
    """Lines of a file descriptor, as they come; empty ones are left out.

    Args:
      descriptor: of a pipe, a terminal or a file.
      most_bytes: of a line; a longer one is an error.
    """

    def __init__(self, descriptor: int, most_bytes: int = ReadConfig().max_line_bytes) -> None:
        self._descriptor, self._most_bytes = descriptor, most_bytes
        self._rest, self._ended, self._number = b"", False, 0
        self._ready: list[Line] = []

    def take(self, most: int) -> list[Line]:
        """Wait for a line, and return it with those that are there already, `most` at most; none at the end.

        Raises:
          DataError: a line is too long to be one.
        """
        while not self._ended and len(self._ready) < most and (not self._ready or self._is_there()):
            self._read()
        taken, self._ready = self._ready[:most], self._ready[most:]
        return taken

    def _is_there(self) -> bool:
        return bool(select.select([self._descriptor], [], [], 0.0)[0])

    def _read(self) -> None:
        data = os.read(self._descriptor, _CHUNK)
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended and self._rest:
            lines, self._rest = [self._rest], b""
        if len(self._rest) > self._most_bytes:
            raise DataError(
                f"standard input:{self._number + len(lines) + 1}: the line has more than {self._most_bytes} bytes. "
                "Is this a text? Give prompts, a line each."
            )
        for line in lines:
            self._number += 1
            found = _line(f"standard input:{self._number}", line)
            if found.problem or found.text.strip():
                self._ready.append(found)


def _line(place: str, data: bytes) -> Line:
    try:
        return Line(place, data.decode("utf-8-sig").rstrip("\r"))
    except UnicodeDecodeError as error:
        return Line(place, "", f"is not UTF-8 (byte {error.start + 1} of the line). Convert the input.")


def _converse(session: Session, output: Output, *, keep: bool) -> None:
    """Improve what is typed until Ctrl-D; rows are kept where there is a file for them."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives `input` a history and the usual keys
    left = output.begin() if keep else []
    # These were typed before an interruption: the numbers of new drafts, and so their samples, go on after them.
    session.skip([Draft(given=row["prompt"], text="", response=None) for row in left])
    place = session.improver.artifact.directory
    _LOG.info("%s improves what you type. Enter alone lets the policy write the draft; Ctrl-D ends.", place)
    colour = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    while (draft := _ask(session)) is not None:
        try:
            [row] = session.rows([draft])
        except DataError as error:
            print(f"{error}", file=sys.stderr, flush=True)
            continue
        print(shown(row, colour=colour), flush=True)
        if keep:
            output.add([row])
            left.append(row)
    print()
    if keep and left:
        output.finish()


def _ask(session: Session) -> Draft | None:
    """Return the next draft that is typed, None at the end; what cannot be used is said, and asked for again."""
    while True:
        try:
            prompt = input("prompt> ")
            if not prompt.strip():
                continue
            response = input("draft > ")
            return session.draft({"prompt": prompt} | ({"response": response} if response.strip() else {}))
        except EOFError:
            return None
        except (PitError, UnicodeDecodeError) as error:
            print(f"{error}", file=sys.stderr, flush=True)


def shown(row: Row, *, colour: bool) -> str:
    """Return a row for people: the original, the improved response with what has changed, and why."""
    steps = row["steps"]
    taken = sum(step["accepted"] for step in steps)
    why = f"{taken} of {len(steps)} steps taken" + (
        f", r_gap {_gap(steps[-1])}" if steps[-1]["gap"] is not None else ""
    )
    text = word_diff(row["response"], row["improved"], colour=colour) if row["changed"] else "(kept)"
    return f"original: {printable(row['response'])}\nimproved: {text}\n          {why}\n"


def _gap(step: dict[str, Any]) -> str:
    """Return how far above its own zero the last proposal came."""
    return (
        f"{step['gap'] - step['zero']:+.2f} over the present one" if step["zero"] is not None else f"{step['gap']:.2f}"
    )


def word_diff(old: str, new: str, *, colour: bool) -> str:
    """Return the new text with the words that were taken out of the old one, and those that were put in, marked.

    Without colour as [-taken out-] and {+put in+}. White space is the new text's.
    """
    removed, added = ((_RED, _PLAIN), (_GREEN, _PLAIN)) if colour else (("[-", "-]"), ("{+", "+}"))
    before, after = (re.findall(r"\S+\s*|^\s+", printable(text)) for text in (old, new))
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in before], [w.strip() for w in after], autojunk=False)
    text = ""
    for kind, i, j, k, m in matcher.get_opcodes():
        changes = ((before[i:j], removed), (after[k:m], added)) if kind != "equal" else ((after[k:m], ("", "")),)
        for words, (opening, closing) in changes:
            piece = "".join(words)
            if piece.strip():
                # The last word of a text has no space behind it, and other words may come to stand there.
                text += " " if text and not text[-1].isspace() else ""
                text += f"{opening}{piece.rstrip()}{closing}{piece[len(piece.rstrip()) :]}"
    return text.rstrip()


def printable(text: str) -> str:
    """Return a text without control characters, by which a model's words could change the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)
