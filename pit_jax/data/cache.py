"""Tokenised examples on disk: ArrayRecord shards and one `metadata.json`, read at random without TensorFlow.

    <directory>/examples-00000.array_record, examples-00001.array_record, ...
    <directory>/metadata.json                  what is in them; written last: a cache without it is not one

A record of a shard is one example, its fields one after another, all numbers little-endian:

    number of fields      u8
    for every field       length of the name u8, name (UTF-8), kind u8, length of the payload in bytes u32, payload
    kind                  0: int32 array of rank one; 1: text (UTF-8)

A cache knows the view, the split and the codec (tokenizer, templates, lengths) that made it, and a reader that expects
others is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import grain.python as grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] (native)

from pit_jax.core.errors import DataError
from pit_jax.data.source import Fingerprint

FORMAT = 1
METADATA = "metadata.json"
_ARRAY, _TEXT = 0, 1
_EXAMPLES_PER_SHARD = 100_000

Example = Mapping[str, Any]
"""Names to int32 arrays of rank one (tokens) or to strings (text)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMetadata:
    """What a cache holds.

    `codec` hashes what the view's examples depend on, `tokenizer` is the tokenizer's fingerprint; both are empty for
    text records. `dropped` counts the records that the view left out, by reason. `fingerprint` (of the tokens, see
    `source.Fingerprint`), `count` and `shards` (file, examples, bytes) are filled in by the writer.
    """

    view: str
    split: str
    codec: str
    tokenizer: str
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    count: int = 0
    shards: tuple[tuple[str, int, int], ...] = ()


def pack_example(example: Example) -> bytes:
    """Serialise one example in the form that the module's docstring lays out."""
    parts = [struct.pack("<B", len(example))]
    for name, value in example.items():
        if isinstance(value, str):
            kind, payload = _TEXT, value.encode()
        else:
            kind, payload = _ARRAY, _as_int32(name, value).tobytes()
        label = name.encode()
        parts += [struct.pack("<B", len(label)), label, struct.pack("<BI", kind, len(payload)), payload]
    return b"".join(parts)


def unpack_example(data: bytes) -> dict[str, Any]:
    """Return the example that `pack_example` serialised."""
    example: dict[str, Any] = {}
    offset = 1
    for _ in range(data[0]):
        start = offset + 1
        stop = start + data[offset]
        kind, size = struct.unpack_from("<BI", data, stop)
        offset = stop + 5 + size
        payload = data[stop + 5 : offset]
        # A copy, because arrays that share the record's bytes cannot be written to.
        example[data[start:stop].decode()] = (
            payload.decode() if kind == _TEXT else np.frombuffer(payload, "<i4").astype(np.int32)
        )
    return example


def _as_int32(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"field {name!r} of an example has shape {array.shape} and type {array.dtype}: a cache holds text and"
            " integer arrays of rank one. Drop the field or turn it into one of them."
        )
    return array.astype("<i4")


def write_cache(
    examples: Iterable[Example],
    directory: str | os.PathLike[str],
    metadata: CacheMetadata,
    *,
    overwrite: bool = False,
    examples_per_shard: int = _EXAMPLES_PER_SHARD,
) -> CacheMetadata:
    """Write examples in their order and return the metadata with the counts filled in.

    Everything is written beside `directory` and renamed at the end, so that `directory` is either absent or complete.
    `metadata.dropped` may be a counter that grows while `examples` are drawn: it is read at the end.

    Raises:
      DataError: `directory` exists already and `overwrite` is false, or there is no example.
    """
    final = Path(directory)
    if final.exists() and not overwrite:
        raise DataError(f"{final} exists already. Give another directory, delete it, or pass --overwrite.")
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digest = Fingerprint()
    shards = tuple(_write_shards(_hashed(examples, digest), partial, examples_per_shard))
    if not shards:
        shutil.rmtree(partial)
        raise DataError(
            f"no example of view {metadata.view!r} is left in split {metadata.split!r} "
            f"(dropped: {dict(metadata.dropped)}). Check the data with `pit-jax inspect-data`."
        )
    done = dataclasses.replace(
        metadata,
        dropped=dict(metadata.dropped),
        fingerprint=digest.value(),
        count=sum(count for _, count, _ in shards),
        shards=shards,
    )
    (partial / METADATA).write_text(json.dumps({"format": FORMAT} | dataclasses.asdict(done), indent=2) + "\n")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    return done


