"""The one training loop of SFT, reward models and RL: resume, log, evaluate, checkpoint, stop cleanly.

Guarantees, for a program whose `snapshot` holds everything its next `advance` depends on beside the state:

* `kill -9` at any moment and the same command again give bitwise the parameters, and line for line the
  `metrics.jsonl` (timing fields aside), of a run that was never stopped. Logged values are averages over the
  steps since the last record; a checkpoint inside such a window carries the sums so far.
* Ctrl-C and SIGTERM (on one host of several is enough) finish the step, write a checkpoint and raise `Interrupted`.
  A second Ctrl-C stops at once and is then the same as `kill -9`.
* A loss that is not finite raises TrainingError and leaves the newest checkpoint, made before it, in place.
* `done.json` appears after everything else is on the disk.
* Two runs never write to one directory: the second is refused (`io/lock.py`).

With several processes all take the same steps; process 0 alone writes records, Orbax writes from all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from pit_jax.core.errors import TrainingError, invalid
from pit_jax.core.metric import Metrics
from pit_jax.io import files
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.io.lock import Lock
from pit_jax.io.progress import Progress
from pit_jax.io.writers import TIMING, MetricWriter, json_values
from pit_jax.sharding import processes
from pit_jax.sharding.place import in_turn
from pit_jax.train.best import Best, KeepBest
from pit_jax.train.compiling import Compiling
from pit_jax.train.state import TrainState
from pit_jax.train.stopping import Interrupted, Signals
from pit_jax.train.window import TOKENS as TOKENS
from pit_jax.train.window import Clock, Phases, Window

_LOG = logging.getLogger(__name__)


class Program(Protocol):
    """What is trained: one step, one evaluation, and everything a restart needs beside the state."""

    @property
    def phases(self) -> Phases:
        """What `advance` spends its time on; the loop pauses it for what is none of its own, and reads it."""
        ...

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
    eval_at_start: also evaluate before the first step. keep_best: which checkpoints stay beside those; a step whose
    evaluation is among the best is saved, due or not.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int | None = 2
    eval_at_start: bool = False
    keep_best: KeepBest | None = None

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
    began: when the work that leads to the first step began, by `time.monotonic`; None for when training does.
    compiling: the programs that are being compiled for it, if any are.
    """

    directory: epath.PathLike
    name: str
    tensorboard: bool = True
    wandb_project: str | None = None
    began: float | None = None
    compiling: Compiling | None = None


def finished(directory: epath.PathLike) -> dict[str, Any] | None:
    """Return what `done.json` says, None while it is missing.

    It holds `step`, the last values of `train` and `eval`, and with `Loop.keep_best` the steps and values of `best`,
    the best first.
    """
    path = epath.Path(directory) / "done.json"
    return files.read_json(path) if path.exists() else None


