"""The one training loop of SFT, reward models and RL: resume, log, evaluate, checkpoint, stop cleanly.

Guarantees, for a program whose `snapshot` holds everything its next `advance` depends on beside the state:

* `kill -9` at any moment and the same command again give bitwise the parameters, and line for line the
  `metrics.jsonl` (timing fields aside), of a run that was never stopped. Logged values are averages over the
  steps since the last record; a checkpoint inside such a window carries the sums so far.
* Ctrl-C and SIGTERM finish the step, write a checkpoint and raise `Interrupted`. A second Ctrl-C stops at once
  and is then the same as `kill -9`.
* A loss that is not finite raises TrainingError and leaves the newest checkpoint, made before it, in place.
* `done.json` appears after everything else is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from pit_jax.core.errors import PitError, TrainingError, invalid
from pit_jax.core.metric import Metrics
from pit_jax.io import files
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.io.progress import Progress
from pit_jax.io.writers import TIMING, MetricWriter, json_values
from pit_jax.train.state import TrainState

EXIT_SIGINT = 130
EXIT_SIGTERM = 143
_EXITS = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}
TOKENS = "tokens"
"""Name of the metric whose total is the number of tokens a step has processed; it gives tokens per second."""


class Interrupted(PitError):
    """The run was asked to stop and did, with a checkpoint; `exit_status` is what the process should return."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Program(Protocol):
    """What is trained: one step, one evaluation, and everything a restart needs beside the state."""

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Do step `step` (counted from 0) and return the new state and the step's metrics, `loss` among them."""
        ...

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return metrics on held-out data; must leave the program and the state as they are."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Return JSON data from which `restore` continues after the last `advance`: data position, running means."""
        ...

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continue where `snapshot` was taken."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """How long to train, and how often to do the rest; all in steps.

    steps: number of steps of the whole run. log_every: one record for so many steps, their average.
    eval_every, checkpoint_every: 0 means only at the end. keep: newest checkpoints that stay (None: all).
    eval_at_start: also evaluate before the first step.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int | None = 2
    eval_at_start: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        lowest_of = {"steps": 1, "log_every": 1, "eval_every": 0, "checkpoint_every": 0}
        for name, lowest in lowest_of.items():
            value = dataclasses.asdict(self)[name]
            if value < lowest:
                raise invalid(f"Loop.{name}", value, f"be at least {lowest}", "Give a number of steps.")
        if self.keep is not None and self.keep < 1:
            raise invalid("Loop.keep", self.keep, "be at least 1 or None", "None keeps every checkpoint.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Where a run leaves its files, and what it is called on the screen.

    directory: gets `checkpoint_STEP/`, `metrics.jsonl`, `tensorboard/` and, at the end, `done.json`.
    """

    directory: epath.PathLike
    name: str
    tensorboard: bool = True
    wandb_project: str | None = None


def finished(directory: epath.PathLike) -> dict[str, Any] | None:
    """Return what `done.json` says (`step`, and the last values of `train` and `eval`), None while it is missing."""
    path = epath.Path(directory) / "done.json"
    return files.read_json(path) if path.exists() else None


def fit(program: Program, state: TrainState, loop: Loop, run: RunFiles) -> TrainState:
    """Train `program` from `state`, or from the newest checkpoint of `run.directory`, and return the final state.

    `state` gives the start and, on a restart, shapes, dtypes and shardings; `advance` may donate it. A run that
    was complete is only loaded.

    Raises:
      Interrupted: SIGINT or SIGTERM; a checkpoint of the last finished step exists.
      TrainingError: the loss was not finite; the step is named.
      CheckpointError: a checkpoint cannot be written, or belongs to another model.
      ConfigError: the newest checkpoint is of a later step than `loop.steps`.
    """
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(contextlib.closing(_Session(program, loop, run)))
        state = session.resume(state)
        if session.step == loop.steps and finished(run.directory) is not None:
            return state
        signals = stack.enter_context(_Signals())
        bar = Progress(run.name, loop.steps, start=session.step, enabled=jax.process_index() == 0)
        session.bar = stack.enter_context(bar)
        session.begin(state)
        while session.step < loop.steps:
            state = session.advance(state)
            number = session.agreed(signals.received)
            if number is not None and session.step < loop.steps:
                session.stop(state, number)
            session.do_what_is_due(state)
        session.finish()
    return state


class _Session:
    """One process's part of a run: its files, its window of metrics, and where it stands."""

    def __init__(self, program: Program, loop: Loop, run: RunFiles) -> None:
        self.program, self.loop, self.run = program, loop, run
        self.step = 0
        self.bar: Progress | None = None
        self._checkpoints = Checkpoints(run.directory, keep=loop.keep)
        self._writer = None
        if jax.process_index() == 0:
            self._writer = MetricWriter(run.directory, tensorboard=run.tensorboard, wandb_project=run.wandb_project)
        self._window = _Window()
        self._last: dict[str, dict[str, float | None]] = {}
        self._saved: int | None = None
        self._owed = False
        self._clock = _Clock()

    def resume(self, state: TrainState) -> TrainState:
        """Take up the newest good checkpoint; without one, begin at step 0 with `state`."""
        self._checkpoints.remove_leftovers()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        found = self._checkpoints.restore_latest(shapes)
        if found is not None:
            self.step, state, meta = found
            if self.step > self.loop.steps:
                raise invalid(
                    "Loop.steps", self.loop.steps, f"be at least {self.step}, the step of the newest checkpoint",
                    f"Raise it, or use another directory than {self.run.directory}.",
                )  # fmt: skip
            self._saved = self.step
            self._last, self._owed = meta["last"], meta["owed"]
            self._window = _Window(meta["window"])
            self.program.restore(meta["program"])
        if self._writer is not None:
            # Records of this step do not count if the checkpoint came before them; without one, not even step 0's.
            self._writer.truncate_after(self.step - 1 if found is None or self._owed else self.step)
        if self._writer is not None and self.step < self.loop.steps:
            (epath.Path(self.run.directory) / "done.json").unlink(missing_ok=True)
        self._clock.restart()
        return state

    def begin(self, state: TrainState) -> None:
        """Do what comes before the first step of this process."""
        if self.step == 0 and self.loop.eval_at_start:
            self.evaluate(state)
        if self._owed:
            self.do_what_is_due(state)

    def advance(self, state: TrainState) -> TrainState:
        """Do one step; its metrics stay on the device until they are needed."""
        state, metrics = self.program.advance(state, self.step)
        if jax.default_backend() == "cpu" and jax.device_count() > 1:
            # Steps that run ahead on several fake devices can wait for each other for ever on few cores.
            jax.block_until_ready((state, metrics))
        self.step += 1
        self._window.add(self.step, metrics)
        if self.bar is not None:
            self.bar.advance(self.step)
        return state

    def do_what_is_due(self, state: TrainState) -> None:
        """Log, evaluate and save, in this order: a checkpoint of a step follows every record of that step."""
        if self._due(self.loop.log_every):
            self._log()
        if self._due(self.loop.eval_every):
            self.evaluate(state)
        if self._due(self.loop.checkpoint_every):
            self._save(state)

    def _due(self, every: int) -> bool:
        return self.step == self.loop.steps or (every > 0 and self.step % every == 0)

    def _log(self) -> None:
        self._settle()
        values, tokens = self._window.values(), self._window.tokens
        timing = self._clock.read(self._window.steps, tokens)
        self._window = _Window()
        self._clock.restart()
        self._write("train", values, timing)
        if self.bar is not None:
            shown = {"loss": values["loss"]} | {
                name: timing[TIMING + name] for name in ("tokens_per_second",) if tokens
            }
            self.bar.advance(self.step, shown)

    def evaluate(self, state: TrainState) -> None:
        """Evaluate and write the record."""
        self._settle()
        with self._clock.paused() as spent:
            values = self.program.evaluate(state)
        self._write("eval", values, {TIMING + "seconds": spent()})

    def _write(self, kind: str, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        self._last[kind] = json_values(values)
        if self._writer is not None:
            self._writer.write(self.step, kind, {**values, **timing})

    def _settle(self) -> None:
        """Fetch the metrics of the steps since the last time.

        Raises:
          TrainingError: a loss was not finite.
        """
        broken = self._window.settle()
        if broken is not None:
            step, what = broken
            newest = self._checkpoints.latest()
            kept = "There is no checkpoint yet" if newest is None else f"{self._checkpoints.path(newest)} is good"
            raise TrainingError(
                f"{self.run.name}: the loss of step {step} is not finite ({what}); its update was not applied. {kept}. "
                "Lower Optimizer.learning_rate or Optimizer.clip_norm, or look at the data of this step; running the "
                "same command again would meet it again."
            )

    def _save(self, state: TrainState, *, owed: bool = False) -> None:
        if self._saved == self.step:
            return
        self._settle()
        with self._clock.paused():
            if self._writer is not None:
                self._writer.sync()
            meta = {"window": self._window.to_json(), "last": self._last, "owed": owed}
            meta["program"] = self.program.snapshot()
            self._checkpoints.save(self.step, state, meta)
        self._saved = self.step

    def agreed(self, received: int | None) -> int | None:
        """Return the signal that any process has received; with several, asked when a record is due."""
        if jax.process_count() == 1:
            return received
        if self.step % self.loop.log_every:
            return None
        numbers = multihost_utils.process_allgather(np.asarray(received or 0, np.int32))
        return int(np.max(numbers)) or None

    def stop(self, state: TrainState, number: int) -> None:
        """Save and raise Interrupted; records due at this step are owed, for an evaluation may take too long now."""
        self._save(state, owed=True)
        self._checkpoints.wait()
        raise Interrupted(
            f"{self.run.name}: stopped by {signal.Signals(number).name} after step {self.step} of {self.loop.steps}. "
            f"{self._checkpoints.path(self.step)} is complete: run the same command again to continue.",
            _EXITS[signal.Signals(number)],
        )

    def finish(self) -> None:
        """Wait for the last checkpoint, then write the mark that all is done."""
        self._checkpoints.wait()
        if self._writer is not None:
            self._writer.sync()
            files.write_json(epath.Path(self.run.directory) / "done.json", {"step": self.step} | self._last)

    def close(self) -> None:
        """Finish the save under way and close the files."""
        try:
            self._checkpoints.wait()
        finally:
            if self._writer is not None:
                self._writer.close()


class _Window:
    """Sums of the metrics since the last record; on the host in float64, added step by step.

    Adding in the order of the steps makes the sums the same whether or not a restart lies between.
    """

    def __init__(self, saved: Mapping[str, list[float]] | None = None) -> None:
        self._sums = {name: (pair[0], pair[1]) for name, pair in (saved or {}).items()}
        self._pending: list[tuple[int, Metrics]] = []
        self.steps = 0

    def add(self, step: int, metrics: Metrics) -> None:
        """Take a step's metrics and start their way to the host."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._pending.append((step, metrics))
        self.steps += 1

    def settle(self) -> tuple[int, str] | None:
        """Add up what is pending; return (step, what is wrong) for the first step whose loss is not finite."""
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        for (step, _), metrics in zip(pending, fetched, strict=True):
            loss, flag = metrics["loss"], metrics.get("loss_is_finite")
            if not math.isfinite(loss.total) or (flag is not None and flag.total < flag.weight):
                named = {name: float(metrics[name].total) for name in ("loss", "grad_norm") if name in metrics}
                return step, ", ".join(f"{name} = {value:g}" for name, value in named.items())
            for name, (total, weight) in metrics.items():
                before = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (before[0] + float(total), before[1] + float(weight))
        return None

    def values(self) -> dict[str, float]:
        """Return total / weight of every metric, 0 where there is no weight."""
        return {name: total / weight if weight else 0.0 for name, (total, weight) in sorted(self._sums.items())}

    @property
    def tokens(self) -> float:
        """Tokens processed, 0 where the program does not count them."""
        return self._sums.get(TOKENS, (0.0, 0.0))[0]

    def to_json(self) -> dict[str, list[float]]:
        """Return the sums; Python writes floats so that they are read back exactly."""
        return {name: list(pair) for name, pair in self._sums.items()}


class _Clock:
    """Time spent on steps since `restart`, without evaluation and saving."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._since = self._begin
        self._away = 0.0

    def restart(self) -> None:
        self._since, self._away = time.monotonic(), 0.0

    def read(self, steps: int, tokens: float) -> dict[str, float]:
        """Return the timing fields of a record over `steps` steps."""
        now = time.monotonic()
        seconds = max(now - self._since - self._away, 1e-9)
        rates = {TIMING + "steps_per_second": steps / seconds, TIMING + "seconds": now - self._begin}
        return rates | ({TIMING + "tokens_per_second": tokens / seconds} if tokens else {})

    @contextlib.contextmanager
    def paused(self) -> Iterator[Any]:
        """Leave out what happens inside; yields a function that gives its seconds afterwards."""
        begin, spent = time.monotonic(), [0.0]
        try:
            yield lambda: spent[0]
        finally:
            spent[0] = time.monotonic() - begin
            self._away += spent[0]


class _Signals:
    """Remembers the first SIGINT or SIGTERM; a second SIGINT interrupts at once. Main thread only."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in _EXITS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        # `print` may be interrupted in its own buffer; the system call may not.
        os.write(2, b"\nfinishing the step and saving a checkpoint; Ctrl-C again stops at once\n")
