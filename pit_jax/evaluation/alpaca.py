"""AlpacaEval 2.0's files and figures.

    model_outputs.json   [{"instruction": ..., "output": ..., "generator": ...}, ...]
    annotations.json     [{"instruction": ..., "output_1": ..., "generator_1": ..., "output_2": ..., "generator_2": ...,
                           "annotator": ..., "preference": 1.0 ... 2.0}, ...]

Output 1 is the baseline's, output 2 the candidate's. A preference of 1 means that the baseline wins, 2 the candidate,
1.5 (and 0 in old files) a draw, null no verdict; those between are the annotator's certainty.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import DataError
from pit_jax.evaluation import bias
from pit_jax.evaluation.bias import Calibration, LengthControl
from pit_jax.evaluation.pairwise import Question, Verdict, pair_up
from pit_jax.io import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """One system's outputs, in order; dataset is AlpacaEval's name of each instruction's origin, where given."""

    generator: str
    instructions: tuple[str, ...]
    outputs: tuple[str, ...]
    datasets: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotations:
    """One annotator's preferences between a baseline and a candidate.

    questions: first is the candidate's output, second the baseline's.
    preferences: 1 baseline ... 2 candidate, NaN without a verdict. raw: the annotator's own words, where given.
    """

    candidate: str
    baseline: str
    annotator: str
    questions: tuple[Question, ...]
    preferences: Float[np.ndarray, " n"]
    raw: tuple[str | None, ...]

    @property
    def outcomes(self) -> Float[np.ndarray, " n"]:
        """Outcomes of the candidate: -1 ... +1, NaN without a verdict."""
        return 2 * self.preferences - 3

    @property
    def length_difference(self) -> Float[np.ndarray, " n"]:
        """Candidate's length minus the baseline's, in characters (Unicode code points), as AlpacaEval counts."""
        return np.array([len(question.first) - len(question.second) for question in self.questions], np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinRate:
    """AlpacaEval's figures of a candidate; percent.

    win_rate: the mean preference. discrete_win_rate: wins with a draw as half.
    standard_error: of win_rate, over instructions. n_draws: preferences of exactly 1.5 (or 0).
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    avg_length: int


def read_outputs(path: epath.PathLike) -> Outputs:
    """Return a system's outputs.

    Raises:
      DataError: not a list of objects with texts `instruction`, `output` and one `generator`, or an empty one.
    """
    rows = _rows(path, ("instruction", "output", "generator"))
    (generator,) = _single(path, rows, ("generator",))
    return Outputs(
        generator=generator,
        instructions=tuple(row["instruction"] for row in rows),
        outputs=tuple(row["output"] for row in rows),
        datasets=tuple(row.get("dataset") for row in rows),
    )


def write_outputs(path: epath.PathLike, outputs: Outputs) -> None:
    """Write `model_outputs.json`, as `alpaca_eval --model_outputs` reads it."""
    rows = []
    columns = zip(outputs.instructions, outputs.outputs, outputs.datasets, strict=True)
    for instruction, output, dataset in columns:
        origin = {} if dataset is None else {"dataset": dataset}
        rows.append({**origin, "instruction": instruction, "output": output, "generator": outputs.generator})
    files.write_json(path, rows)


def questions(candidate: Outputs, baseline: Outputs) -> list[Question]:
    """Return what a judge is to be asked, in the candidate's order, the candidate's output first.

    Raises:
      DataError: an instruction is missing in one, or occurs more often in one than in the other.
    """
    sides = [list(zip(side.instructions, side.outputs, strict=True)) for side in (candidate, baseline)]
    return pair_up(sides[0], sides[1], names=(candidate.generator, baseline.generator))


def annotate(candidate: Outputs, baseline: Outputs, verdicts: Sequence[Verdict], *, annotator: str) -> Annotations:
    """Return a judge's verdicts on `questions(candidate, baseline)` as annotations."""
    asked = questions(candidate, baseline)
    if len(asked) != len(verdicts):
        raise DataError(f"{len(verdicts)} verdicts for {len(asked)} questions. Judge all of questions(...) in order.")
    return Annotations(
        candidate=candidate.generator,
        baseline=baseline.generator,
        annotator=annotator,
        questions=tuple(asked),
        preferences=np.array([1.5 + verdict.outcome / 2 for verdict in verdicts]),
        raw=tuple(verdict.reason or None for verdict in verdicts),
    )


def read_annotations(path: epath.PathLike) -> Annotations:
    """Return the annotations of one annotator, candidate and baseline.

    Raises:
      DataError: not such a file, several annotators or systems in one file, or a preference out of range.
    """
    texts = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
    rows = _rows(path, texts)
    baseline, candidate, annotator = _single(path, rows, ("generator_1", "generator_2", "annotator"))
    return Annotations(
        candidate=candidate,
        baseline=baseline,
        annotator=annotator,
        questions=tuple(Question(row["instruction"], row["output_2"], row["output_1"]) for row in rows),
        preferences=np.array([_preference(path, number, row.get("preference")) for number, row in enumerate(rows, 1)]),
        raw=tuple(_text_or_none(row.get("raw_completion")) for row in rows),
    )


def write_annotations(path: epath.PathLike, annotations: Annotations) -> None:
    """Write `annotations.json`; no verdict is null, as NaN is no JSON."""
    rows = [
        {
            "instruction": question.prompt,
            "output_1": question.second,
            "generator_1": annotations.baseline,
            "output_2": question.first,
            "generator_2": annotations.candidate,
            "annotator": annotations.annotator,
            "preference": None if math.isnan(preference) else preference,
            "raw_completion": raw,
        }
        for question, preference, raw in zip(
            annotations.questions, annotations.preferences.tolist(), annotations.raw, strict=True
        )
    ]
    files.write_json(path, rows)


def win_rate(annotations: Annotations) -> WinRate:
    """Return AlpacaEval's continuous and discrete win rates.

        win_rate = 100 mean(p - 1);  standard_error = 100 sd(p) / sqrt(n);
        discrete_win_rate = 100 (wins + draws / 2) / n, where p > 1.5 is a win and p < 1.5 a loss

    over the preferences p that are there. The error takes instructions as independent, as AlpacaEval does;
    `length_controlled` has intervals that need not.

    Raises:
      DataError: no preference is there.
    """
    found = annotations.preferences[~np.isnan(annotations.preferences)]
    if len(found) == 0:
        raise DataError(f"{annotations.annotator} gave no preference at all. Check the annotations.")
    wins, losses = int(np.sum(found > 1.5)), int(np.sum(found < 1.5))
    draws = len(found) - wins - losses
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
    lengths = [len(question.first) for question in annotations.questions]
    return WinRate(
        win_rate=100 * float(np.mean(found - 1)),
        standard_error=100 * spread / math.sqrt(len(found)),
        discrete_win_rate=100 * (wins + draws / 2) / len(found),
        n_wins=wins,
        n_wins_base=losses,
        n_draws=draws,
        n_total=len(found),
        avg_length=int(np.mean(lengths)),
    )


def length_controlled(
    annotations: Annotations,
    *,
    seed: int,
    difficulty: Float[np.ndarray, " n"] | None = None,
    calibration: Calibration | None = None,
) -> LengthControl:
    """Return the length-controlled win rate (see `bias.length_controlled`), instructions being the groups.

    With AlpacaEval's difficulties and calibration (`read_calibration`), this is its regression without the L1
    penalty; without them, theta and the length term alone.
    """
    return bias.length_controlled(
        annotations.outcomes,
        annotations.length_difference,
        [question.prompt for question in annotations.questions],
        seed=seed,
        difficulty=difficulty,
        calibration=calibration,
    )


def read_calibration(path: epath.PathLike) -> tuple[dict[int, float], Calibration]:
    """Return each instruction's difficulty, by its place in AlpacaEval's set, and the calibration rows.

    `path` is AlpacaEval's `df_gamed.csv`, with columns index, instruction_difficulty, std_delta_len and preference.

    Raises:
      DataError: not such a file.
    """
    source = epath.Path(path)
    try:
        rows = list(csv.DictReader(io.StringIO(source.read_bytes().decode("utf-8"), newline="")))
        columns = {
            name: np.array([float(row[name] or "nan") for row in rows])
            for name in ("index", "instruction_difficulty", "std_delta_len", "preference")
        }
    except FileNotFoundError:
        raise DataError(f"{source} does not exist. Check the path.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{source} is not AlpacaEval's df_gamed.csv ({type(error).__name__}: {error}). Download it again."
        ) from None
    if not rows or np.isnan([columns[name] for name in ("index", "instruction_difficulty", "std_delta_len")]).any():
        raise DataError(f"{source} has no rows, or gaps in index, difficulty or length. Download it again.")
    there = ~np.isnan(columns["preference"])
    if not ((columns["preference"][there] >= 0) & (columns["preference"][there] <= 1)).all():
        raise DataError(f"{source}: preferences of calibration rows must lie in [0, 1]. Download it again.")
    calibration = Calibration(
        # There, the baseline's length minus the candidate's.
        length=-columns["std_delta_len"][there],
        difficulty=columns["instruction_difficulty"][there],
        win=columns["preference"][there],
    )
    places = columns["index"].astype(int).tolist()
    return dict(zip(places, columns["instruction_difficulty"].tolist(), strict=True)), calibration


def _rows(path: epath.PathLike, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSON list, each with the named texts."""
    content = files.read_json(path)
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} must be a JSON list with at least one object. Check that it is AlpacaEval's file.")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: entry {number} must be an object, not {type(row).__name__}. Correct it.")
        for name in texts:
            if not isinstance(row.get(name), str):
                raise DataError(f"{path}: entry {number}: {name!r} must be a text, not {row.get(name)!r}. Add it.")
    return content


def _single(path: epath.PathLike, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the one value of each named column."""
    found = []
    for name in names:
        values = sorted({row[name] for row in rows})
        if len(values) > 1:
            raise DataError(f"{path}: {name!r} must be the same in all entries, not {values[:5]}. Split the file.")
        found.append(values[0])
    return found


def _preference(path: epath.PathLike, number: int, value: Any) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value == 0 or 1 <= value <= 2):
        raise DataError(f"{path}: entry {number}: preference = {value!r} must lie in [1, 2], or be null. Correct it.")
    # Zero is a draw in files of AlpacaEval 1.
    return 1.5 if value == 0 else float(value)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