def fit(program: Program, state: TrainState, loop: Loop, run: RunFiles) -> TrainState:
    """Train `program` from `state`, or from the newest checkpoint of `run.directory`, and return the final state.

    `state` gives the start and, on a restart, shapes, dtypes and shardings; `advance` may donate it. A run that
    was complete is only loaded.

    Raises:
      Interrupted: SIGINT or SIGTERM; a checkpoint of the last finished step exists.
      TrainingError: the loss was not finite; the step is named.
      CheckpointError: a checkpoint cannot be written, or belongs to another model; or another run is at work there.
      ConfigError: the newest checkpoint is of a later step than `loop.steps`; or `keep_best` names no metric there is.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(run.directory))
        compiling = run.compiling or stack.enter_context(Compiling())
        clock = Clock(program.phases, compiling.compilation, run.began)
        session = stack.enter_context(_Session(program, loop, run, lock, clock))
        state = session.resume(state)
        if session.step == loop.steps and finished(run.directory) is not None:
            return state
        signals = stack.enter_context(Signals())
        bar = Progress(run.name, loop.steps, start=session.step, enabled=processes.is_first())
        session.bar = stack.enter_context(bar)
        session.begin(state)
        while session.step < loop.steps:
            state = session.advance(state)
            if signals.asked() and session.step < loop.steps:
                session.save_now(state)
                raise session.interrupted(signals)
            session.do_what_is_due(state)
        session.finish()
        if signals.number is not None:  # The next stage is not to begin.
            raise session.interrupted(signals)
    return state


@contextlib.contextmanager
def locked(directory: epath.PathLike) -> Iterator[Lock]:
    """Hold a directory's lock inside of a `with`, which process 0 does for all.

    Raises:
      CheckpointError: another run holds it, or the directory cannot be written.
    """
    lock = Lock(directory)
    processes.first(f"lock of {directory}", lock.acquire)
    try:
        yield lock
    finally:
        if processes.is_first():
            lock.release()


class _Session:
    """One process's part of a run: its files, its window of metrics, and where it stands."""

    def __init__(self, program: Program, loop: Loop, run: RunFiles, lock: Lock, clock: Clock) -> None:
        self.program, self.loop, self.run = program, loop, run
        self.step = 0
        self.bar: Progress | None = None
        self._lock = lock
        self._checkpoints = Checkpoints(run.directory, keep=loop.keep)
        self._best = None if loop.keep_best is None else Best(loop.keep_best)
        self._writer = None
        if processes.is_first():
            self._writer = MetricWriter(run.directory, tensorboard=run.tensorboard, wandb_project=run.wandb_project)
        self._window = Window()
        self._last: dict[str, dict[str, float | None]] = {}
        self._saved: int | None = None
        self._owed, self._fresh = False, True
        self._clock, self._first = clock, True
        self._compiling = run.compiling or Compiling()

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Finish the save under way and close the files."""
        try:
            # After an error the other processes may be elsewhere: nothing is asked of them.
            self._checkpoints.wait(together=kind is None)
        finally:
            if self._writer is not None:
                self._writer.close()

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
            self._saved, self._fresh = self.step, False
            if self._best is not None:
                self._best.restore(meta["best"])
                self._checkpoints.protect(self._best.steps)
            self._last, self._owed = meta["last"], meta["owed"]
            self._window = Window(meta["window"])
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
        if self._fresh and self.loop.eval_at_start and self._evaluate(state):
            self._save(state)
        if self._owed:
            self.do_what_is_due(state)

    def advance(self, state: TrainState) -> TrainState:
        """Do one step; its metrics stay on the device until they are needed."""
        if self._first:
            self._compiling.wait()
        state, metrics = self.program.advance(state, self.step)
        in_turn((state, metrics))
        if self._first:
            self._first = False
            jax.block_until_ready((state, metrics))
            _LOG.info("%s: first step done after %.1f s", self.run.name, self._clock.first_step())
            self._compiling.go_on()
        self.step += 1
        self._window.add(self.step, metrics)
        if self.bar is not None:
            self.bar.advance(self.step)
        return state

    def do_what_is_due(self, state: TrainState) -> None:
        """Log, evaluate and save, in this order: a checkpoint of a step follows every record of that step."""
        if self._due(self.loop.log_every):
            self._log()
        best = self._due(self.loop.eval_every) and self._evaluate(state)
        if best or self._due(self.loop.checkpoint_every):
            self._save(state)

    def _due(self, every: int) -> bool:
        return self.step == self.loop.steps or (every > 0 and self.step % every == 0)

    def _log(self) -> None:
        self._settle()
        values, tokens = self._window.values(), self._window.tokens
        timing = self._clock.read(self._window.steps, tokens)
        self._window = Window()
        self._clock.restart()
        self._write("train", values, timing)
        if self.bar is not None:
            shown = {"loss": values["loss"]} | {
                name: timing[TIMING + name] for name in ("tokens_per_second",) if tokens
            }
            self.bar.advance(self.step, shown)

    def _evaluate(self, state: TrainState) -> bool:
        """Evaluate and write the record; return whether these parameters are among the best."""
        self._settle()
        processes.barrier(f"{self.run.name}: evaluating step {self.step}")
        with self._clock.paused() as spent:
            self._compiling.wait()
            values = self.program.evaluate(state)
        self._write("eval", values, {TIMING + "seconds": spent()})
        return self._best is not None and self._best.takes(self.step, values)

    def _write(self, kind: str, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        self._last[kind] = json_values(values)
        if self._writer is not None:
            self._lock.check()
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
        if self._saved != self.step:
            self._settle()
            self._lock.check()
            processes.barrier(f"{self.run.name}: saving step {self.step}")
            with self._clock.paused():
                if self._writer is not None:
                    self._writer.sync()
                meta = {"window": self._window.to_json(), "last": self._last, "owed": owed}
                meta["best"] = None if self._best is None else self._best.to_json()
                meta["program"] = self.program.snapshot()
                self._checkpoints.save(self.step, state, meta)
            self._saved = self.step
        if self._best is not None:  # Only now: what was best so far may go once this checkpoint is complete.
            self._checkpoints.protect(self._best.steps)

    def save_now(self, state: TrainState) -> None:
        """Save because of a signal; records due at this step are owed, for an evaluation may take too long now."""
        self._save(state, owed=True)
        self._checkpoints.wait()

    def interrupted(self, signals: Signals) -> Interrupted:
        """Return the error that says what was done when a signal came."""
        return Interrupted(
            f"{self.run.name}: stopped by {signals.name} after step {self.step} of {self.loop.steps}. "
            f"{self._checkpoints.path(self.step)} is complete: run the same command again to continue.",
            signals.exit_status,
        )

    def finish(self) -> None:
        """Wait for the last checkpoint, then write the mark that all is done."""
        self._checkpoints.wait()
        if self._writer is not None:
            self._lock.check()
            self._writer.sync()
            best = {} if self._best is None else {"best": self._best.to_json()["ranking"]}
            files.write_json(epath.Path(self.run.directory) / "done.json", {"step": self.step} | self._last | best)
        processes.barrier(f"{self.run.name}: finished")  # Others read what process 0 has written.
