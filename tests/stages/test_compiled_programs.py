"""What compiled programs of the stages show: no whole logits, no way to the host, donated state, few collectives."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pit_jax.core.tree import size_in_bytes
from pit_jax.core.types import Conditional
from pit_jax.plan import cost, hlo
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages.pipeline import Recipe, Stage
from pit_jax.stages.programs import Program, stage_programs
from pit_jax.text.codec import Lengths
from tests.stages import small

VOCABULARY, CHUNK = 4000, 500
DEVICES = 4
FSDP, DATA = MeshConfig(data=1, fsdp=DEVICES), MeshConfig(data=DEVICES, fsdp=1)
TO_HOST = {"infeed", "outfeed", "send", "recv"}


def stage_of(kind: str) -> Stage:
    return {"sft": small.sft("policy"), "gap": small.reward("gap"), "rl": small.rl_policy()}[kind]


def recipe(kind: str, mesh: MeshConfig, chunk: int) -> Recipe:
    model = dataclasses.replace(small.MODEL, vocab_size=VOCABULARY, logprob_chunk=chunk)
    experiment = small.experiment(model=model, mesh=mesh)
    before = {"sft": (), "gap": (small.sft("policy"),), "rl": (small.sft("policy"), small.reward("bt"))}[kind]
    return Recipe(model_dir="/nowhere", seed=0, experiment=experiment, stages=(*before, stage_of(kind)))


@functools.cache
def programs(kind: str, mesh: MeshConfig) -> dict[str, Program]:
    found, _ = stage_programs(recipe(kind, mesh, CHUNK), stage_of(kind), make_mesh(mesh))
    return {program.name: program for program in found}


@functools.cache
def compiled(kind: str, name: str, mesh: MeshConfig = FSDP) -> str:
    program = programs(kind, mesh)[name]
    return program.lower(make_mesh(mesh), mesh.rules).compile().as_text()


def largest_of_floats(text: str) -> int:
    """Return the entries of the largest float32 array of a program."""
    arrays = [
        array
        for computation in hlo.parse(text).computations.values()
        for instruction in computation.instructions
        for array in instruction.arrays
    ]
    return max(math.prod(array.dims) for array in arrays if array.dtype == "f32")


def ways_to_the_host(text: str) -> list[str]:
    """Return the instructions by which a program would wait for its host, or be waited for."""
    return [
        instruction.name
        for computation in hlo.parse(text).computations.values()
        for instruction in computation.instructions
        if instruction.opcode.removesuffix("-done") in TO_HOST
        or (instruction.opcode == "custom-call" and "callback" in instruction.attributes)
    ]


FAST = [("sft", "step")]
SLOW = [
    ("gap", "step"),
    ("rl", "step"),
    ("rl", "token scores"),
    ("rl", "rollout"),
    ("rl", "rewards"),
    ("rl", "experience"),
]
ALL = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
STEPS = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW[:2])]


def whole_logits() -> int:
    """Return the entries of the logits of all response tokens of a device."""
    lengths = small.experiment().lengths
    assert isinstance(lengths, Lengths)
    return small.training().batch_size // DEVICES * lengths.targets * VOCABULARY


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_logits_of_all_tokens_never_exist(kind: str, name: str) -> None:
    assert largest_of_floats(compiled(kind, name)) < whole_logits()


@pytest.mark.slow
def test_the_largest_array_is_found() -> None:
    """With the whole vocabulary in one piece the logits do exist."""
    whole = recipe("sft", FSDP, VOCABULARY)
    found, _ = stage_programs(whole, stage_of("sft"), make_mesh(FSDP))
    step = next(program for program in found if program.name == "step")
    assert largest_of_floats(step.lower(make_mesh(FSDP), FSDP.rules).compile().as_text()) >= whole_logits()


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_no_program_meets_the_host(kind: str, name: str) -> None:
    assert ways_to_the_host(compiled(kind, name)) == []


def test_a_callback_is_found() -> None:
    def talks(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: None, x)
        return x + 1

    assert ways_to_the_host(jax.jit(talks).lower(jnp.ones(3)).compile().as_text())


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_every_array_of_the_state_is_updated_in_place(kind: str, name: str) -> None:
    leaves = len(jax.tree.leaves(programs(kind, FSDP)[name].arguments[0]))
    head = compiled(kind, name).splitlines()[0]
    aliased = {int(number) for number in re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)", head)}
    assert aliased == set(range(leaves))


def embedded_bytes(program: Program) -> int:
    """Return the bytes of the embeddings of all tokens of a step's batch."""
    batch = program.arguments[1]
    inputs = batch if isinstance(batch, Conditional) else batch.inputs
    return 4 * small.MODEL.width * (inputs.prompt.size + inputs.response.size)


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_fully_sharded_parameters_are_gathered_and_gradients_summed(kind: str, name: str) -> None:
    """Forward and backward pass gather each matrix, the head's blocks once more; gradients are summed once."""
    program = programs(kind, FSDP)[name]
    size = size_in_bytes(program.arguments[0].params)
    sent = cost.count(compiled(kind, name), {"fsdp": DEVICES}, program.trips).collectives
    by_kind = {one.kind: one.bytes for one in sent}
    assert set(by_kind) <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    assert 0 < by_kind["all-gather"] <= 3 * size
    assert 0 < by_kind.get("all-reduce", 0) + by_kind.get("reduce-scatter", 0) <= 1.1 * size
    # States change hands where the embedding, which is cut along its width, is looked up: never weights.
    assert by_kind.get("all-to-all", 0) <= embedded_bytes(program)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [*FAST, *SLOW[:2]])
def test_data_parallelism_sums_gradients_and_sends_nothing_else(kind: str, name: str) -> None:
    """XLA on CPU sums the gradients of each use of a parameter over the devices before it adds them up.

    A tied embedding is used by the head too; where prompts are shared, prompts and responses use each matrix.
    """
    program = programs(kind, DATA)[name]
    size = size_in_bytes(program.arguments[0].params)
    embedding = 4 * VOCABULARY * small.MODEL.width
    sent = cost.count(compiled(kind, name, DATA), {"data": DEVICES}, program.trips).collectives
    assert {one.kind for one in sent} == {"all-reduce"}
    assert 0.9 * size <= sum(one.bytes for one in sent) <= 1.05 * ((2 if kind == "rl" else 1) * size + embedding)
