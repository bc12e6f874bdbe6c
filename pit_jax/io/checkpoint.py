"""Checkpoints through Orbax; the only file that calls it.

    DIRECTORY/checkpoint_STEP/state/                 parameters, optimiser state and step (OCDBT, as T5X writes it)
    DIRECTORY/checkpoint_STEP/_CHECKPOINT_METADATA   `meta`: data position and whatever else the program keeps; names,
                                                     shapes and digests of all arrays
    DIRECTORY/checkpoint_STEP/sizes.json             size of every file, so that truncated ones are noticed

What survives:

* A save is written beside its final name and renamed when it is complete. `kill -9`, a full disk or a lost
  machine during a save leaves the previous checkpoints untouched and the new one invisible.
* A checkpoint goes away (`keep`) only after a newer one is complete; protected ones stay.
* A checkpoint damaged afterwards, be it by one bit, is skipped with a warning and the next older one is taken. Where
  none of several can be read, that is an error: nothing is started anew over what a person might still repair.
* State and `meta` are one unit: they are always of the same step.

With several processes all of them call every method at the same point, on a directory that they share: each writes and
reads its own parts, process 0 does the rest, and which checkpoint is taken is decided for all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from pit_jax.core.errors import CheckpointError, DataError
from pit_jax.core.tree import named_leaves, size_in_bytes
from pit_jax.io import files
from pit_jax.io.digest import digests

_STATE = "state"
_SIZES = "sizes.json"
_HASH = "hash"
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
        self._protected: frozenset[int] = frozenset()
        self._pending: tuple[int, Any] | None = None

    def protect(self, steps: Iterable[int]) -> None:
        """Say which steps stay whatever `keep` says, from now on; those said before lose that."""
        self._protected = frozenset(steps)

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
        # A copy: Orbax writes it later, when the caller may have changed his data.
        ours = json.loads(json.dumps({"tree": _tree(state), "meta": meta, "digests": digests(state)}))
        with self._named_errors(step), _quiet():
            self.directory.mkdir(parents=True, exist_ok=True)
            # Only a damaged checkpoint of this step can be in the way; `overwrite` removes it.
            response = ocp.save_checkpointables_async(
                self.path(step),
                {_STATE: state},
                custom_metadata=ours | {_HASH: files.json_hash(ours)},
                overwrite=self.path(step).exists(),
            )
        self._pending = (step, response)
        if not self._asynchronous:
            self.wait()

    def wait(self, *, together: bool = True) -> None:
        """Block until the save under way, if any, is complete; then remove what `keep` does not cover.

        Args:
          together: whether the other processes do the same now, so that all of them learn of an error; False is for a
            process that is about to end.
        Raises:
          CheckpointError: it failed, on this process or another; the earlier checkpoints are intact.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        with self._named_errors(step), _quiet():
            error = _failure(response)
            if together and not _everywhere(error is None):
                raise error or OSError("another process failed")
            if error is not None:
                raise error
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
        ours = self._metadata(step)
        _check_same(self.path(step), ours["tree"], _tree(abstract_state), exact=True)
        return self._load(step, abstract_state, ours), ours["meta"]

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return (step, state, meta) of the newest checkpoint that can be read; None where none was ever made.

        Raises:
          CheckpointError: the newest readable one belongs to another model, or several exist and none is readable.
        """
        self.wait()
        damaged: list[int] = []
        while (step := self._newest_but(damaged)) is not None:
            restored = error = None
            if _everywhere(self._is_complete(step)):
                try:
                    restored = self.restore(step, abstract_state)
                except _DamagedError as caught:
                    error = caught
            if _everywhere(restored is not None):
                assert restored is not None
                return step, *restored
            _LOG.warning("%s Trying the one before.", error or _incomplete(self.path(step)))
            damaged.append(step)
        if damaged:
            raise CheckpointError(
                f"{self.directory}: none of the checkpoints {damaged} can be read. "
                "Restore the directory from a copy, or move it away to start anew."
            )
        return None

    def _newest_but(self, damaged: list[int]) -> int | None:
        """Return the newest step that process 0 sees, other than the given ones: the same for all processes."""
        newest = max((step for step in self._all_steps() if step not in damaged), default=-1)
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Return only the parameters of one step (the entry `params` of the state), for use or as a start.

        Parameters are cast to the dtypes of `abstract_params`, which may leave out parts of the saved tree. Digests are
        compared where the dtype is that of the checkpoint.

        Raises:
          CheckpointError: as `restore`; a part of the saved tree that is not asked for is no difference.
        """
        self.wait()
        ours, wanted = self._metadata(step), {"params": abstract_params}
        _check_same(self.path(step), ours["tree"], _tree(wanted), exact=False)
        return self._load(step, wanted, ours, partial=True)["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """Return the JSON data of one step without reading its arrays."""
        return self._metadata(step)["meta"]

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
        # Object stores have no renaming: there the last file that Orbax writes says that all others are written.
        needed = ("commit_success.txt", "_CHECKPOINT_METADATA", f"{_STATE}/_METADATA", f"{_STATE}/manifest.ocdbt")
        if not all((path / name).exists() for name in needed):
            return False
        # A run killed between the rename and this file leaves a checkpoint that is complete all the same.
        try:
            return not (path / _SIZES).exists() or files.read_json(path / _SIZES) == _sizes(path)
        except DataError:  # no JSON
            return False

    def _metadata(self, step: int) -> dict[str, Any]:
        """Return what was saved beside the arrays: `tree`, `meta` and `digests`."""
        if not self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} does not exist. There is: {self.steps() or 'none'}.")
        if not self._is_complete(step):
            raise _incomplete(self.path(step))
        try:
            with _quiet():
                saved: Any = ocp.metadata(self.path(step), _STATE).custom_metadata
            ours = {name: saved[name] for name in ("tree", "meta", "digests")}
        except Exception as error:
            raise _damaged(self.path(step), error) from error
        if saved[_HASH] != files.json_hash(ours):
            raise _DamagedError(f"{self.path(step)} cannot be read: its metadata were changed.")
        return ours

    def _load(self, step: int, abstract: Any, ours: dict[str, Any], *, partial: bool = False) -> Any:
        placed = _with_shardings(abstract)
        context, loaded, error = ocp.Context(), None, None
        context.pytree.loading.partial_load = partial
        try:
            with _quiet(), context:
                loaded = ocp.load(self.path(step), placed, checkpointable_name=_STATE)
        except Exception as caught:
            error = caught
        alone = all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(placed))
        if not (error is None if alone else _everywhere(error is None)):
            raise _damaged(self.path(step), error or OSError("another process cannot read its part")) from error
        same = {name: leaf for name, leaf in named_leaves(loaded) if ours["tree"][name][1] == str(leaf.dtype)}
        for name, value in digests(same).items():
            if value != ours["digests"][name]:
                raise _DamagedError(f"{self.path(step)} cannot be read: the values of {name} were changed.")
        return loaded

    def _prune(self, keep: int) -> None:
        first_kept = self.steps()[-keep:][0]
        for old in self._all_steps():
            if old < first_kept and old not in self._protected:
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


def _failure(response: Any) -> Exception | None:
    """Wait for a save and return what went wrong."""
    try:
        response.result()
    except Exception as error:
        return error
    return None


def _everywhere(holds: bool) -> bool:
    """Return whether something holds on all processes."""
    return holds if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(holds))))


def _incomplete(path: epath.Path) -> _DamagedError:
    return _DamagedError(f"{path} cannot be read: files are missing or cut short.")


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
