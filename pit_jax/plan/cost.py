"""What a compiled program does on one chip: FLOPs, bytes of main memory, collectives; loops times their trips.

XLA's own `cost_analysis` counts the body of a loop once, and every model here is a loop over layers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping

import numpy as np

from pit_jax.plan.hlo import Computation, Instruction, Module, axes_of, first_group, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "opt-barrier", "iota", "domain", "add-dependency",
})  # fmt: skip
_SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    axes: mesh axes, joined with "+". devices: in a group. count: how often one runs. bytes: that a chip puts in or gets
    out, whichever is more. wire_bytes: that it sends in a ring.
    """

    kind: str
    axes: str
    devices: int
    count: float
    bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a program does on one chip.

    flops: of matrix products, convolutions and kernels that say so. bytes: read from and written to main memory.
    uncounted: kernels that do not say what they do, and loops of unknown length.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    uncounted: tuple[str, ...]


def count(text: str, sizes: Mapping[str, int], trips: int = 1) -> Cost:
    """Return the cost of an optimised program.

    Args:
      text: `compiled.as_text()`.
      sizes: the mesh's axes in their order, and their sizes.
      trips: of loops whose length shows only when they run.
    """
    counter = _Counter(parse(text), sizes, trips)
    tally = counter.of(counter.module.entry, fused=False)
    return Cost(
        flops=tally.flops,
        bytes=tally.bytes,
        collectives=tuple(
            Collective(kind=kind, axes=axes, devices=devices, count=times, bytes=size, wire_bytes=wire)
            for (kind, axes, devices), (times, size, wire) in sorted(tally.collectives.items())
        ),
        uncounted=tuple(sorted(tally.uncounted)),
    )


