"""Safetensors files, written one tensor at a time, byte for byte as the safetensors library writes them.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple of 8
bytes) and the tensors, those of wider types first and by name within a type. What goes where follows from names,
shapes and dtypes alone, so nothing need be held back, and files are written from front to back (`gs://` included).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import IO

import jax
import numpy as np
from etils import epath

from pit_jax.core.errors import CheckpointError, invalid
from pit_jax.io import files
from pit_jax.io.safetensors import DTYPES

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in a file: the hub's own limit, by which most published checkpoints are cut."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = ("F32", "BF16", "F16")
"""Of dtypes in a file."""
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Name, shape and dtype of a tensor to be written: float32, bfloat16 or float16."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tensors each file holds, in the order in which they lie there and have to be given to `write`."""

    stem: str
    shards: tuple[tuple[Entry, ...], ...]

    @property
    def entries(self) -> list[Entry]:
        """Every tensor, in the order of writing."""
        return [entry for shard in self.shards for entry in shard]

    @property
    def file_names(self) -> list[str]:
        """Name of each file, such as "model.safetensors" or "model-00001-of-00002.safetensors"."""
        count = len(self.shards)
        if count == 1:
            return [f"{self.stem}.safetensors"]
        return [f"{self.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def plan(entries: Iterable[Entry], *, max_shard_size: int, stem: str = "model") -> Plan:
    """Return how tensors are spread over files, by the rule of transformers and huggingface_hub.

    In the order given, a tensor goes into the current file unless that would pass `max_shard_size` bytes, which
    opens the next one; a tensor that is larger by itself gets a file of its own, and the current one stays open.

    Raises:
      ConfigError: `max_shard_size` is not positive.
    """
    if max_shard_size < 1:
        raise invalid("max_shard_size", max_shard_size, "be positive", f"{MAX_SHARD_SIZE} is usual.")
    shards: list[list[Entry]] = []
    current: list[Entry] = []
    filled = 0
    for entry in entries:
        if entry.size > max_shard_size:
            shards.append([entry])
            continue
        if filled + entry.size > max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(entry)
        filled += entry.size
    if current:
        shards.append(current)
    return Plan(stem=stem, shards=tuple(tuple(sorted(shard, key=_place)) for shard in shards))


def write(directory: epath.Path, plan: Plan, arrays: Iterable[np.ndarray]) -> None:
    """Write the files of `plan`, and the index where there are several, taking the arrays one at a time.

    Args:
      directory: an existing one, best of all that of `new_directory`.
      plan: what is to be written.
      arrays: for each of `plan.entries` its array on the host. Every process has to take them from a mesh; only
        the first one writes.
    Raises:
      CheckpointError: the disk has too little room.
    """
    remaining = iter(arrays)
    if jax.process_index() != 0:
        for _ in zip(plan.entries, remaining, strict=True):
            pass
        return
    files.require_free(directory, sum(entry.size for entry in plan.entries))
    for name, shard in zip(plan.file_names, plan.shards, strict=True):
        with _durable(directory / name) as file:
            file.write(_header(shard))
            for entry in shard:
                array = next(remaining)
                assert array.shape == entry.shape and array.dtype == entry.dtype, (entry, array.shape, array.dtype)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                del array
    assert next(remaining, None) is None, "more arrays than planned"
    if len(plan.shards) > 1:
        files.write_text(directory / f"{plan.stem}.safetensors.index.json", _index(plan))


@contextlib.contextmanager
def new_directory(target: epath.PathLike) -> Iterator[epath.Path]:
    """Yield a directory to write into, which takes the name of `target` at the end and is gone after an error.

    Only the first process makes it; the others get its name alone.

    Raises:
      CheckpointError: there is something at `target` already.
    """
    final = epath.Path(target)
    partial = final.parent / f"{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    if jax.process_index() != 0:
        yield partial
        return
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise CheckpointError(f"{final} exists and is not an empty directory. Remove it, or name another place.")
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            final.rmdir()
        partial.rename(final)
    finally:
        if partial.exists():
            partial.rmtree()


@contextlib.contextmanager
def _durable(path: epath.Path) -> Iterator[IO[bytes]]:
    """Open a new file; on a local disk its content survives a power failure once the block has ended."""
    with path.open("wb") as file:
        yield file
        if files.is_local(path):
            file.flush()
            os.fsync(file.fileno())


def _place(entry: Entry) -> tuple[int, str]:
    return _ORDER.index(_CODES[entry.dtype]), entry.name


def _header(shard: tuple[Entry, ...]) -> bytes:
    tensors: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in shard:
        end = start + entry.size
        tensors[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _index(plan: Plan) -> str:
    parameters = sum(math.prod(entry.shape) for entry in plan.entries)
    size = sum(entry.size for entry in plan.entries)
    where = {e.name: name for name, shard in zip(plan.file_names, plan.shards, strict=True) for e in shard}
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": where}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
