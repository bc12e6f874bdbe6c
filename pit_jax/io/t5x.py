"""Checkpoints of T5X as named arrays: reading both layouts, without T5X and without Flax.

    checkpoint_STEP/checkpoint        older: one msgpack file; big arrays lie beside it as zarr directories
    checkpoint_STEP/target.a.b/       such an array, named by a TensorStore spec in the msgpack file
    checkpoint_STEP/state/            newer: Orbax; every array is a zarr array inside one OCDBT database

Names of parameters are joined with slashes, without the leading `target`. An array is opened, but not read, before
somebody asks for its values; a piece of it that is missing on disk is an error, never zeros.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from pit_jax.core.errors import CheckpointError
from pit_jax.io.files import is_local

MSGPACK_FILE = "checkpoint"
STATE = "state"
TARGET = "target"
NDARRAY, COMPLEX, SCALAR = 1, 2, 3
"""Codes of Flax's msgpack extensions."""

_STEP_NAME = re.compile(r"checkpoint_(\d+)")
_OLDEST = 2
_CHUNKED = "__msgpack_chunked_array__"
_PLACEHOLDER = "PLACEHOLDER://"
_ZARR = {".zarray": "zarr", "zarr.json": "zarr3"}
_DRIVERS = ("file", "gfile", "gcs")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a checkpoint; `values` are those of a msgpack file, or a TensorStore that reads them on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredParameters:
    """The parameters of a T5X checkpoint by name; `directory` is that of its step."""

    directory: epath.Path
    arrays: Mapping[str, StoredArray]

    def rows(self, name: str) -> Rows:
        """Return a parameter that can be read by rows of its first axis."""
        return Rows(f"{self.directory}: {name}", self.arrays[name])

    def read(self, name: str) -> np.ndarray:
        """Return all values of a parameter.

        Raises:
          CheckpointError: its files are damaged or missing.
        """
        return self.rows(name)[:]


class Rows:
    """Rows of an array on disk: whole chunks are read, and the last ones kept, since most hold many rows."""

    def __init__(self, name: str, array: StoredArray) -> None:
        self._name, self._array = name, array
        in_memory = isinstance(array.values, np.ndarray)
        self._chunk = array.shape[0] if in_memory else array.values.chunk_layout.read_chunk.shape[0]
        self._first, self._known = 0, np.empty((0,))

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Return some rows.

        Raises:
          CheckpointError: the files they are in are damaged or missing.
        """
        first, last, _ = rows.indices(self._array.shape[0])
        if not self._first <= first < last <= self._first + len(self._known):
            self._first = first // self._chunk * self._chunk
            self._known = self._read(self._first, -(-last // self._chunk) * self._chunk)
        return self._known[first - self._first : last - self._first]

    def _read(self, first: int, last: int) -> np.ndarray:
        part = self._array.values[first : min(last, self._array.shape[0])]
        try:
            return part if isinstance(part, np.ndarray) else part.read().result()
        except Exception as error:  # TensorStore raises ValueError, OSError, RuntimeError, ...
            raise CheckpointError(
                f"{self._name} cannot be read: {first_line(error)}. The checkpoint is damaged: copy it once more."
            ) from error


def open_t5x(directory: epath.PathLike) -> StoredParameters:
    """Return the parameters of a T5X checkpoint, none of them read yet.

    Args:
      directory: of a step (`checkpoint_1000`), or of a model, of which the newest step is taken. Local, or a URL
        that TensorStore knows, such as `gs://bucket/path`.

    Raises:
      CheckpointError: there is no T5X checkpoint, it is of an unknown version, or its files are damaged.
    """
    step = step_directory(directory)
    if (step / MSGPACK_FILE).exists():
        found = _from_msgpack(step, step / MSGPACK_FILE)
    elif (step / STATE / MSGPACK_FILE).exists():
        found = _from_msgpack(step / STATE, step / STATE / MSGPACK_FILE)
    else:
        found = _from_orbax(step / STATE)
    if not found:
        raise CheckpointError(f"{step} holds no parameters under {TARGET!r}. It was not written by T5X.")
    arrays = {name.removeprefix(f"{TARGET}/"): array for name, array in found.items()}
    return StoredParameters(directory=step, arrays=arrays)


def step_directory(directory: epath.PathLike) -> epath.Path:
    """Return the directory of one step: `directory` itself, or the newest `checkpoint_STEP` in it.

    Raises:
      CheckpointError: there is none.
    """
    path = epath.Path(directory)
    if path.is_file() and path.name == MSGPACK_FILE:
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory. Give that of a T5X checkpoint, such as checkpoint_1000.")
    if _is_step(path):
        return path
    matches = ((_STEP_NAME.fullmatch(entry.name), entry) for entry in path.iterdir())
    steps = {int(match[1]): entry for match, entry in matches if match and entry.is_dir()}
    if not steps:
        raise CheckpointError(
            f"{path} is no T5X checkpoint: it has neither a file {MSGPACK_FILE!r} nor a directory {STATE!r}, "
            "and no checkpoint_STEP in it. Check the path."
        )
    newest = steps[max(steps)]
    if not _is_step(newest):
        raise CheckpointError(
            f"{newest}, the newest of {len(steps)} checkpoints, has neither a file {MSGPACK_FILE!r} nor a directory "
            f"{STATE!r}: it was not written to the end. Name an older one."
        )
    return newest


def kvstore(directory: epath.PathLike) -> dict[str, Any]:
    """Return the TensorStore key-value store of a directory."""
    if is_local(directory):
        return {"driver": "file", "path": f"{os.path.abspath(directory)}/"}
    return ts.KvStore.Spec(f"{os.fspath(directory).rstrip('/')}/").to_json()


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message, without TensorStore's dump of the whole specification."""
    text = str(error) or type(error).__name__
    return text.splitlines()[0].split(" [tensorstore_spec")[0].split(" [source locations")[0][:300]


