"""Configuration dataclasses, and arrays, as JSON and back: what a checkpoint carries beside its parameters."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pit_jax.core.errors import CheckpointError

_TYPE = "__type__"


def to_json(value: Any) -> Any:
    """Return plain JSON data for a value made of dataclasses, containers and scalars.

    A dataclass becomes an object with its fields and its import path under `__type__`; a function or class
    becomes its import path. Anything else is a TypeError: configurations hold data only.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_TYPE: f"{type(value).__module__}:{type(value).__qualname__}"} | fields
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted(to_json(item) for item in value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    raise TypeError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")


def from_json(data: Any) -> Any:
    """Return the value `to_json` was given; lists come back as tuples, so that configs stay hashable.

    Only classes of this package are built: a checkpoint is data and must not be able to run code.
    """
    if isinstance(data, Mapping):
        fields = {key: from_json(item) for key, item in data.items() if key != _TYPE}
        return _build(data[_TYPE], fields) if _TYPE in data else fields
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    return data


def _build(path: str, fields: Mapping[str, Any]) -> Any:
    found = _dataclass(path)
    known = {field.name for field in dataclasses.fields(found)}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise CheckpointError(
            f"The configuration of {path!r} has {unknown}, which this version of pit_jax does not know. "
            "Use the version that wrote it."
        )
    return found(**fields)


def _dataclass(path: str) -> type:
    module, _, name = path.partition(":")
    if not module.startswith("pit_jax."):
        raise CheckpointError(
            f"{_TYPE} = {path!r} must name a class of pit_jax. The configuration was not written by this package."
        )
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The configuration needs {path!r}, which this version of pit_jax does not have. "
            "Use the version that wrote it."
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise CheckpointError(f"{_TYPE} = {path!r} must name a configuration dataclass.")
    return found


def flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, scalar or empty container) for nested JSON data."""
    if isinstance(data, Mapping) and (data or not prefix):
        items: Iterator[tuple[Any, Any]] = iter(data.items())
    elif isinstance(data, list) and (data or not prefix):
        items = iter(enumerate(data))
    else:
        yield prefix, data
        return
    for key, item in items:
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))


def differences(old: Any, new: Any) -> list[str]:
    """Return a line `path: old -> new` for every scalar in which two pieces of JSON data differ."""
    left, right = dict(flatten(old)), dict(flatten(new))
    missing = "(absent)"
    paths = [*left, *(path for path in right if path not in left)]
    pairs = ((path, left.get(path, missing), right.get(path, missing)) for path in paths)
    return [f"{path}: {before!r} -> {after!r}" for path, before, after in pairs if _differ(before, after)]


def _differ(before: Any, after: Any) -> bool:
    """Return whether two scalars differ; True and 1 do, although Python calls them equal, 1 and 1.0 do not."""
    return before != after or isinstance(before, bool) != isinstance(after, bool)


def array_to_json(array: np.ndarray) -> dict[str, Any]:
    """Return an array as JSON data from which `array_from_json` makes the same bits."""
    packed = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "zlib": packed}


def array_from_json(data: Mapping[str, Any]) -> np.ndarray:
    """Return the array that `array_to_json` was given."""
    content = zlib.decompress(base64.b64decode(data["zlib"]))
    return np.frombuffer(content, np.dtype(data["dtype"])).reshape(data["shape"])
