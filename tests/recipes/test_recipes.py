"""Every shipped recipe parses, has the model it says, fits its devices, and runs from end to end when shrunk."""

from __future__ import annotations

import json
import math
import pathlib
import re

import jax
import pytest

from pit_jax.cli import shipped
from pit_jax.core.errors import ConfigError
from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec
from pit_jax.models.presets.catalog import language_model
from pit_jax.stages.lm import LanguageModel
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.reward import Reward
from pit_jax.stages.rl import Rl
from pit_jax.stages.sft import Sft
from pit_jax.stages.supervised import Training
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

from . import shrunk

T5_1_1_BASE, LLAMA_3_2_1B, T5_1_1_XXL, GEMMA_3_27B = 247_577_856, 1_235_814_400, 11_135_332_352, 27_009_346_304
"""Parameters of the published models."""
PIT = ["sft_policy", "sft_improver", "reward_bt", "reward_gap", "rl_policy", "rl_improver", "evaluate"]
RIVALS = ["dpo_policy", "srt_data", "srt_tune", "srt_pairs", "srt_dpo"]
STAGES = {
    "demo": [*PIT[:-1], *RIVALS, "evaluate"],
    "demo_lora": PIT,
    "pretrained": PIT,
    "demo_full": [*PIT[:-1], "rl_improver_stage2", *RIVALS, "evaluate"],
    "demo_t5": PIT,
    "hh_rlhf_1b": PIT,
    "hh_rlhf_t5_base": PIT,
    "hh_small": ["pretrain", *PIT],
    "pit_gemma3_27b": PIT,
    "pit_t5_xxl": PIT,
}
PARAMETERS = {
    "demo": (60_000, 250_000),
    "demo_full": (60_000, 250_000),
    "demo_t5": (60_000, 400_000),
    "hh_rlhf_1b": (LLAMA_3_2_1B, LLAMA_3_2_1B),
    "hh_rlhf_t5_base": (T5_1_1_BASE, T5_1_1_BASE),
    "hh_small": (1_500_000, 4_000_000),
    "pit_gemma3_27b": (GEMMA_3_27B, GEMMA_3_27B),
    "pit_t5_xxl": (T5_1_1_XXL, T5_1_1_XXL),
}
TINY_DECODER = (
    "decoder_only.DecoderOnlyConfig.width=16",
    "decoder_only.DecoderOnlyConfig.layers=1",
    "decoder_only.DecoderOnlyConfig.heads=2",
    "decoder_only.DecoderOnlyConfig.kv_heads=2",
    "decoder_only.DecoderOnlyConfig.head_dim=8",
    "decoder_only.DecoderOnlyConfig.mlp=32",
)
TINY_ENCODER_DECODER = (
    "encoder_decoder.EncoderDecoderConfig.width=16",
    "encoder_decoder.EncoderDecoderConfig.encoder_layers=1",
    "encoder_decoder.EncoderDecoderConfig.decoder_layers=1",
    "encoder_decoder.EncoderDecoderConfig.heads=2",
    "encoder_decoder.EncoderDecoderConfig.head_dim=8",
    "encoder_decoder.EncoderDecoderConfig.mlp=32",
)


@pytest.mark.parametrize("name", shrunk.RECIPES)
def test_recipe_parses_and_has_its_stages(name: str) -> None:
    stages = [stage.name for stage in shrunk.recipe(name).stages]
    assert stages == STAGES.get(name, stages)
    assert set(stages) >= set(PIT)


@pytest.mark.parametrize("name", shrunk.RECIPES)
def test_header_has_the_command_and_every_required_macro(name: str) -> None:
    header, _, _ = (shipped.gin_directory() / f"recipes/{name}.gin").read_text().partition("from __gin__")
    assert f"pit-jax pipeline --gin_file=recipes/{name}.gin" in header
    for macro in set(shrunk.REQUIRED) - set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|\bTOKENIZER\b", header)):
        shrunk.recipe(name, without=macro)


@pytest.mark.parametrize("macro", ["HH_PATH", "TEXT_PATH", "TOKENIZER"])
def test_hh_small_names_the_macro_that_is_missing(macro: str) -> None:
    with pytest.raises(ConfigError, match=f"{macro}.* is required"):
        shrunk.recipe("hh_small", without=macro)


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_the_parameters_it_says(name: str) -> None:
    shapes = language_model(shrunk.recipe(name).experiment.model).abstract()
    low, high = PARAMETERS[name]
    assert low <= sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) <= high


def test_demo_t5_differs_from_the_demo_in_the_model_alone() -> None:
    demo, other = shrunk.recipe("demo", "MODEL_DIR='a'"), shrunk.recipe("demo_t5", "MODEL_DIR='a'")
    assert other.stages[:-1] == demo.stages[:6]
    changed = {name for name, value in vars(other.stages[-1]).items() if value != vars(demo.stages[-1])[name]}
    assert changed == {"policies", "others"}, "the rivals that have to be trained are left out"
    assert vars(demo.experiment) | {"model": None} == vars(other.experiment) | {"model": None}
    assert type(demo.experiment.model) is not type(other.experiment.model)


