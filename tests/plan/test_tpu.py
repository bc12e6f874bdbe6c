"""Recipes compiled for TPUs that are not there; needs libtpu (`pip install 'pit_jax[plan]'`)."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from pit_jax.cli.gin_config import GinSource, build
from pit_jax.cli.stages import ROOT
from pit_jax.plan import advice
from pit_jax.plan.compile import Job, Pool
from pit_jax.plan.topology import resize, target
from pit_jax.plan.verdict import Planned
from pit_jax.stages.pipeline import Recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

BOUND = ("MODEL_DIR='run'", "INITIAL_CHECKPOINT_PATH='start/here'", "TOKENIZER='bytes'")
LARGE = ("pit_t5_xxl", "pit_gemma3_27b")


def _recipe(name: str, machine: str, *bindings: str, more: tuple[str, ...] = ()) -> Recipe:
    """Return a shipped recipe with its mesh resized."""
    made: Recipe = build(GinSource(files=(f"recipes/{name}.gin", *more), bindings=bindings), ROOT).value
    mesh = resize(made.experiment.mesh, target(machine))
    return dataclasses.replace(made, experiment=dataclasses.replace(made.experiment, mesh=mesh))


def _plan(recipe: Recipe, machine: str, stage: str, *names: str) -> list[Planned]:
    with Pool(target(machine)) as pool:
        programs = names or pool.programs(recipe, stage).programs
        return list(pool.plan([Job(recipe=recipe, stage=stage, program=name) for name in programs]))


def test_a_small_slice() -> None:
    recipe = _recipe("demo", "v5e:2x2", "optim.Optimizer.kind='sgd'", "DecoderOnlyConfig.scan_layers=True")
    (loss,) = _plan(recipe, "v5e:2x2", "sft_policy", "held-out loss")
    assert loss.fits
    assert loss.cost is not None
    assert loss.cost.flops > 0
    assert {entry.axes for entry in loss.cost.collectives} == {"data"}
    assert set(loss.seconds_estimate) == {"flops", "memory", "collectives"}


@pytest.mark.slow
def test_rows_that_are_replaced_on_a_small_slice() -> None:
    bindings = ("run.Experiment.portions=4", "DecoderOnlyConfig.scan_layers=True")
    recipe = _recipe("demo", "v5e:2x2", *bindings)
    names = ("held-out rollout, prompts", "held-out rollout, tokens")
    read, drawn = _plan(recipe, "v5e:2x2", "rl_policy", *names)
    whole = _plan(_recipe("demo", "v5e:2x2", *bindings[1:]), "v5e:2x2", "rl_policy", "held-out rollout")[0]
    assert all(program.fits for program in (read, drawn, whole))
    assert read.cost and drawn.cost and whole.cost and read.memory and drawn.memory
    assert not (read.cost.uncounted or drawn.cost.uncounted)
    # A batch is four portions, each read apart and put where rows have ended.
    assert 4 * read.cost.flops + drawn.cost.flops == pytest.approx(whole.cost.flops, rel=0.05)
    # The batch's keys and values are given and given back in place.
    assert read.memory.aliased
    assert drawn.memory.aliased == pytest.approx(read.memory.aliased, rel=0.01)


def test_what_is_far_too_large_is_a_verdict_and_no_error() -> None:
    recipe = _recipe("pit_gemma3_27b", "v5e:2x2", *BOUND)
    (step,) = _plan(recipe, "v5e:2x2", "sft_policy", "step")
    assert step.out_of_memory
    assert step.memory is not None
    assert step.available is not None
    assert step.memory.total > 8 * step.available
    assert step.cost is not None
    # 6 FLOPs a parameter and token, and a fourth pass for rematerialisation; on 4 chips.
    tokens = 2 * 64 * 1536
    assert step.cost.flops == pytest.approx(8 * 25.6e9 * tokens / 4, rel=0.2)


def test_a_shape_that_does_not_exist_is_refused() -> None:
    recipe = _recipe("demo", "v5p:3x3x3")
    with Pool(target("v5p:3x3x3")) as pool, pytest.raises(Exception, match="v5p:3x3x3"):
        pool.programs(recipe, "sft_policy")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole", "adapters"])
@pytest.mark.parametrize("machine", ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"])
@pytest.mark.parametrize("name", LARGE)
def test_rl_of_large_models_fits(name: str, machine: str, form: str) -> None:
    lora = (("stages/lora.gin",), ("BASE='start/here'",)) if form == "adapters" else ((), ())
    recipe = _recipe(name, machine, *BOUND, *lora[1], more=lora[0])
    programs = _plan(recipe, machine, "rl_improver")
    assert [program.name for program in programs if not program.fits] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "machine"), [("hh_rlhf_1b", "v5e:4x4"), ("hh_rlhf_1b", "2*v5p:2x2x2"), ("hh_rlhf_t5_base", "v5e:2x4")]
)
def test_shipped_recipes_fit_where_they_are_meant_to_run(name: str, machine: str) -> None:
    recipe = _recipe(name, machine, *BOUND)
    for stage in ("sft_improver", "reward_gap", "rl_improver"):
        assert [program.name for program in _plan(recipe, machine, stage) if not program.fits] == []


@pytest.mark.slow
def test_a_suggestion_fits() -> None:
    machine = "v5e:4x4"
    recipe = _recipe("hh_rlhf_1b", machine, *BOUND, "pack.Packing.rows=512")
    with Pool(target(machine)) as pool:
        programs = list(pool.plan([Job(recipe=recipe, stage="sft_improver", program="step")]))
        assert programs[0].out_of_memory
        suggestions = advice.suggest(pool, recipe, programs)
    assert suggestions[-1].fits
