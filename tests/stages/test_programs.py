"""Programs on paper are those of a run: same shapes in the same places, every array counted once."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.data.pack import Packing
from pit_jax.decode import batches, refill
from pit_jax.models.lora import Lora
from pit_jax.plan import cost
from pit_jax.rl.curriculum import Round
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages import rl, supervised
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.programs import Program, stage_programs
from pit_jax.stages.run import Adapters

from . import small

MESH = MeshConfig(data=2, fsdp=2)


def _planned(stage: Any, mesh: MeshConfig = MESH, **experiment: Any) -> dict[str, Program]:
    """Return the programs of one of the small recipe's stages, by name."""
    whole = small.recipe(pathlib.Path("run"))
    stages = tuple(stage if old.name == stage.name else old for old in whole.stages)
    settings = small.experiment(mesh=mesh, **experiment)
    recipe = dataclasses.replace(whole, experiment=settings, stages=stages)
    count = mesh.data * mesh.fsdp
    programs, _ = stage_programs(recipe, stage, make_mesh(mesh, devices=jax.devices()[:count]))
    assert len({program.name for program in programs}) == len(programs)
    return {program.name: program for program in programs}


def _seen(tree: Any) -> list[tuple[tuple[int, ...], str, Any]]:
    """Return shape, dtype and the part on one device of every array."""
    return [
        (leaf.shape, str(leaf.dtype), leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else None)
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    ]


def _recording(function: Callable[..., Any], calls: list[Any], keep: slice) -> Callable[..., Any]:
    def recorded(*arguments: Any, **named: Any) -> Any:
        calls.append(_seen(arguments[keep]))
        return function(*arguments, **named)

    return recorded


@pytest.mark.parametrize(
    "stage",
    [
        small.sft("improver", training=small.training(1, micro_batches=2)),
        small.reward("gap", training=small.training(1, packing=Packing(rows=12, inputs=64, targets=28, segments=4))),
        dataclasses.replace(small.rl_improver(), training=small.rl_training(micro_batches=2, rollout_batch=8)),
    ],
    ids=lambda stage: stage.name,
)
def test_a_run_calls_what_was_planned(
    whole: pathlib.Path, tmp_path: pathlib.Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []
    answers: list[Any] = []
    for module in (supervised, rl):
        make = module.make_step
        monkeypatch.setattr(
            module, "make_step", lambda *a, make=make, **k: _recording(make(*a, **k), steps, slice(0, 4))
        )
    monkeypatch.setattr(batches, "generate", _recording(batches.generate, answers, slice(1, 4)))
    small.alone(whole, tmp_path / "run", stage, count=4, mesh=MESH, compile_threads=0)
    planned = _planned(stage, tokenizer=str(whole / "tokenizer"))
    assert steps[0] == _seen(planned["step"].arguments)
    wanted = {
        str(_seen(program.arguments[:3])) for name, program in planned.items() if "rollout" in name or "refer" in name
    }
    assert {str(call) for call in answers} == wanted


def test_adapters_share_one_base() -> None:
    adapters = Adapters(base="sft_policy", lora=Lora(rank=2, alpha=4.0))
    plain, adapted = _planned(small.rl_improver()), _planned(small.rl_improver(), adapters=adapters)

    def bytes_of(program: Program) -> int:
        leaves = [*jax.tree.leaves(program.arguments), *program.others]
        unique = {id(leaf): leaf for leaf in leaves}.values()
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in unique if leaf.dtype == "float32")

    one_model = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(plain["rollout"].arguments[0]))
    # Whole: parameters, two moments, anchor, reward model, policy; with adapters the base of all of them once.
    assert 6 * one_model <= bytes_of(plain["step"]) < 6.5 * one_model
    assert one_model <= bytes_of(adapted["step"]) < 2.5 * one_model
    base = {id(leaf) for leaf in jax.tree.leaves(adapted["step"].arguments[3])}
    assert base
    assert not base & {id(leaf) for leaf in adapted["step"].others}
    assert base & {id(leaf) for leaf in jax.tree.leaves(adapted["token scores"].arguments)}


def test_every_stage_has_its_programs() -> None:
    found = {stage.name: list(_planned(stage)) for stage in small.stages()}
    assert found["sft_policy"] == ["start", "step", "held-out loss"]
    assert found["reward_bt"] == ["start", "step", "held-out loss", "report scores"]
    assert found["rl_improver"][:6] == [
        "start",
        "rollout",
        "rewards",
        "policy references",
        "token scores",
        "experience",
    ]
    assert found["evaluate"] == ["policy answers", "reward scores", "improver answers", "gap scores"]


ONCE = (Round(name="rlhf", steps=1, references=("chosen",)),)
REFILLED = small.rl_policy(training=small.rl_training(rollout_batch=8), rounds=ONCE, snapshots=())
"""Twice as many samples as there are rows."""


@pytest.mark.slow
def test_rows_that_are_replaced_are_planned_as_they_are_run(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(refill, "_admit", _recording(refill._admit, calls, slice(0, 6)))
    mesh = MeshConfig(data=2)
    small.alone(whole, tmp_path / "run", REFILLED, count=2, mesh=mesh, portions=2)
    planned = _planned(REFILLED, mesh, tokenizer=str(whole / "tokenizer"), portions=2)
    assert "rollout" not in planned
    wanted = _seen(planned["rollout, prompts"].arguments)
    assert len(calls) > 1
    for call in calls:
        assert [one[:2] for one in call] == [one[:2] for one in wanted]
        # Where the batch lies follows from the functions; the others are where the plan says.
        assert [run for run, (*_, place) in zip(call, wanted, strict=True) if place is not None] == [
            one for one in wanted if one[2] is not None
        ]


def test_rows_that_are_replaced_take_the_work_of_whole_batches() -> None:
    """A batch read in portions and drawn in one go multiplies as much as the program that does both."""
    mesh = MeshConfig(data=2)
    places = make_mesh(mesh, devices=jax.devices()[:2])

    def flops(program: Program) -> float:
        text = program.lower(places, mesh.rules).compile().as_text()
        return cost.count(text, dict(places.shape), program.trips).flops

    whole, planned = _planned(REFILLED, mesh)["rollout"], _planned(REFILLED, mesh, portions=2)
    read, drawn = planned["rollout, prompts"], planned["rollout, tokens"]
    portion, batch = (program.arguments[n].tokens.shape[0] for program, n in ((read, 2), (whole, 1)))
    assert batch / portion * flops(read) + flops(drawn) == pytest.approx(flops(whole), rel=0.01)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="be divisible by data x fsdp = 4"):
        _planned(small.sft("policy", training=small.training(1, batch_size=6)))


def test_what_had_to_be_assumed_is_said() -> None:
    recipe = dataclasses.replace(
        small.recipe(pathlib.Path("run")), experiment=small.experiment(mesh=MESH, tokenizer="not/there.model")
    )
    assert isinstance(recipe, Recipe)
    _, remarks = stage_programs(recipe, recipe.stages[0], make_mesh(MESH))
    assert remarks == ["The tokenizer 'not/there.model' cannot be read here: templates are counted in bytes."]
