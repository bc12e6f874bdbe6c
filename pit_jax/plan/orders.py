"""What the process that compiles is told and answers: pickled values, each behind its length."""

from __future__ import annotations

import dataclasses
import pickle
import struct
from typing import IO, Any

from pit_jax.plan.cost import Cost
from pit_jax.plan.topology import Target
from pit_jax.plan.verdict import Memory
from pit_jax.stages.pipeline import Recipe

_LENGTH = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """One thing to do for a recipe (whose mesh is that of the machine) and one of its stages.

    program: None to list the stage's programs. digest: None to lower the program and say what it is, or what was said
    then, to compile it.
    """

    recipe: Recipe
    machine: Target
    stage: str
    program: str | None = None
    digest: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """Names of a stage's programs, and remarks on what was assumed."""

    programs: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program before compilation; programs with one digest are the same."""

    digest: str
    arguments: int
    residents: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program after compilation, or the compiler's message. `memory` is without residents.

    seconds: by the clock; processor_seconds: of all threads together.
    """

    memory: Memory | None
    cost: Cost | None
    seconds: float
    processor_seconds: float = 0.0
    problem: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """The order cannot be done: an error of ours, in words."""

    message: str


Answer = Listed | Lowered | Compiled | Refused


def write(stream: IO[bytes], value: Any) -> None:
    """Send one value."""
    data = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def read(stream: IO[bytes]) -> Any:
    """Receive one value.

    Raises:
      EOFError: the other side has ended.
    """
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(*_LENGTH.unpack(head)))
