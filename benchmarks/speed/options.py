"""Arguments that the benchmarks of speed have in common, ours and those of other projects."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.speed.shapes import SHAPES, Shape
from benchmarks.speed.work import WORKS, Work

_CHANGES = ("rows", "prompt", "response", "samples", "at_once", "mean_length")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of --shape, the size of the work, --steps, --warmup and --output."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=tuple(SHAPES), default="nano")
    for name in _CHANGES:
        made.add_argument(f"--{name}", type=int, default=None, help="instead of the shape's default (speed/work.py)")
    made.add_argument("--steps", type=int, default=5, help="that are measured")
    made.add_argument("--warmup", type=int, default=2, help="steps before them, which compile")
    made.add_argument("--variant", default="", help="what the measurement is called")
    made.add_argument("--output", type=Path, default=None, help="directory for a JSON file of everything")
    return made


def asked(arguments: argparse.Namespace, kind: str) -> tuple[Shape, Work]:
    """Return the shape, and its work of a kind with the sizes that were given."""
    given = {name: vars(arguments)[name] for name in _CHANGES if vars(arguments)[name] is not None}
    return SHAPES[arguments.shape], dataclasses.replace(WORKS[arguments.shape][kind], **given)


def sizes(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments of `parser` again, but for --variant and --output, for a process that is to do the same."""
    names = ("shape", *_CHANGES, "steps", "warmup")
    return [f"--{name}={vars(arguments)[name]}" for name in names if vars(arguments)[name] is not None]


def settings(texts: list[str]) -> dict[str, Any]:
    """Return the values of `FIELD=VALUE` texts; a value is a Python literal, or else a word.

    Raises:
      SystemExit: a text has no `=`.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"--set {text!r} must be FIELD=VALUE, for example --set scan_layers=True")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
