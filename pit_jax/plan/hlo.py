"""XLA's optimised programs as text, parsed into computations and instructions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")


class Array(NamedTuple):
    """One array of an instruction's result; `near`: in a memory on the chip rather than in its main memory."""

    dtype: str
    dims: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> int:
        """Size without padding; 0 for tokens and the like."""
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype, 0)
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = result opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result: one, or those of a tuple."""
        return tuple(
            Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "S(" in (layout or ""))
            for dtype, dims, layout in _ARRAY.findall(self.result)
        )

    @property
    def bytes(self) -> int:
        """Size of the result in main memory."""
        return sum(array.bytes for array in self.arrays if not array.near)

    @property
    def size(self) -> int:
        """Size of the result wherever it is."""
        return sum(array.bytes for array in self.arrays)

    def called(self, *attributes: str) -> list[str]:
        """Return the computations that some of `calls`, `to_apply`, `body`, `condition` ... name."""
        found = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", match[1]) if match else []
        return found

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Return the numbers of an attribute such as `dimensions={0,1}`."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in match[1].split(",") if n) if match else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """The instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """Who reads each instruction."""
        found: dict[str, list[Instruction]] = {instruction.name: [] for instruction in self.instructions}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """The parameters by their number."""
        return {int(i.inside): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations and the name of the one it starts with."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Return the module that `compiled.as_text()` shows."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
            continue
        if header := _HEADER.match(line):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif match := _LINE.match(line):
            lines.append(_instruction(match[2], match[3], bool(match[1])))
    return Module(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, call = rest[:end], rest[end:].lstrip()
    opcode = _OPCODE.match(call)
    if opcode is None:
        return Instruction(name, result, call.split("(")[0], (), "", "", root)
    close = _closing(call, opcode.end() - 1)
    inside = call[opcode.end() : close]
    operands = re.findall(r"%([\w.\-]+)", inside) or [part.split()[-1] for part in inside.split(",") if part.split()]
    return Instruction(name, result, opcode[1], tuple(operands), inside, call[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text) - 1


def first_group(instruction: Instruction, devices: int) -> list[int]:
    """Return the positions in the mesh of the devices of a collective's first group; all where none are named."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        ends = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
        return list(next((pair for pair in ends if pair[0] != pair[1]), ()))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(d) for d in iota[3].split(",")]
        order = [int(d) for d in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = set(re.findall(r"'(\w+)'", mesh[2]))
        return _along(sizes, chosen)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in listed[1].split(",")]
    return list(range(devices))


def _along(sizes: Mapping[str, int], chosen: set[str]) -> list[int]:
    """Return the positions that differ from 0 along the chosen axes only."""
    strides = dict(zip(sizes, [math.prod(list(sizes.values())[n + 1 :]) for n in range(len(sizes))], strict=True))
    steps = [[n * strides[axis] for n in range(size)] for axis, size in sizes.items() if axis in chosen]
    return sorted(sum(parts) for parts in itertools.product(*steps))


def axes_of(group: Sequence[int], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.asarray(group), tuple(sizes.values()))
    return tuple(axis for axis, index in zip(sizes, places, strict=True) if len(set(index.tolist())) > 1)
