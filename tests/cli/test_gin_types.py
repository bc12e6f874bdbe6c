"""Literals against declared types, as gin's values are checked before anything is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from pit_jax.cli.gin_types import Made, annotation_of, describe, fits
from pit_jax.models.presets import catalog


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Something gin makes."""

    number: int | None = None


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        (3, int, True),
        (3.0, int, False),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        (3, float, True),
        ("3", float, False),
        (None, int | None, True),
        ("a", int | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1, 2], tuple[int, ...], True),
        ([1, "b"], tuple[int, ...], False),
        ((1, 2, 3), tuple[int, int], False),
        ("ab", Sequence[str], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        (3, Part, False),
        (Made("@Part()"), Part, True),
        ([Made("@Part()"), 3], Sequence[Part], False),
        ("module:function", str | Callable[..., Any], True),
        (object(), Any, True),
    ],
)
def test_fits(value: Any, wanted: Any, expected: bool) -> None:
    assert fits(value, wanted) == expected


def test_types_are_named_in_words() -> None:
    assert describe(Part | Mapping[str, int] | None) == "@Part() or a dict {..: a whole number} or None"
    assert describe(tuple[str, ...]) == "a list of which each is a quoted string"
    assert describe(Literal["a", "b"]) == "one of 'a', 'b'"


def test_annotations_are_found_for_classes_and_functions() -> None:
    assert annotation_of(Part, "number") == int | None
    assert annotation_of(catalog.preset, "name") is str
    assert annotation_of(catalog.preset, "width") is Any
