"""Votes of people on a pack of `annotation.write_pack`, checked against its key."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pit_jax.core.errors import DataError, nearest
from pit_jax.evaluation.annotation import COLUMNS, KEY_FORMAT, VOTES_FORMAT, pack_hash, shown
from pit_jax.evaluation.pairwise import Question
from pit_jax.evaluation.people import People
from pit_jax.io import files

_LOG = logging.getLogger(__name__)
# From the left response's side.
_SIDES = {"left": 1.0, "1": 1.0, "tie": 0.0, "2": 0.0, "right": -1.0, "3": -1.0}
_MOST_PROBLEMS = 10


class _Vote(NamedTuple):
    """A line of a file of votes, as it was found; pack is known on pages only, seconds too."""

    place: str
    annotator: str
    pack: str | None
    id: str
    vote: str
    texts: tuple[str, str, str]
    seconds: float


def read_votes(key: epath.PathLike, votes: Sequence[epath.PathLike]) -> People:
    """Return what people said, from the key and their files (JSON or CSV, in any mixture).

    Questions without a vote stay open, and are counted. The same vote twice counts once.

    Raises:
      DataError: the key was edited; a file is no file of votes; an annotator or id is not of this pack; a text differs
        from what was handed out; a vote is none; somebody voted differently on the same question. The first ten
        problems are listed.
    """
    ballots = _Ballots(_read_key(key))
    found = [vote for path in votes for vote in _read_file(epath.Path(path))]
    problems = [f"{vote.place}: {problem}" for vote in found if (problem := ballots.take(vote)) is not None]
    if problems:
        listed = "\n  ".join(problems[:_MOST_PROBLEMS])
        raise DataError(f"{len(problems)} votes cannot be used:\n  {listed}\nCorrect the files, then import all again.")
    people = ballots.people()
    for line in people.gaps():
        _LOG.warning("%s", line)
    return people


class _Ballots:
    """The questions of a key, and the votes on them taken so far."""

    def __init__(self, key: dict[str, Any]) -> None:
        self._questions = [Question(*texts) for texts in key["questions"]]
        self._names = list(key["sheets"])
        self._rows = {name: {row[0]: (row[1], row[2]) for row in rows} for name, rows in key["sheets"].items()}
        self._packs = {name: self._pack_hash(rows) for name, rows in key["sheets"].items()}
        shape = (len(self._questions), len(self._names))
        self._asked, self._swapped = np.zeros(shape, bool), np.zeros(shape, bool)
        for column, name in enumerate(self._names):
            for index, swapped in self._rows[name].values():
                self._asked[index, column], self._swapped[index, column] = True, swapped
        self._sides, self._seconds = np.full(shape, np.nan), np.full(shape, np.nan)
        self._places: dict[tuple[int, int], str] = {}
        self._repeated = 0

    def _pack_hash(self, rows: Sequence[Sequence[Any]]) -> str:
        items = []
        for code, index, swapped in rows:
            prompt, left, right = shown(self._questions[index], swapped)
            items.append({"id": code, "prompt": prompt, "left": left, "right": right})
        return pack_hash(items)

    def take(self, vote: _Vote) -> str | None:
        """Enter a vote; return what is wrong with it, or None."""
        problem = self._problem(vote)
        if problem is not None or not vote.vote:
            return problem
        cell = (self._rows[vote.annotator][vote.id][0], self._names.index(vote.annotator))
        side = _SIDES[vote.vote]
        if cell not in self._places:
            self._sides[cell], self._seconds[cell], self._places[cell] = side, vote.seconds, vote.place
        elif self._sides[cell] == side:
            self._repeated += 1
        else:
            return f"a second, different vote of {vote.annotator} on {vote.id}; the first is {self._places[cell]}"
        return None

    def _problem(self, vote: _Vote) -> str | None:
        """Return what is wrong with a vote by itself, or None."""
        if vote.annotator not in self._rows:
            return f"annotator {vote.annotator!r} is not of this pack.{nearest(vote.annotator, self._names)}"
        expected = self._packs[vote.annotator]
        if vote.pack is not None and vote.pack != expected:
            return f"the page belongs to another pack (hash {vote.pack[:12]}, this key has {expected[:12]})"
        if vote.id not in self._rows[vote.annotator]:
            return f"id {vote.id!r} is not one of {vote.annotator}'s questions"
        if vote.vote and vote.vote not in _SIDES:
            return f"vote {vote.vote!r} must be left, right or tie (or 1, 3, 2), or empty"
        index, swapped = self._rows[vote.annotator][vote.id]
        there = shown(self._questions[index], swapped)
        for field, was, now in zip(("prompt", "left", "right"), there, vote.texts, strict=True):
            if _lines(was) != _lines(now):
                return f"the {field} of {vote.id} differs from what was handed out: the file was edited"
        return None

    def people(self) -> People:
        """Return all votes taken."""
        return People(
            questions=tuple(self._questions), annotators=tuple(self._names), asked=self._asked, sides=self._sides,
            outcomes=np.where(self._swapped, -self._sides, self._sides) + 0.0, seconds=self._seconds,
            repeated=self._repeated,
        )  # fmt: skip


def _lines(text: str) -> str:
    """Return a text with the line ends that spreadsheets change made alike."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_key(path: epath.PathLike) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != KEY_FORMAT:
        raise DataError(
            f"{path} is not a key of an annotation pack ({KEY_FORMAT}). Give the file that write_pack wrote."
        )
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != files.json_hash(rest):
        raise DataError(f"{path} was edited after it was written: its SHA-256 differs. Restore the original.")
    return content


