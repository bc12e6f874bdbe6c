"""The recipes for whole slices: their models have the published sizes, and their batches suit the slices."""

from __future__ import annotations

import math

import jax
import pytest

from pit_jax.cli.gin_config import GinSource, build
from pit_jax.cli.stages import ROOT
from pit_jax.models.presets.catalog import language_model
from pit_jax.plan.topology import check_devices, resize, target
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.reward import Reward
from pit_jax.stages.rl import Rl
from pit_jax.stages.sft import Sft

BOUND = ("MODEL_DIR='run'", "INITIAL_CHECKPOINT_PATH='start/here'", "TOKENIZER='bytes'")
PARAMETERS = {"pit_t5_xxl": 11_135_332_352, "pit_gemma3_27b": 27_009_346_304}
"""Of T5 1.1 XXL, and of the language model of Gemma 3 27B."""


def _recipe(name: str, *bindings: str, more: tuple[str, ...] = ()) -> Recipe:
    return build(GinSource(files=(f"recipes/{name}.gin", *more), bindings=(*BOUND, *bindings)), ROOT).value


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_sizes(name: str) -> None:
    model = _recipe(name).experiment.model
    shapes = language_model(model).abstract()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]
    assert (model.dtype, model.param_dtype, model.remat, model.scan_layers) == ("bfloat16", "float32", "full", True)


@pytest.mark.parametrize("machine", ["v5e:16x16", "v5p:4x4x4", "v5p:4x8x8", "v6e:16x16", "2*v5p:4x4x4"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_batches_can_be_shared_out(name: str, machine: str) -> None:
    recipe, there = _recipe(name), target(machine)
    sizes = check_devices(resize(recipe.experiment.mesh, there), there)
    parts = sizes["data"] * sizes["fsdp"]
    for stage in recipe.stages:
        if isinstance(stage, Sft | Reward):
            assert stage.training.packing is not None
            assert stage.training.packing.rows % parts == 0
        if isinstance(stage, Rl):
            samples = stage.training.contexts * stage.rl.samples_per_prompt
            assert samples % (stage.training.micro_batches * parts) == samples % stage.training.rollout_batch == 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_adapters_stand_on_the_starting_weights(name: str) -> None:
    recipe = _recipe(name, "BASE='start/here'", more=("stages/lora.gin",))
    assert recipe.experiment.base == "start/here"
    assert not any(recipe.experiment.is_whole(stage) for stage in recipe.stages)
    recipe.check_references()
