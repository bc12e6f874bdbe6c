"""Files of the SRT stages: prompts of a fold, JSON Lines that process 0 writes once, and SRT's records."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from pit_jax.core.errors import DataError
from pit_jax.data.folds import Fold
from pit_jax.data.open import open_records
from pit_jax.data.readers import ReadConfig, ReadReport, read_objects, refuse
from pit_jax.io import files
from pit_jax.sharding import processes
from pit_jax.srt.critique import HIGHEST, LOWEST, Critique
from pit_jax.stages import together
from pit_jax.stages.run import Run

_LOG = logging.getLogger(__name__)
RECORDS = "records.jsonl"
"""What SRT is trained on: an object a line, see `SrtRecord`."""
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of the training data: its text, its ids without template, and the group by which data are split."""

    text: str
    ids: tuple[int, ...]
    group: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SrtRecord:
    """A prompt, the base model's response, and the critique of it."""

    group: str
    prompt: str
    response: str
    critique: Critique


def fold_prompts(run: Run, fold: Fold | None, limit: int) -> list[Prompt]:
    """Return the first `limit` distinct prompts of a fold of the training data; None takes all folds.

    Raises:
      DataError: there are none.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    for record in open_records(run.experiment.data, split="train", fold=fold):
        ids = run.codec.prompt_ids(record.prompt)
        if ids:
            found.setdefault(ids, Prompt(text=record.prompt, ids=ids, group=record.group))
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"The fold {fold!r} of the training data has no prompt. Give more data, or another fold.")
    if len(found) < limit:
        _LOG.warning("only %d of %d prompts exist in the fold %s of the training data", len(found), limit, fold)
    return list(found.values())


def kept(path: epath.Path, name: str, make: Callable[[], Sequence[Row]]) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, which is made first where it is not there.

    Args:
      path: of the file, which appears whole or not at all.
      name: what it holds, for errors.
      make: returns the objects. All processes call it, process 0 writes.
    """
    if not processes.first(f"state of {name}", path.exists):
        rows = make()
        together.write(name, lambda: write_lines(path, rows), path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: epath.Path, rows: Sequence[Row]) -> None:
    """Write a JSON Lines file in one step."""
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def record_row(record: SrtRecord, scores: tuple[float, float]) -> Row:
    """Return the line of a record; `scores` are the independent ones of response and refinement."""
    return {
        "group": record.group,
        "prompt": record.prompt,
        "response": record.response,
        **dataclasses.asdict(record.critique),
        "response_score": scores[0],
        "refinement_score": scores[1],
    }


def read_records(path: epath.Path) -> list[SrtRecord]:
    """Return SRT's records from a file that `record_row` wrote, or another program in the same form.

    Raises:
      DataError: the file is missing or empty, or a line is no record; line and field are named.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file. Name a stage that writes {RECORDS}, and run it first.")
    # All lines are read, so that the error can say how many are bad; none is left out.
    config, report = ReadConfig(on_bad_record="skip"), ReadReport()
    found: list[SrtRecord] = []
    for line, row in read_objects(path, config, report):
        try:
            found.append(_record(row))
        except DataError as error:
            refuse(line, str(error), config, report)
    if report.bad_count:
        more = f" ({report.bad_count - 1} more lines are bad.)" if report.bad_count > 1 else ""
        raise DataError(f"{report.bad[0]}{more} Mend the file, or delete its stage's directory to make it anew.")
    if not found:
        raise DataError(f"{path}: there is no record in it. See the result of the stage that wrote it for why.")
    return found


def _record(row: Row) -> SrtRecord:
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not LOWEST <= score <= HIGHEST:
        raise DataError(f"score = {score!r} must be a number from {LOWEST:g} to {HIGHEST:g}.")
    prompt = _text(row, "prompt")
    return SrtRecord(
        group=_text(row, "group") if "group" in row else prompt,
        prompt=prompt,
        response=_text(row, "response"),
        critique=Critique(
            weaknesses=_text(row, "weaknesses"),
            suggestions=_text(row, "suggestions"),
            score=float(score),
            refinement=_text(row, "refinement"),
        ),
    )


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} = {value!r} must be a text that is not empty.")
    return value