def _is_step(path: epath.Path) -> bool:
    return (path / MSGPACK_FILE).is_file() or (path / STATE).is_dir()


def _from_msgpack(base: epath.Path, file: epath.Path) -> dict[str, StoredArray]:
    """Return the parameters a msgpack file holds or names; `base` is what the paths in it are relative to."""
    try:
        content = msgpack.unpackb(file.read_bytes(), ext_hook=_extension, raw=False)
    except Exception as error:  # msgpack's own errors, and NumPy's from the extensions
        raise CheckpointError(
            f"{file} is not msgpack, or cut short: {first_line(error)}. "
            "T5X checkpoints are; those of TensorFlow (Mesh) must be converted by T5X first."
        ) from error
    if isinstance(content, dict) and TARGET in content:  # Orbax's first layout: the tree itself
        tree = content
    else:
        version = content.get("version", 0) if isinstance(content, dict) else None
        if not isinstance(version, int) or version < _OLDEST:
            raise CheckpointError(
                f"{file}: version = {version!r} must be at least {_OLDEST}. Restore and save it with a newer T5X."
            )
        tree = content.get("optimizer")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} has no 'optimizer' with the parameters in it. It is not a T5X checkpoint.")
    arrays: dict[str, StoredArray] = {}
    elsewhere: dict[str, tuple[str, str]] = {}
    declared: dict[str, Any] = {}
    for name, leaf in _leaves({TARGET: tree.get(TARGET, {})}):
        if isinstance(leaf, dict) and _CHUNKED not in leaf:
            elsewhere[name] = leaf["driver"], _path(file, name, leaf)
            declared[name] = leaf.get("metadata", {}).get("shape")
        elif isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
            elsewhere[name] = "zarr", _inside(file, name, leaf.removeprefix(_PLACEHOLDER))
        else:
            value = _chunked(file, name, leaf) if isinstance(leaf, dict) else np.asarray(leaf)
            arrays[name] = StoredArray(value.shape, value.dtype, value)
    opened = _open_all(base, kvstore(base), elsewhere)
    for name, shape in declared.items():
        if shape is not None and tuple(shape) != opened[name].shape:
            raise CheckpointError(
                f"{base}: {name} has shape {opened[name].shape} on disk and {tuple(shape)} in {file.name}. "
                "The directory mixes two checkpoints: copy it once more."
            )
    return arrays | opened


