"""The process that compiles: started by `compile.Pool`, told what to do on its standard input.

A compiler can end the process it runs in, so it never runs in the one that talks to the user.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
import time
from typing import Any

from pit_jax.core.errors import PitError
from pit_jax.plan import cost as costs
from pit_jax.plan.orders import Answer, Compiled, Listed, Lowered, Order, Refused, read, write
from pit_jax.plan.topology import Target
from pit_jax.plan.verdict import Memory, overflow
from pit_jax.stages.pipeline import Recipe


class _Compiler:
    """Does orders; keeps the stage and the program of the last one."""

    def __init__(self) -> None:
        self._stage: tuple[tuple[Recipe, Target, str], Any, list[Any], list[str]] | None = None
        self._lowered: tuple[str, Any, Any] | None = None
        self._sizes: dict[tuple[Any, ...], int] = {}

    def do(self, order: Order) -> Answer:
        """Return the answer to one order."""
        try:
            mesh, programs, remarks = self._programs(order)
            if order.program is None:
                return Listed(programs=tuple(program.name for program in programs), remarks=tuple(remarks))
            program = next(program for program in programs if program.name == order.program)
            if order.digest is None:
                return self._lower(program, mesh, order)
            return self._compile(mesh, program, order)
        except PitError as error:
            return Refused(message=str(error))

    def _programs(self, order: Order) -> tuple[Any, list[Any], list[str]]:
        from pit_jax.plan.devices import mesh_on
        from pit_jax.stages.programs import stage_programs

        key = (order.recipe, order.machine, order.stage)
        if self._stage is None or self._stage[0] != key:
            mesh = mesh_on(order.recipe.experiment.mesh, order.machine)
            stage = next(stage for stage in order.recipe.stages if stage.name == order.stage)
            programs, remarks = stage_programs(order.recipe, stage, mesh)
            self._stage, self._lowered = (key, mesh, programs, remarks), None
        return self._stage[1:]

    def _lower(self, program: Any, mesh: Any, order: Order) -> Lowered:
        start = time.monotonic()
        lowered = program.lower(mesh, order.recipe.experiment.mesh.rules)
        text = f"{order.machine} {dict(mesh.shape)} {program.trips}\n{lowered.as_text()}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._lowered = (digest, program, lowered)
        return Lowered(
            digest=digest,
            arguments=program.argument_bytes,
            residents=self._size_of(program.others),
            seconds=time.monotonic() - start,
        )

    def _size_of(self, leaves: list[Any]) -> int:
        """Return the bytes of a device that arrays take, as the machine lays them out: TPUs pad to whole tiles."""
        import jax

        there = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
        key = tuple((leaf.shape, str(leaf.dtype), str(leaf.sharding)) for leaf in there)
        if there and key not in self._sizes:
            holds = jax.jit(lambda *leaves: 0.0, keep_unused=True).lower(*there).compile()
            sizes = holds.memory_analysis()
            assert sizes is not None
            self._sizes[key] = sizes.argument_size_in_bytes
        return self._sizes.get(key, 0)

    def _compile(self, mesh: Any, program: Any, order: Order) -> Compiled:
        import jax

        if self._lowered is None or self._lowered[0] != order.digest:
            self._lower(program, mesh, order)
        assert self._lowered is not None
        _, program, lowered = self._lowered
        start, busy = time.monotonic(), time.process_time()
        try:
            compiled = lowered.compile()
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            return _failed(error, program, lowered, dict(mesh.shape), time.monotonic() - start)
        seconds, busy = time.monotonic() - start, time.process_time() - busy
        sizes = compiled.memory_analysis()
        parts = {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "outputs": sizes.output_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,
            "code": sizes.generated_code_size_in_bytes,
        }
        total = sum(parts.values()) - 2 * parts["aliased"]
        memory = Memory(**parts, residents=0, total=total)
        cost = costs.count(compiled.as_text(), dict(mesh.shape), program.trips)
        return Compiled(memory=memory, cost=cost, seconds=seconds, processor_seconds=busy)


def _failed(error: Exception, program: Any, lowered: Any, sizes: dict[str, int], seconds: float) -> Compiled:
    """Return what is known of a program that the compiler refused: what it wanted, and its FLOPs shared out evenly."""
    message = str(error).strip()
    wanted = overflow(message)
    memory = None if wanted is None else Memory(arguments=program.argument_bytes, residents=0, total=wanted)
    whole = costs.count(lowered.as_text(dialect="hlo"), sizes, program.trips)
    cost = costs.Cost(
        flops=whole.flops / math.prod(sizes.values()), bytes=0.0, collectives=(), uncounted=whole.uncounted
    )
    return Compiled(memory=memory, cost=cost, seconds=seconds, problem=message.splitlines()[0][:500])


def main() -> None:
    """Answer orders until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a compiler prints must not mix with the answers
    logging.basicConfig(level=logging.ERROR)
    compiler = _Compiler()
    while True:
        try:
            order = read(sys.stdin.buffer)
        except EOFError:
            return
        write(answers, compiler.do(order))


if __name__ == "__main__":
    main()
