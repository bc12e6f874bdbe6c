"""Metric records: JSON Lines always, TensorBoard and Weights & Biases on request.

What survives: `flush` hands records to the operating system (they outlive `kill -9`), `sync` also puts them
on the disk (they outlive a power failure). The training loop syncs before every checkpoint, so the file always
holds every record up to the newest checkpoint; `truncate_after` drops what a killed run had written after it,
half a line included. A resumed run then writes the same lines the killed one would have written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from pit_jax.core.errors import TrainingError, invalid
from pit_jax.io import files

TIMING = "timing/"
"""Fields under this prefix depend on the machine; everything else in a record is reproducible."""


class MetricWriter:
    """Writes records `{"step": .., "kind": .., name: value, ..}` to `directory/metrics.jsonl`.

    TensorBoard events go to `directory/tensorboard/KIND` where tensorboardX is installed; W&B gets the same
    numbers as `KIND/name`. Numbers that are not finite become null, because JSON has no word for them.
    """

    def __init__(self, directory: epath.PathLike, *, tensorboard: bool, wandb_project: str | None = None) -> None:
        self._directory = epath.Path(directory)
        self.path = self._directory / "metrics.jsonl"
        self._local = files.is_local(self.path)
        self._file: IO[str] | None = None
        self._remote_text: str | None = None
        self._first_step = 0
        self._boards: dict[str, Any] = {}
        self._tensorboard = tensorboard and importlib.util.find_spec("tensorboardX") is not None
        if tensorboard and not self._tensorboard:
            logging.getLogger(__name__).info("tensorboardX is not installed: metrics go to metrics.jsonl only")
        self._wandb_project, self._wandb = wandb_project, None
        if wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise invalid(
                "wandb_project", wandb_project, "be None without wandb", "Run `pip install wandb`, or unset it."
            )

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Append one record and hand it to the operating system.

        Raises:
          TrainingError: the file cannot be written, for example because the disk is full.
        """
        record = {"step": step, "kind": kind} | json_values(values)
        with self._named_errors():
            self._append(json.dumps(record) + "\n")
        if self._tensorboard:
            board = self._board(kind)
            for name, value in values.items():
                if math.isfinite(value):
                    board.add_scalar(name, value, step)
        if self._wandb_project is not None:
            self._wandb = self._wandb or _start_wandb(self._wandb_project, self._directory)
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def _append(self, line: str) -> None:
        if self._local:
            if self._file is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (open for the whole run)
            self._file.write(line)
            self._file.flush()
        else:
            if self._remote_text is None:
                self._remote_text = self.path.read_text() if self.path.exists() else ""
            self._remote_text += line

    def _board(self, kind: str) -> Any:
        if kind not in self._boards:
            from tensorboardX import SummaryWriter

            self._boards[kind] = SummaryWriter(
                os.fspath(self._directory / "tensorboard" / kind), purge_step=self._first_step or None
            )
        return self._boards[kind]

    def sync(self) -> None:
        """Put every record written so far on the disk (object stores: rewrite the whole file)."""
        with self._named_errors():
            if self._file is not None:
                os.fsync(self._file.fileno())
            if self._remote_text is not None:
                files.write_text(self.path, self._remote_text)
        for board in self._boards.values():
            board.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps after `step`, and half a line that a crash may have left; in one step."""
        self._close_file()
        self._first_step = step + 1
        if self.path.exists():
            kept = [line for line, record in _lines(self.path) if record["step"] <= step]
            files.write_text(self.path, "".join(kept))

    def close(self) -> None:
        """Sync and close everything; writing again reopens the files."""
        self.sync()
        self._close_file()
        for board in self._boards.values():
            board.close()
        self._boards.clear()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written: {error}. Make room, then run the same command again: "
                "it continues from the newest checkpoint."
            ) from error

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._remote_text = None


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, without a last line that is still being written."""
    return [record for _, record in _lines(epath.Path(path))]


def without_timing(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that is the same in every run of the same seed."""
    return {name: value for name, value in record.items() if not name.startswith(TIMING)}


def _lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return  # the last line of a killed run
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError as error:
            raise TrainingError(
                f"{path}, line {number} is not JSON: {error.msg}. Delete the line, or move the file away to "
                "continue without the old metrics."
            ) from error


def json_values(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON data: numbers that are not finite become null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _start_wandb(project: str, directory: epath.Path) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    # A stable id makes a resumed run continue the same curves.
    run_id = files.json_hash(os.fspath(directory))[:16]
    return wandb.init(project=project, id=run_id, resume="allow", dir=os.fspath(directory))