def _read_file(path: epath.Path) -> list[_Vote]:
    if path.suffix.lower() == ".json":
        return _read_json(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    raise DataError(f"{path} must end in .json or .csv. Give the file that the page's download made, or the CSV file.")


def _read_json(path: epath.Path) -> list[_Vote]:
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != VOTES_FORMAT:
        raise DataError(f"{path} is not a file of votes ({VOTES_FORMAT}). Download it from the page again.")
    try:
        pack, annotator = str(content["pack"]), str(content["annotator"])
        return [
            _Vote(
                f"{path.name}: vote {number}", annotator, pack, str(row["id"]), str(row["vote"]).strip().lower(),
                (row["prompt"], row["left"], row["right"]), float(row["seconds"]),
            )
            for number, row in enumerate(content["votes"], 1)
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}). Download it from the page again."
        ) from None


def _read_csv(path: epath.Path) -> list[_Vote]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Check the path.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as 'CSV UTF-8'.") from None
    head = text.split("\n", 1)[0]
    # Spreadsheets of some countries write semicolons, or tabs.
    separator = max(",;\t", key=head.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error}. Save it again from the spreadsheet.") from None
    if not lines or [name.strip().lower() for name in lines[0]] != list(COLUMNS):
        raise DataError(f"{path} must begin with the columns {', '.join(COLUMNS)}. Restore the first line.")
    return [_csv_vote(path, number, cells) for number, cells in enumerate(lines[1:], 2) if any(map(str.strip, cells))]


def _csv_vote(path: epath.Path, number: int, cells: Sequence[str]) -> _Vote:
    if len(cells) != len(COLUMNS):
        raise DataError(f"{path}: record {number} has {len(cells)} cells instead of {len(COLUMNS)}. Restore the line.")
    annotator, code, prompt, left, right, vote = cells
    texts = (_plain(prompt), _plain(left), _plain(right))
    place = f"{path.name}: record {number}"
    return _Vote(place, _plain(annotator), None, _plain(code), vote.strip().lower(), texts, float("nan"))


def _plain(text: str) -> str:
    """Return a cell's text without its guard."""
    return text.removeprefix("'")
