"""Checkpoints through Orbax; the only file that calls it.

    DIRECTORY/checkpoint_STEP/state/                 parameters, optimiser state and step (OCDBT, as T5X writes it)
    DIRECTORY/checkpoint_STEP/_CHECKPOINT_METADATA   `meta`: data position and whatever else the program keeps
    DIRECTORY/checkpoint_STEP/sizes.json             size of every file, so that truncated ones are noticed

What survives:

* A save is written beside its final name and renamed when it is complete. `kill -9`, a full disk or a lost
  machine during a save leaves the previous checkpoints untouched and the new one invisible.
* A checkpoint goes away (`keep`) only after a newer one is complete.
* A checkpoint damaged afterwards is skipped with a warning and the next older one is taken. Where none of
  several can be read, that is an error: nothing is started anew over what a person might still repair.
* State and `meta` are one unit: they are always of the same step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from pit_jax.core.errors import CheckpointError
from pit_jax.core.tree import named_leaves, size_in_bytes
from pit_jax.io import files

_STATE = "state"
_SIZES = "sizes.json"
_NAME = re.compile(r"checkpoint_(\d+)")
_LEFTOVER = re.compile(r"checkpoint_\d+\.orbax-checkpoint-tmp.*")
Tree = dict[str, Any]
_LOG = logging.getLogger(__name__)


class _DamagedError(CheckpointError):
    """A checkpoint whose files cannot be read, as opposed to one that belongs to another model."""


class Checkpoints:
    """The checkpoints of one directory.

    `keep` is how many of the newest stay (None: all). With `asynchronous=True` a save returns once the arrays
    are copied off the devices, so that they may be donated, and is finished by the next `save`, `wait`,
    `latest` or restore, which is also where its errors appear.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int | None, asynchronous: bool = True) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep = {keep} must be at least 1 or None")
        self.directory = epath.Path(directory)
        if files.is_local(directory):  # Orbax takes absolute paths only
            self.directory = epath.Path(os.path.abspath(directory))
        self._keep = keep
        self._asynchronous = asynchronous
        self._pending: tuple[int, Any] | None = None

    def path(self, step: int) -> epath.Path:
        """Return the directory of one step's checkpoint."""
        return self.directory / f"checkpoint_{step}"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that look complete, oldest first."""
        return [step for step in self._all_steps() if self._is_complete(step)]

    def latest(self) -> int | None:
        """Return the newest step that looks complete, None where there is none; newer broken ones are named."""
        self.wait()
        for step in reversed(self._all_steps()):
            if self._is_complete(step):
                return step
            _LOG.warning("%s is not complete and is skipped", self.path(step))
        return None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Write one checkpoint: a tree of arrays and JSON data that belongs to it.

        Raises:
          CheckpointError: this step exists already, or the disk is full or fails. Earlier ones are intact.
        """
        self.wait()
        if self._is_complete(step):
            raise CheckpointError(f"{self.path(step)} exists already. Remove it, or use another directory.")
        files.require_free(self.directory, size_in_bytes(state))
        with self._named_errors(step), _quiet():
            self.directory.mkdir(parents=True, exist_ok=True)
            # Only a damaged checkpoint of this step can be in the way; `overwrite` removes it.
            response = ocp.save_checkpointables_async(
                self.path(step),
                {_STATE: state},
                custom_metadata={"tree": _tree(state), "meta": meta},
                overwrite=self.path(step).exists(),
            )
        self._pending = (step, response)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Block until the save under way, if any, is complete; then remove what `keep` does not cover.

        Raises:
          CheckpointError: it failed; the earlier checkpoints are intact.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        with self._named_errors(step), _quiet():
            response.result()
            if jax.process_index() == 0:
                files.write_json(self.path(step) / _SIZES, _sizes(self.path(step)))
        if self._keep is not None and jax.process_index() == 0:
            self._prune(self._keep)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Return (state, meta) of one step, each array with the shape, dtype and sharding of `abstract_state`.

        Raises:
          CheckpointError: there is no such checkpoint, it cannot be read, or its tree, a shape or a dtype
            differs; the first difference is named with both sides.
        """
        self.wait()
        saved, meta = self._metadata(step)
        _check_same(self.path(step), saved, _tree(abstract_state), exact=True)
        return self._load(step, abstract_state), meta

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return (step, state, meta) of the newest checkpoint that can be read; None where none was ever made.

        Raises:
          CheckpointError: the newest readable one belongs to another model, or several exist and none is readable.
        """
        self.wait()
        found = list(reversed(self._all_steps()))
        for step in found:
            try:
                state, meta = self.restore(step, abstract_state)
                return step, state, meta
            except _DamagedError as error:
                _LOG.warning("%s Trying the one before.", error)
        if found:
            raise CheckpointError(
                f"{self.directory}: none of the checkpoints {found} can be read. "
                "Restore the directory from a copy, or move it away to start anew."
            )
        return None

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Return only the parameters of one step (the entry `params` of the state), for use or as a start.

        Parameters are cast to the dtypes of `abstract_params`, which may leave out parts of the saved tree.

        Raises:
          CheckpointError: as `restore`; a part of the saved tree that is not asked for is no difference.
        """
        self.wait()
        saved, _ = self._metadata(step)
        wanted = {"params": abstract_params}
        _check_same(self.path(step), saved, _tree(wanted), exact=False)
        return self._load(step, wanted, partial=True)["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """Return the JSON data of one step without reading its arrays."""
        return self._metadata(step)[1]

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves have left; only for the process that writes to this directory."""
        if jax.process_index() == 0 and self.directory.exists():
            for entry in self.directory.iterdir():
                if _LEFTOVER.fullmatch(entry.name):
                    entry.rmtree()

    def _all_steps(self) -> list[int]:
        if not self.directory.exists():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _is_complete(self, step: int) -> bool:
        path = self.path(step)
        needed = (path / "_CHECKPOINT_METADATA", path / _STATE / "_METADATA", path / _STATE / "manifest.ocdbt")
        if not all(file.exists() for file in needed):
            return False
        # A run killed between the rename and this file leaves a checkpoint that is complete all the same.
        return not (path / _SIZES).exists() or files.read_json(path / _SIZES) == _sizes(path)

    def _metadata(self, step: int) -> tuple[Tree, dict[str, Any]]:
        if not self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} does not exist. There is: {self.steps() or 'none'}.")
        if not self._is_complete(step):
            raise _DamagedError(f"{self.path(step)} cannot be read: files are missing or cut short.")
        try:
            with _quiet():
                ours: Any = ocp.metadata(self.path(step), _STATE).custom_metadata
            return ours["tree"], ours["meta"]
        except Exception as error:
            raise _damaged(self.path(step), error) from error

    def _load(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        try:
            with _quiet(), context:
                return ocp.load(self.path(step), _with_shardings(abstract), checkpointable_name=_STATE)
        except Exception as error:
            raise _damaged(self.path(step), error) from error

    def _prune(self, keep: int) -> None:
        first_kept = self.steps()[-keep:][0]
        for old in self._all_steps():
            if old < first_kept:
                try:
                    self.path(old).rmtree()
                except OSError as error:  # a file that will not go away is no reason to stop training
                    _LOG.warning("%s could not be removed: %s", self.path(old), error)

    @contextlib.contextmanager
    def _named_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise OSError, ValueError, RuntimeError, ...
            self.remove_leftovers()
            good = self.steps()
            kept = f"{self.path(good[-1])} is intact" if good else "No earlier checkpoint exists"
            raise CheckpointError(
                f"{self.path(step)} could not be written: {_first_line(error)}. {kept}. "
                "Make room or repair the disk, then run the same command again."
            ) from error


def _sizes(path: epath.Path) -> dict[str, int]:
    """Return the size in bytes of every file of a checkpoint but the list of sizes itself."""
    pending, sizes = [path], {}
    while pending:
        for entry in pending.pop().iterdir():
            if entry.is_dir():
                pending.append(entry)
            elif entry.name != _SIZES:
                sizes[str(entry.relative_to(path))] = entry.stat().length
    return dict(sorted(sizes.items()))


def _damaged(path: epath.Path, error: Exception) -> _DamagedError:
    return _DamagedError(f"{path} cannot be read: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0].split(" [tensorstore_spec")[0]
    # TensorStore begins with what it was doing and ends with why it failed.
    return line if len(line) <= 200 else f"{line[:60]} ... {line[-140:]}"


def _with_shardings(abstract: Any) -> Any:
    """Put leaves without a sharding on the default device (Orbax would take the saved topology and warn)."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), abstract
    )


def _tree(state: Any) -> Tree:
    """Return name -> (shape, dtype); kept with the checkpoint, because Orbax forgets leaves it cannot read."""
    return {name: (list(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(state)}


def _check_same(path: epath.Path, have: Tree, want: Tree, *, exact: bool) -> None:
    """Raise for the first leaf in which a saved tree differs from the wanted one (`exact`: also dtype and extras)."""
    fix = "It belongs to another model, optimiser or stage: use its own configuration, or another directory."
    for name, (shape, dtype) in want.items():
        if name not in have:
            raise CheckpointError(f"{path} has no {name}, which is expected with shape {tuple(shape)}. {fix}")
        saved_shape, saved_dtype = have[name]
        if saved_shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(saved_shape)}, expected is {tuple(shape)}. {fix}")
        if exact and saved_dtype != dtype:
            raise CheckpointError(f"{path}: {name} has dtype {saved_dtype}, expected is {dtype}. {fix}")
    extra = [name for name in have if name not in want]
    if exact and extra:
        raise CheckpointError(
            f"{path} holds {extra[0]} of shape {tuple(have[extra[0]][0])}, which is not expected. {fix}"
        )


class _OnlyOwnErrors(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's and asyncio's logs: an error is raised once, by us, not printed once per array as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    silence = _OnlyOwnErrors()
    for logger in loggers:
        logger.addFilter(silence)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(silence)