def _hashed(examples: Iterable[Example], digest: Fingerprint) -> Iterator[Example]:
    for example in examples:
        digest.add({name: value for name, value in example.items() if not isinstance(value, str)})
        yield example


def _write_shards(examples: Iterator[Example], directory: Path, size: int) -> Iterator[tuple[str, int, int]]:
    pending = next(examples, None)
    number = 0
    while pending is not None:
        name = f"examples-{number:05d}.array_record"
        # Groups of one record: examples are read at random, one by one.
        writer = array_record_module.ArrayRecordWriter(str(directory / name), "group_size:1")
        count = 0
        while pending is not None and count < size:
            writer.write(pack_example(pending))
            count += 1
            pending = next(examples, None)
        writer.close()
        yield name, count, (directory / name).stat().st_size
        number += 1


class CachedExamples(Sequence[dict[str, Any]]):
    """The examples of a cache as a sequence; each access reads one record from disk."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open a cache.

        Raises:
          DataError: there is no cache, it is not complete, or another version of pit_jax wrote it.
        """
        self.directory = Path(directory)
        self.metadata = read_metadata(self.directory)
        paths = [str(self.directory / name) for name, _, _ in self.metadata.shards]
        self._records: Any = grain.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return self.metadata.count

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return one example, or a list of them for a slice."""
        if isinstance(index, slice):
            wanted = list(range(*index.indices(len(self))))
            return [unpack_example(record) for record in self._records.__getitems__(wanted)] if wanted else []
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is outside of the {len(self)} examples of {self.directory}")
        return unpack_example(self._records[index % len(self)])


class CacheBlocks:
    """A cache as a block provider of `source.ShuffledSource`."""

    def __init__(self, examples: CachedExamples) -> None:
        """Keep the cache; nothing is read yet."""
        self._examples = examples
        self.fingerprint = examples.metadata.fingerprint

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return examples start..stop-1."""
        return self._examples[start:stop]


def read_metadata(directory: str | os.PathLike[str]) -> CacheMetadata:
    """Return what a cache holds, after checking that all of it is there.

    Raises:
      DataError: there is no cache, it is not complete, or another version of pit_jax wrote it.
    """
    directory = Path(directory)
    path = directory / METADATA
    if not path.is_file():
        what = (
            "has no metadata.json: it is no cache, or was not written to the end"
            if directory.is_dir()
            else "is missing"
        )
        raise DataError(f"cache {directory} {what}. Write it with `pit-jax cache`.")
    try:
        fields = json.loads(path.read_text())
        form = fields.pop("format")
        shards = tuple((str(name), int(count), int(size)) for name, count, size in fields.pop("shards"))
        metadata = CacheMetadata(**fields, shards=shards)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Write the cache again with `pit-jax cache`.") from error
    if form != FORMAT:
        raise DataError(f"{path} has format {form}, this version reads {FORMAT}. Write it again with `pit-jax cache`.")
    for name, _, size in metadata.shards:
        shard = directory / name
        found = shard.stat().st_size if shard.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(f"{shard} {state}: the cache is not complete. Copy it again or write it anew.")
    return metadata


def open_cache(directory: str | os.PathLike[str], *, view: str, split: str, codec: str) -> CachedExamples:
    """Open a cache that must have been made for this view, split and codec (its fingerprint; empty for text records).

    Raises:
      DataError: the cache is missing or broken, or was made for something else.
    """
    examples = CachedExamples(directory)
    metadata = examples.metadata
    for field, found, expected in (
        ("view", metadata.view, view),
        ("split", metadata.split, split),
        ("codec", metadata.codec, codec),
    ):
        if found != expected:
            raise DataError(
                f"cache {directory} was made for {field} {found!r}, this run needs {expected!r}. Write a cache with the"
                " run's own tokenizer, templates and lengths: `pit-jax cache`."
            )
    return examples