@dataclasses.dataclass
class _Tally:
    """Sums over instructions; `collectives` maps (kind, axes, devices) to (count, bytes, bytes on the wire)."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[tuple[str, str, int], tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    uncounted: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: _Tally, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.uncounted |= other.uncounted
        for key, values in other.collectives.items():
            before = self.collectives.get(key, (0.0, 0.0, 0.0))
            self.collectives[key] = tuple(b + times * v for b, v in zip(before, values, strict=True))  # type: ignore[assignment]


class _Counter:
    """Walks a module from its entry; the tally of a computation is made once."""

    def __init__(self, module: Module, sizes: Mapping[str, int], trips: int) -> None:
        self.module, self._sizes, self._trips = module, sizes, trips
        self._known: dict[tuple[str, bool], _Tally] = {}

    def of(self, name: str, *, fused: bool) -> _Tally:
        """Return the tally of a computation; inside a fusion nothing goes through main memory."""
        if (name, fused) not in self._known:
            tally = _Tally()
            computation = self.module.computations[name]
            for instruction in computation.instructions:
                self._add(tally, computation, instruction, fused)
            self._known[name, fused] = tally
        return self._known[name, fused]

    def _add(self, tally: _Tally, computation: Computation, instruction: Instruction, fused: bool) -> None:
        opcode = instruction.opcode
        if opcode in ("dot", "convolution"):
            tally.flops += _flops(computation, instruction)
        elif opcode == "while":
            trips = self._length(computation, instruction)
            tally.uncounted |= {"loop of unknown length"} if trips is None and self._trips == 1 else set()
            for called in instruction.called("body", "condition"):
                tally.add(self.of(called, fused=fused), self._trips if trips is None else trips)
        elif opcode == "fusion":
            for called in instruction.called("calls"):
                tally.add(self.of(called, fused=True))
        elif opcode == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            tally.add(max((self.of(name, fused=fused) for name in branches), key=lambda t: (t.flops, t.bytes)))
        elif opcode in ("call", "async-start"):
            for called in instruction.called("to_apply", "calls"):
                tally.add(self.of(called, fused=fused))
        elif opcode == "custom-call":
            self._add_kernel(tally, computation, instruction)
        elif opcode.removesuffix("-start") in COLLECTIVES:
            self._add_collective(tally, computation, instruction)
        if not fused:
            tally.bytes += self._moved(computation, instruction)

    def _add_collective(self, tally: _Tally, computation: Computation, instruction: Instruction) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if _is_echo(computation, instruction):
            return
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        group = first_group(instruction, math.prod(self._sizes.values()))
        if len(group) < 2:
            return
        operands = sum(_operand(computation, name).size for name in instruction.operands)
        out = operands if instruction.opcode.endswith("-start") and kind == "all-reduce" else instruction.size
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            out -= operands  # the result is a tuple of the operand and what comes of it
        size, devices = max(operands, out), len(group)
        ring = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(kind, (devices - 1) / devices)
        key = (kind, "+".join(axes_of(group, self._sizes)), 2 if kind == "collective-permute" else devices)
        tally.add(_Tally(collectives={key: (1.0, float(size), ring * size)}))

    def _add_kernel(self, tally: _Tally, computation: Computation, instruction: Instruction) -> None:
        config = re.search(r"backend_config=(\{.*\})", instruction.attributes)
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        text, name = config[1] if config else "", target[1] if target else ""
        if "dot_dimension_numbers" in text:  # cuBLAS and oneDNN
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', text)
            lhs = _operand(computation, instruction.operands[0]).arrays[0].dims
            width = math.prod(lhs[int(n)] for n in re.findall(r"\d+", contracted[1])) if contracted else 1
            tally.flops += 2.0 * math.prod(instruction.arrays[0].dims) * width
        elif "matmul" in name:
            lhs = _operand(computation, instruction.operands[0]).arrays[0].dims
            tally.flops += 2.0 * math.prod(instruction.arrays[0].dims) * lhs[-1]
        elif name in ("tpu_custom_call", "__gpu$xla.gpu.triton") or "fmha" in name:
            estimate = re.search(r'"cost_estimate":(\{[^}]*\})', text)
            flops = float(json.loads(estimate[1]).get("flops", 0)) if estimate else _splash(computation, instruction)
            tally.flops += flops
            tally.uncounted |= set() if flops else {f"kernel {_title(instruction)}"}

    def _length(self, computation: Computation, loop: Instruction) -> int | None:
        """Return how often a loop runs, None where that shows only when it does."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        (name,) = loop.called("condition")
        condition = self.module.computations[name]
        compare, bound = condition.root, None
        if compare.opcode == "fusion":
            (called,) = compare.called("calls")
            inner = self.module.computations[called]
            compare, bound = inner.root, compare
            condition = inner if compare.opcode == "compare" else condition
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        right = condition.by_name[compare.operands[1]]
        if right.opcode == "parameter" and bound is not None:
            outer = self.module.computations[name]
            right, condition = outer.by_name[bound.operands[int(right.inside)]], outer
        if right.opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", right.attributes)
            initial = computation.by_name.get(loop.operands[0])
            if index is None or initial is None or initial.opcode != "tuple":
                return None
            right = computation.by_name[initial.operands[int(index[1])]]
        return int(right.inside) if right.opcode == "constant" else None

    def _moved(self, computation: Computation, instruction: Instruction) -> int:
        """Return the bytes of main memory that an instruction reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        if opcode in _SLICES:
            return 2 * instruction.bytes
        if opcode == "dynamic-update-slice":
            return 2 * _operand(computation, instruction.operands[1]).bytes
        operands = [_operand(computation, name) for name in instruction.operands]
        if opcode == "fusion":
            (called,) = instruction.called("calls")
            return _fusion_bytes(self.module.computations[called], instruction, operands)
        if opcode.endswith("-start"):  # the result repeats the operand
            return sum(operand.bytes for operand in operands) + max(
                instruction.bytes - sum(o.bytes for o in operands), 0
            )
        return instruction.bytes + sum(operand.bytes for operand in operands)


def _operand(computation: Computation, name: str) -> Instruction:
    return computation.by_name[name]


def _is_echo(computation: Computation, instruction: Instruction) -> bool:
    """Return whether a collective in a TPU's overlapped chain is written down again, where it goes on or ends."""
    if "chain_id" not in instruction.attributes:
        return False
    users = computation.users[instruction.name]
    return not any("AsyncCollectiveStart" in user.attributes for user in users)


