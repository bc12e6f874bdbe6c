"""Safetensors files, read a few rows at a time: neither the library nor a memory map ever holds a whole file.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor)
and the tensors. Everything that can be known without them is checked when a file is opened. Files are read, not
mapped, because pages of a map count as this process's memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from pit_jax.core.errors import CheckpointError, DataError
from pit_jax.io import files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
"""Dtypes that can be read; tensors of others are listed."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""How names of pickled weights end."""

_LARGEST_HEADER = 100_000_000
_FRAME = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a file; like an array, `tensor[start:stop]` gives rows of its first axis, which are read then.

    code: the format's name of the dtype. start, end: its bytes in the file.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    file: epath.Path
    start: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype.

        Raises:
          CheckpointError: it is none of `DTYPES`.
        """
        if self.code not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} has dtype {self.code}; {', '.join(DTYPES)} can be read. "
                "Save it in one of them; for a quantised checkpoint, get the one it was made from."
            )
        return DTYPES[self.code]

    def read(self) -> np.ndarray:
        """Return the whole tensor."""
        return self._values(self.start, self.end).reshape(self.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Return some rows of the first axis."""
        first, last, step = rows.indices(self.shape[0])
        assert step == 1, rows
        size = (self.end - self.start) // max(self.shape[0], 1)
        values = self._values(self.start + first * size, self.start + max(last, first) * size)
        return values.reshape(max(last - first, 0), *self.shape[1:])

    def _values(self, start: int, end: int) -> np.ndarray:
        dtype = self.dtype
        data = _bytes(self.file, start, end - start)
        if data.size != end - start:
            raise CheckpointError(f"{self.file} ended at byte {start + data.size}: it changed while it was read.")
        return data.view(dtype)


Tensors = Mapping[str, Stored]
"""Tensors by name."""


def open_directory(directory: epath.PathLike) -> Tensors:
    """Return the tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
      CheckpointError: there are no weights, or pickled ones only; a file is not whole; a shard is missing, or a tensor
        in its shard.
      DataError: the index is not JSON.
    """
    place = epath.Path(directory)
    if (place / SINGLE).exists():
        return open_file(place / SINGLE)
    if (place / INDEX).exists():
        return _open_shards(place)
    raise CheckpointError(_no_weights(place))


def open_file(path: epath.PathLike) -> Tensors:
    """Return the tensors of one file.

    Raises:
      CheckpointError: it is missing, cut short, or not a safetensors file.
    """
    file = epath.Path(path)
    if not file.exists():
        raise CheckpointError(f"{file} does not exist. Check the path, or copy the file anew.")
    size = file.stat().length
    header, begin = _header(file, size)
    tensors = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        tensor = _stored(file, begin, name, fields)
        if tensor.end > size:
            raise CheckpointError(
                f"{file} is cut short: it has {size} bytes, and tensor {name} ends at {tensor.end}. Copy the file anew."
            )
        tensors[name] = tensor
    return tensors


def _header(file: epath.Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and where the tensors begin."""
    length = int.from_bytes(_bytes(file, 0, min(_FRAME, size)).tobytes(), "little")
    if size < _FRAME or length > _LARGEST_HEADER:
        raise CheckpointError(f"{file} is not a safetensors file, or cut short ({size} bytes). Copy the file anew.")
    if _FRAME + length > size:
        raise CheckpointError(
            f"{file} is cut short: it has {size} bytes, and its header alone {_FRAME + length}. Copy the file anew."
        )
    try:
        header = json.loads(_bytes(file, _FRAME, length).tobytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header is not JSON. Copy it anew.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a table. Copy it anew.")
    return header, _FRAME + length


def _stored(file: epath.Path, begin: int, name: str, fields: Any) -> Stored:
    """Return one entry of a header, checked."""
    unsound = CheckpointError(f"{file}: the header's entry of tensor {name} is not sound. Copy the file anew.")
    try:
        code, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise unsound from None
    numbers = (*shape, start, end)
    if not isinstance(code, str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise unsound
    if start > end:
        raise unsound
    if code in DTYPES and end - start != math.prod(shape) * DTYPES[code].itemsize:
        raise CheckpointError(
            f"{file}: tensor {name} {list(shape)} of {code} cannot have {end - start} bytes. Copy the file anew."
        )
    return Stored(name=name, code=code, shape=shape, file=file, start=begin + start, end=begin + end)


def _open_shards(directory: epath.Path) -> Tensors:
    """Return the tensors that the index names."""
    index = directory / INDEX
    content = files.read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise DataError(f"{index} has no weight_map from tensors to files. Copy the file anew.")
    shards = sorted(set(places.values()))
    outside = [shard for shard in shards if "/" in shard or "\\" in shard or shard in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file beside it. Copy the file anew.")
    missing = [shard for shard in shards if not (directory / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {listed(missing)}, which {INDEX} names ({len(missing)} of {len(shards)} shards). "
            "Copy the missing files."
        )
    opened = {shard: open_file(directory / shard) for shard in shards}
    absent = [name for name, shard in places.items() if name not in opened[shard]]
    if absent:
        raise CheckpointError(
            f"{directory / places[absent[0]]} lacks {listed(absent)}, which {INDEX} says is there. "
            "Copy the files and the index anew, from the same place."
        )
    return {name: opened[shard][name] for name, shard in places.items()}


def _no_weights(directory: epath.Path) -> str:
    """Return the message for a directory with neither a file nor an index."""
    if not directory.is_dir():
        return f"{directory} is not a directory. Name one with config.json and {SINGLE}."
    names = sorted(path.name for path in directory.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return (
            f"{directory} holds pickled weights only ({listed(pickled)}): these could run code and are never opened. "
            "Convert them where you trust them: AutoModel...from_pretrained(DIR).save_pretrained(OUT, "
            "safe_serialization=True)."
        )
    if "adapter_model.safetensors" in names:
        return (
            f"{directory} holds an adapter, not a model. Name the directory of its base, or make one model of the two: "
            "pit-jax convert --input=ADAPTER --base=BASE --output=DIR."
        )
    return f"{directory} holds no weights: neither {SINGLE} nor {INDEX}. It has {listed(names) or 'no files'}."


def listed(names: Iterable[str]) -> str:
    """Return the first few of some names, for errors."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _bytes(file: epath.Path, start: int, size: int) -> np.ndarray:
    """Return bytes of a file, fewer where it ends before."""
    if not files.is_local(file):
        with file.open("rb") as stream:
            stream.seek(start)
            return np.frombuffer(stream.read(size), np.uint8)
    with open(file, "rb") as stream:
        stream.seek(start)
        data = np.empty(size, np.uint8)
        # Large reads go straight into the array.
        return data[: stream.readinto(data.data)]
