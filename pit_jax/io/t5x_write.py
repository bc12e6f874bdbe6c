"""Writing checkpoints that T5X can start from, in both of its layouts (see `io/t5x.py`), one array at a time."""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from pit_jax.core.errors import CheckpointError, PitError, invalid
from pit_jax.io import files
from pit_jax.io.t5x import MSGPACK_FILE, NDARRAY, STATE, TARGET, first_line, kvstore

LAYOUTS = ("orbax", "legacy")
_VERSION = 3
_CHUNK_BYTES = 64 * 2**20
_DICT_KEY = 2
"""Orbax's code for the key of a dict in a tree's path."""


def write_t5x(
    directory: epath.PathLike,
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    step: int,
    layout: str,
    beside: Mapping[str, Any],
) -> epath.Path:
    """Write `directory/checkpoint_STEP` with parameters and the step; it appears once it is complete.

    There is no optimiser state: T5X starts a new one.

    Args:
      directory: of the model, on a local disk.
      arrays: names joined with slashes and values; asked for one after the other.
      step: at which T5X goes on counting.
      layout: "orbax" or "legacy".
      beside: JSON files to put into the directory of the step, by name.

    Returns:
      The directory of the step.

    Raises:
      ConfigError: `step` or `layout` is not possible.
      CheckpointError: the checkpoint exists already, the directory is not local, or the disk is full or fails.
    """
    if layout not in LAYOUTS:
        raise invalid("layout", layout, f"be one of {', '.join(LAYOUTS)}", "'orbax' is T5X's default.")
    if step < 0:
        raise invalid("step", step, "be at least 0", "Give the number of training steps so far.")
    if not files.is_local(directory):
        raise CheckpointError(f"{directory} is not on a local disk. Write there, then copy the directory.")
    final = epath.Path(os.path.abspath(directory)) / f"checkpoint_{step}"
    if final.exists():
        raise CheckpointError(f"{final} exists already. Remove it, or give another step or directory.")
    temporary = final.parent / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        for name, content in beside.items():
            files.write_json(temporary / name, content)
        (_write_orbax if layout == "orbax" else _write_legacy)(temporary, arrays, step)
        os.rename(temporary, final)
    except PitError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except Exception as error:  # TensorStore raises ValueError, OSError, RuntimeError, ...
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written: {first_line(error)}. Make room or repair the disk, then try again."
        ) from error
    return final


def _write_legacy(directory: epath.Path, arrays: Iterable[tuple[str, np.ndarray]], step: int) -> None:
    """Write a zarr directory for each array, and last the msgpack file that names them."""
    target: dict[str, Any] = {}
    for name, value in arrays:
        path = f"{_dotted(name)}/"
        metadata = {"shape": value.shape, "chunks": _chunks(value), "compressor": {"id": "gzip", "level": 1}}
        spec = {"driver": "zarr", "dtype": value.dtype.name, "metadata": metadata}
        _write(spec | {"kvstore": kvstore(directory / path)}, value)
        # Relative, so that the checkpoint can be moved.
        _put(target, name, spec | {"kvstore": {"driver": "file", "path": path}})
    count = np.asarray(step, np.int32)
    packed = msgpack.packb((count.shape, count.dtype.name, count.tobytes()))
    tree = {"state": {"step": msgpack.ExtType(NDARRAY, packed)}, TARGET: target}
    content = msgpack.packb({"version": _VERSION, "optimizer": tree})
    with open(directory / MSGPACK_FILE, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_orbax(directory: epath.Path, arrays: Iterable[tuple[str, np.ndarray]], step: int) -> None:
    """Write the arrays into one OCDBT database, and last Orbax's list of them."""
    state = directory / STATE
    state.mkdir()
    store = {"driver": "ocdbt", "base": kvstore(state)}
    tree = {}

    def add(keys: tuple[str, ...], value: np.ndarray) -> None:
        metadata = {"shape": value.shape, "chunks": _chunks(value), "compressor": {"id": "zstd", "level": 1}}
        spec = {"driver": "zarr", "dtype": value.dtype.name, "metadata": metadata}
        _write(spec | {"kvstore": store | {"path": f"{'.'.join(keys)}/"}}, value)
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {
                "value_type": "np.ndarray",  # it has no sharding to be restored to
                "skip_deserialize": False,
                "write_shape": list(value.shape),
            },
        }

    add(("state", "step"), np.asarray(step, np.int32))
    for name, value in arrays:
        add((TARGET, *name.split("/")), value)
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    flags = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    files.write_json(state / "_METADATA", {"tree_metadata": tree, **flags, "custom_metadata": None})
    files.write_json(directory / "_CHECKPOINT_METADATA", {"item_handlers": {STATE: handler}, "custom_metadata": {}})


def _write(spec: dict[str, Any], value: np.ndarray) -> None:
    spec = spec | {"store_data_equal_to_fill_value": True}  # so that a missing chunk can be told from zeros
    ts.open(spec, create=True).result().write(value).result()


def _chunks(value: np.ndarray) -> list[int]:
    """Return the shape of chunks of at most 64 MiB: the array's, its first long axes halved as often as needed."""
    chunks = list(value.shape)
    while math.prod(chunks) * value.dtype.itemsize > _CHUNK_BYTES:
        axis = next(axis for axis, size in enumerate(chunks) if size > 1)
        chunks[axis] = -(-chunks[axis] // 2)
    return chunks


def _dotted(name: str) -> str:
    return f"{TARGET}.{name.replace('/', '.')}"


def _put(tree: dict[str, Any], name: str, leaf: Any) -> None:
    *branches, last = name.split("/")
    for branch in branches:
        tree = tree.setdefault(branch, {})
    tree[last] = leaf
