"""Whether a value written in gin suits the parameter it is bound to: `steps = 3.5` should not train 4 steps.

Classes check what their values mean; of which kind a value is, is checked here once, against annotations.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

_MAPPINGS = (dict, collections.abc.Mapping)
_SEQUENCES = (list, tuple, collections.abc.Sequence)
_SCALARS = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a quoted string", type(None): "None"}


@dataclasses.dataclass(frozen=True)
class Made:
    """A part of a value that gin will make, such as `@optim.Optimizer()`: it suits everything."""

    written: Any

    def __repr__(self) -> str:
        return repr(self.written)


def annotation_of(target: Any, parameter: str) -> Any:
    """Return the type a class or function declares for a parameter, `Any` where it declares none."""
    owner = target.__init__ if inspect.isclass(target) and not dataclasses.is_dataclass(target) else target
    try:
        return typing.get_type_hints(owner).get(parameter, Any)
    except (NameError, TypeError):  # Names that only a type checker imports.
        return Any


def fits(value: Any, wanted: Any) -> bool:
    """Return whether a literal is of a declared type; types that no literal can show are taken as they are."""
    if isinstance(value, Made):
        return True
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if wanted in (None, type(None)):
        return value is None
    if wanted in _SCALARS:
        return isinstance(value, _SCALARS[wanted]) and (wanted is bool or not isinstance(value, bool))
    if origin in _MAPPINGS:
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin in _SEQUENCES:
        return isinstance(value, list | tuple) and _items_fit(tuple(value), origin, arguments)
    # gin has no way to write a dataclass down but `@Class()`
    return not (inspect.isclass(wanted) and dataclasses.is_dataclass(wanted))


def _items_fit(items: tuple[Any, ...], origin: Any, arguments: tuple[Any, ...]) -> bool:
    if origin is tuple and Ellipsis not in arguments:
        return len(items) == len(arguments) and all(map(fits, items, arguments))
    return all(fits(item, arguments[0]) for item in items)


def describe(wanted: Any) -> str:
    """Return a declared type in words, as far as there are any."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in _MAPPINGS:
        return "a dict {..: " + describe(arguments[1]) + "}"
    if origin in _SEQUENCES:
        return f"a list of which each is {describe(arguments[0])}" if arguments else "a list"
    if wanted in _NAMES:
        return _NAMES[wanted]
    return f"@{wanted.__name__}()" if inspect.isclass(wanted) else str(wanted)