def _from_orbax(state: epath.Path) -> dict[str, StoredArray]:
    """Return the parameters in an Orbax directory: an OCDBT database, or one zarr directory each."""
    store = kvstore(state)
    if (state / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": store}
    try:
        keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    except Exception as error:
        raise CheckpointError(
            f"{state} cannot be read: {first_line(error)}. Files are missing or cut short: copy it once more."
        ) from error
    places = (key.rpartition("/") for key in keys)
    found = {path.replace(".", "/"): (_ZARR[name], path) for path, _, name in places if path and name in _ZARR}
    return _open_all(state, store, {name: place for name, place in found.items() if name.startswith(f"{TARGET}/")})


def _open_all(base: epath.Path, store: dict[str, Any], places: Mapping[str, tuple[str, str]]) -> dict[str, StoredArray]:
    """Open arrays, given as name -> (driver, path in the store)."""
    spec = {"fill_missing_data_reads": False}  # a chunk that is not there would be read as zeros
    futures = {
        name: ts.open({"driver": driver, "kvstore": _below(store, path), **spec}, open=True, read=True)
        for name, (driver, path) in places.items()
    }
    opened = {}
    for name, future in futures.items():
        try:
            array = future.result()
        except Exception as error:
            raise CheckpointError(
                f"{base}: {name}, in {places[name][1]!r}, cannot be opened: {first_line(error)}. "
                "The checkpoint is not complete: copy it once more."
            ) from error
        opened[name] = StoredArray(tuple(array.shape), array.dtype.numpy_dtype, array)
    return opened


def _below(store: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the part of a key-value store below a path."""
    return store | {"path": f"{store.get('path', '')}{path.rstrip('/')}/"}


def _path(file: epath.Path, name: str, spec: Mapping[str, Any]) -> str:
    """Return the path a TensorStore spec names, relative to the checkpoint."""
    inner = spec["kvstore"] if isinstance(spec["kvstore"], dict) else {}
    if spec["driver"] not in _ZARR.values() or inner.get("driver") not in _DRIVERS:
        raise CheckpointError(
            f"{file}: {name} is stored by the drivers {spec['driver']!r} and {inner.get('driver')!r}; "
            f"known are zarr in {', '.join(_DRIVERS)}. Restore and save it with T5X."
        )
    return _inside(file, name, inner.get("path", spec.get("path")))


def _inside(file: epath.Path, name: str, path: object) -> str:
    """Return a path that stays inside of the checkpoint.

    Raises:
      CheckpointError: it does not; a checkpoint is data and must not make other files be read.
    """
    parts = path.split("/") if isinstance(path, str) else []
    if not isinstance(path, str) or not path.strip("/") or path.startswith("/") or ".." in parts or "://" in path:
        raise CheckpointError(f"{file}: {name} lies at {path!r}, which must be a path inside of the checkpoint.")
    return path


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, dict) and _CHUNKED not in value and not value.keys() >= {"driver", "kvstore"}:
            yield from _leaves(value, name)
        else:
            yield name, value


def _extension(code: int, data: bytes) -> Any:
    """Decode Flax's msgpack extensions: arrays, complex numbers, NumPy scalars."""
    if code == COMPLEX:
        return complex(*msgpack.unpackb(data))
    if code not in (NDARRAY, SCALAR):
        raise ValueError(f"unknown extension {code}")
    shape, dtype, values = msgpack.unpackb(data, raw=False)
    array = np.frombuffer(values, ts.dtype(dtype).numpy_dtype).reshape(shape)
    return array if code == NDARRAY else array[()]


def _chunked(file: epath.Path, name: str, leaf: Mapping[str, Any]) -> np.ndarray:
    """Join an array that was too big for one msgpack object; lists are stored as dicts with keys "0", "1", ..."""
    try:
        shape, chunks = (_in_order(leaf[key]) for key in ("shape", "chunks"))
        return np.concatenate([np.ravel(chunk) for chunk in chunks]).reshape([int(size) for size in shape])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: the pieces of {name} do not make an array: {first_line(error)}.") from error


def _in_order(stored: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    return [stored[str(index)] for index in range(len(stored))] if isinstance(stored, Mapping) else list(stored)