def _splash(computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs of JAX's splash attention kernels, which do not say them, as if nothing were masked.

    Products of the size Q K^T: two forward; for the gradient of the queries three, for that of keys and values four,
    for all in one kernel five.
    """
    kernel = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {_title(instruction)}")
    arrays = [array for name in instruction.operands for array in _operand(computation, name).arrays]
    floats = [array.dims for array in arrays if array.dtype in ("bf16", "f16", "f32") and len(array.dims) > 2]
    if kernel is None or len(floats) < 3:
        return 0.0
    products = {"fwd": 2, "dq": 3, "dkv": 4 if len(instruction.arrays) < 3 else 5}[kernel[1]]
    queries, keys = floats[:2]
    return 2.0 * products * math.prod(queries) * keys[-2]


def _title(instruction: Instruction) -> str:
    named = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return named[1].rsplit("/", 1)[-1] if named else instruction.name


def _fusion_bytes(called: Computation, fusion: Instruction, operands: list[Instruction]) -> int:
    """Return what a fusion reads and writes: of an array it only slices or updates, the slice."""
    total = 0
    for number, operand in enumerate(operands):
        parameter = called.parameters.get(number)
        users = called.users[parameter.name] if parameter is not None else []
        if parameter is not None and users and all(_only_part(user, parameter.name) for user in users):
            total += sum(_part(called, user) for user in users) if operand.bytes else 0
        else:
            total += operand.bytes
    roots = [called.by_name[n] for n in called.root.operands] if called.root.opcode == "tuple" else [called.root]
    if len(roots) == len(fusion.arrays):
        for root, array in zip(roots, fusion.arrays, strict=True):
            inner = called.by_name[root.operands[0]] if root.opcode == "bitcast" else root
            whole = inner.opcode != "dynamic-update-slice"
            total += 0 if array.near else array.bytes if whole else _part(called, inner)
        return total
    return total + fusion.bytes


def _only_part(user: Instruction, name: str) -> bool:
    """Return whether an instruction takes a slice of an array, or writes one, rather than reading all of it."""
    return user.opcode in (*_SLICES, "dynamic-update-slice") and user.operands[0] == name


def _part(computation: Computation, user: Instruction) -> int:
    return computation.by_name[user.operands[1]].size if user.opcode == "dynamic-update-slice" else user.size


def _flops(computation: Computation, instruction: Instruction) -> float:
    """Return 2 x the multiplications of a dot or convolution."""
    out = instruction.arrays[0].dims
    lhs, rhs = (_operand(computation, name).arrays[0].dims for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        return 2.0 * math.prod(out) * math.prod(lhs[n] for n in instruction.numbers("lhs_contracting_dims"))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    kernel, result = labels[2], labels[3]
    products = 2.0 * out[result.index("b")] * out[result.index("f")] * rhs[kernel.index("i")]
    window = _Window.of(instruction)
    for n in range(len(kernel) - 2):
        sizes = (lhs[labels[1].index(str(n))], rhs[kernel.index(str(n))], out[result.index(str(n))])
        products *= window.pairs(n, *sizes)
    return products


@dataclasses.dataclass(frozen=True)
class _Window:
    """The window of a convolution. TPUs write batched products as convolutions in which most places are padding."""

    fields: Mapping[str, list[str]]

    @classmethod
    def of(cls, instruction: Instruction) -> _Window:
        found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
        pairs = re.findall(r"(\w+)=(\S+)", found[1]) if found else []
        return cls({name: value.split("x") for name, value in pairs})

    def _number(self, name: str, axis: int, default: int) -> int:
        return int(self.fields[name][axis].split("_")[0]) if name in self.fields else default

    def pairs(self, axis: int, inputs: int, kernel: int, outputs: int) -> int:
        """Return how many (output, kernel) places of an axis meet an input and not padding or a gap."""
        stride, low = self._number("stride", axis, 1), self._number("pad", axis, 0)
        spread, gap = self._number("lhs_dilate", axis, 1), self._number("rhs_dilate", axis, 1)
        place = np.arange(outputs)[:, None] * stride - low + np.arange(kernel)[None, :] * gap
        inside = (place >= 0) & (place <= (inputs - 1) * spread) & (place % spread == 0)
        return int(inside.sum())