@pytest.mark.parametrize("name", ["hh_rlhf_t5_base", "hh_rlhf_1b"])
@pytest.mark.parametrize("mesh", [None, "data_parallel", "fsdp", "fsdp_tensor_4"])
def test_batches_divide_over_eight_devices(name: str, mesh: str | None) -> None:
    made = shrunk.recipe(name, more=() if mesh is None else (f"meshes/{mesh}.gin",))
    sizes = made.experiment.mesh.sizes(8)
    parts = sizes["data"] * sizes["fsdp"]
    for stage in made.stages:
        if isinstance(stage, Sft | Reward):
            assert stage.training.packing is not None
            assert stage.training.packing.rows % parts == 0
        if isinstance(stage, Rl):
            samples = stage.training.contexts * stage.rl.samples_per_prompt
            assert samples % (stage.training.micro_batches * parts) == 0
            assert stage.training.rollout_batch % parts == samples % stage.training.rollout_batch == 0


def test_mesh_files_fit_the_devices_they_are_for() -> None:
    for path in shipped.gin_directory().glob("meshes/*.gin"):
        mesh = shrunk.recipe("demo", more=(f"meshes/{path.name}",)).experiment.mesh
        devices = {"cpu": 1, "gpu_1": 1}.get(path.stem, 8)
        assert math.prod(mesh.sizes(devices).values()) == devices


@pytest.mark.slow
def test_demo_t5_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk.use_devices(monkeypatch, 1)
    settings = (*shrunk.STEPS, *shrunk.SYNTHETIC, *TINY_ENCODER_DECODER)
    shrunk.recipe("demo_t5", f"MODEL_DIR='{tmp_path}/run'", *settings).run()
    _check(tmp_path / "run", STAGES["demo_t5"], "exact")


@pytest.mark.slow
def test_hh_small_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk.use_devices(monkeypatch, 1)
    data = (
        f"MODEL_DIR='{tmp_path}/run'",
        f"HH_PATH='{shrunk.write_preferences(tmp_path / 'hh.jsonl')}'",
        f"TEXT_PATH='{shrunk.write_texts(tmp_path / 'text.jsonl')}'",
        "TOKENIZER='bytes'",
        "decoder_only.DecoderOnlyConfig.vocab_size=260",
        "lm.LanguageModel.length=12",
        "evaluate.Evaluate.original_steps=2",
    )
    shrunk.recipe("hh_small", *data, *shrunk.STEPS, *shrunk.BYTES, *TINY_DECODER).run()
    _check(tmp_path / "run", STAGES["hh_small"], "reward_bt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo_full", "demo_lora"])
def test_demo_runs(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk.use_devices(monkeypatch, 1)
    settings = (*shrunk.STEPS, *shrunk.SYNTHETIC, *TINY_DECODER)
    shrunk.without_pairs(shrunk.recipe(name, f"MODEL_DIR='{tmp_path}/run'", *settings)).run()
    compared = _check(tmp_path / "run", [stage for stage in STAGES[name] if stage != "srt_pairs"], "exact")
    assert ("pit_stage2" in compared) == (name == "demo_full")
    assert "self_refine" in compared
    assert ({"dpo", "srt", "srt_stage1"} <= set(compared)) == (name != "demo_lora")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), [("hh_rlhf_t5_base", "t5-nano"), ("hh_rlhf_1b", "nano")])
def test_accelerator_recipe_runs_on_its_mesh(
    name: str, preset: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four devices, from the checkpoint of another run, with a SeqIO task the user has registered."""
    path = shrunk.write_preferences(tmp_path / "hh.jsonl")
    (tmp_path / f"my_{name}.py").write_text(
        "from pit_jax.data.seqio_tasks import register_preference_tasks\n"
        f"register_preference_tasks('my_{name}', {path!r})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = (
        f"MODEL_DIR='{tmp_path}/run'",
        f"INITIAL_CHECKPOINT_PATH='{tmp_path}/start/pretrain'",
        f"MIXTURE_OR_TASK_NAME='my_{name}'",
        f"MIXTURE_OR_TASK_MODULE='my_{name}'",
        "TOKENIZER='bytes'",
        f"catalog.preset.name='{preset}'",
        "catalog.preset.vocab_size=260",
        *(f"{stage}/supervised.Training.micro_batches=1" for stage in shrunk.SUPERVISED),
        *shrunk.CURVE,
        *shrunk.STEPS,
        *shrunk.BYTES,
    )
    made = shrunk.recipe(name, *settings)
    _start(made, tmp_path)
    made.run()
    _check(tmp_path / "run", STAGES[name], "reward_bt")


def _start(recipe: Recipe, directory: pathlib.Path) -> None:
    """Pre-train the recipe's model a little, in a run of its own."""
    stage = LanguageModel(
        name="pretrain",
        data=DataSpec(path=shrunk.write_texts(directory / "text.jsonl"), folds=Folds(validation_fraction=0.1)),
        length=12,
        training=Training(
            batch_size=4, loop=Loop(steps=1), optimizer=Optimizer(learning_rate=1e-3), evaluation_records=4
        ),
    )
    Recipe(model_dir=str(directory / "start"), seed=0, experiment=recipe.experiment, stages=(stage,)).run()


def _check(directory: pathlib.Path, stages: list[str], judge: str) -> set[str]:
    """Check that every stage has finished with finite numbers; return who is compared in the report."""
    found = shrunk.results(directory)
    assert set(found) == set(stages)
    for stage, numbers in found.items():
        assert numbers, stage
        assert all(math.isfinite(number) for number in numbers), stage
    rows = json.loads((directory / "report" / "report.json").read_text())["comparisons"]
    assert {row["judge"] for row in rows} >= {judge}
    assert {"pit", "pit_raw", "pit_sft", "pit_stage1", "best_of_2"} <= {row["candidate"] for row in rows}
    return {row["candidate"] for row in rows}
