"""People as judges: packs of blinded, shuffled questions to hand out, and the key that tells who wrote what.

write_pack(questions, Pack(annotators=("ann", "bob"), overlap=0.2, seed=1), "pack", key="key.json")
people = annotation_votes.read_votes("key.json", ["votes_ann.json", "votes_bob.csv"])
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from pit_jax.core.errors import DataError, invalid
from pit_jax.evaluation import annotation_page
from pit_jax.evaluation.pairwise import Question
from pit_jax.io import files

_LOG = logging.getLogger(__name__)
VOTES_FORMAT = "pit_jax.votes.1"
KEY_FORMAT = "pit_jax.annotation-key.1"
COLUMNS = ("annotator", "id", "prompt", "left", "right", "vote")
# A spreadsheet takes a cell that begins with one of these for a formula, and hides an apostrophe before it.
_FORMULA = re.compile(r"^[=+\-@\t\r']")
_SHEET_CELL = 32_767


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """Who is asked what.

    annotators: names, also of their files. overlap: share of the questions that everyone gets, for agreement; the
    rest are divided among them. seed: of the division, of each one's order, and of the sides.
    """

    annotators: tuple[str, ...]
    seed: int
    overlap: float = 1.0
    title: str = "Which response is better?"
    instructions: str = (
        "Read the prompt and both responses, then choose. Judge how well each answers the prompt: is it right, "
        "helpful and harmless? A longer response is not better for its length."
    )

    def __post_init__(self) -> None:
        """Check the names and the share."""
        object.__setattr__(self, "annotators", tuple(self.annotators))
        if not self.annotators or len(set(self.annotators)) < len(self.annotators):
            raise invalid("Pack.annotators", self.annotators, "name at least one person, each once", "Correct it.")
        for name in self.annotators:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
                raise invalid("Pack.annotators", name, "be letters, digits, _ and - (it names a file)", "Rename it.")
        if not 0 <= self.overlap <= 1:
            raise invalid("Pack.overlap", self.overlap, "lie in [0, 1]", "1 gives every question to everyone.")


def write_pack(
    questions: Sequence[Question], pack: Pack, directory: epath.PathLike, *, key: epath.PathLike
) -> list[epath.Path]:
    """Write a page and a CSV file for each annotator into `directory`, and the key elsewhere; return the pages' paths.

    Each annotator gets an own order, and an own half of the questions with the responses exchanged. The files say
    nothing of who wrote what; only the key does. Identical responses are ties that nobody is asked about.

    Raises:
      DataError: there is nothing to ask, a text is no Unicode, or `key` lies in `directory` or is another pack's.
    """
    target, secret = epath.Path(directory), epath.Path(key)
    different = [i for i, question in enumerate(questions) if question.first != question.second]
    if not different:
        raise DataError(f"There is nothing to ask: {len(questions)} questions, none with two different responses.")
    for number, question in enumerate(questions, 1):
        _check_text(number, question)
    if target.resolve() in secret.resolve().parents:
        raise DataError(f"The key {secret} must not lie in {target}, which is handed out. Put it elsewhere.")
    sheets = {name: _sheet(name, order, questions, pack) for name, order in _divide(different, pack).items()}
    content = {
        "format": KEY_FORMAT,
        "pack": {**dataclasses.asdict(pack), "annotators": list(pack.annotators)},
        "questions": [list(question) for question in questions],
        "sheets": {
            name: [[row["id"], row["question"], row["swapped"]] for row in rows] for name, rows in sheets.items()
        },
    }
    content["sha256"] = files.json_hash(content)
    if secret.exists() and files.read_json(secret) != content:
        raise DataError(
            f"{secret} is the key of another pack. Without it, votes on that pack are lost: use a new path."
        )
    files.write_text(secret, json.dumps(content) + "\n")
    return [_write_sheet(target, name, rows, pack) for name, rows in sheets.items()]


def _check_text(number: int, question: Question) -> None:
    try:
        "".join(question).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Question {number} holds half of a character ({error.object[error.start]!r}), which no file can hold. "
            "Remove it."
        ) from None


def _divide(different: Sequence[int], pack: Pack) -> dict[str, list[int]]:
    """Return each annotator's questions in the order they are shown."""
    order = np.random.default_rng([pack.seed, 0]).permutation(different).tolist()
    shared = round(pack.overlap * len(order))
    people = len(pack.annotators)
    own = {name: order[:shared] + order[shared + i :: people] for i, name in enumerate(pack.annotators)}
    return {
        name: np.random.default_rng([pack.seed, 1, i]).permutation(part).tolist()
        for i, (name, part) in enumerate(own.items())
    }


def _sheet(name: str, order: Sequence[int], questions: Sequence[Question], pack: Pack) -> list[dict[str, Any]]:
    """Return an annotator's rows; exactly half of them (rounded down) are swapped."""
    rng = np.random.default_rng([pack.seed, 2, pack.annotators.index(name)])
    swaps = rng.permutation(np.arange(len(order)) % 2 == 1).tolist()
    rows = []
    for index, swapped in zip(order, swaps, strict=True):
        prompt, left, right = shown(questions[index], swapped)
        # Nothing about the question or its sides can be read from the id.
        secret = f"{pack.seed}/{name}/{index}/{prompt}/{left}/{right}"
        code = hashlib.sha256(secret.encode("utf-8")).hexdigest()[:12]
        rows.append({"id": code, "question": index, "swapped": swapped, "prompt": prompt, "left": left, "right": right})
    return rows


def shown(question: Question, swapped: bool) -> Question:
    """Return a question with its responses as they stand on the screen, left one first."""
    return question.swapped() if swapped else question


def _write_sheet(directory: epath.Path, name: str, rows: Sequence[Mapping[str, Any]], pack: Pack) -> epath.Path:
    items = [{field: row[field] for field in ("id", "prompt", "left", "right")} for row in rows]
    data = {"format": VOTES_FORMAT, "pack": pack_hash(items), "annotator": name, "items": items}
    path = directory / f"annotate_{name}.html"
    files.write_text(path, annotation_page.page(pack.title, pack.instructions, data))
    table = io.StringIO(newline="")
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for item in items:
        cells = [_guarded(text) for text in (name, item["id"], item["prompt"], item["left"], item["right"], "")]
        if max(map(len, cells)) > _SHEET_CELL:
            _LOG.warning("%s: item %s is longer than a spreadsheet's cell; use the page", name, item["id"])
        writer.writerow(cells)
    # The mark at the beginning tells spreadsheets that this is UTF-8.
    files.write_text(directory / f"annotate_{name}.csv", "\ufeff" + table.getvalue())
    return path


def pack_hash(items: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash by which an annotator's items are known: of their ids and texts, in the order shown."""
    return files.json_hash(items)


def _guarded(text: str) -> str:
    return "'" + text if _FORMULA.match(text) else text
