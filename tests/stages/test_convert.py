"""`pit-jax convert`: every format into every other, and what it refuses."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

import pit_jax
from pit_jax.core.errors import CheckpointError, ConfigError, PitError
from pit_jax.core.tree import named_leaves
from pit_jax.io import safetensors
from pit_jax.models.convert import hf_save
from pit_jax.models.lora import Lora
from pit_jax.stages import convert as convert_module
from pit_jax.stages.artifact import Artifact
from pit_jax.stages.convert import Conversion, convert
from pit_jax.stages.run import Adapters
from pit_jax.text.template import Templates

from . import checkpoints, small

pytestmark = pytest.mark.slow

IDS = np.arange(3, 15).reshape(2, 6)
LENGTHS = {"inputs": 96, "targets": 48}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoints.write(tmp_path_factory.mktemp("llama") / "model", "llama3")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoints.write(tmp_path_factory.mktemp("gemma") / "model", "gemma")


@pytest.fixture(scope="module")
def adapted(gemma: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of adapters on a Hugging Face checkpoint: a policy, and a reward model that the format knows."""
    directory = tmp_path_factory.mktemp("adapted") / "run"
    adapters = Adapters(base=gemma, lora=Lora(rank=4, alpha=8.0))
    experiment = small.experiment(
        model=checkpoints.MODELS["gemma"], tokenizer=gemma, lengths=LENGTHS, adapters=adapters, templates=Templates()
    )
    training = small.training(2)
    stages = (
        small.sft("policy", init_from=gemma, training=training),
        small.reward("bt", readout="last", attention="causal", training=training),
        small.reward("gap", training=training),
    )
    with small.devices(1):
        small.recipe(directory, experiment=experiment, stages=stages).run()
    return directory


def to(output: pathlib.Path, source: object, **settings: object) -> pathlib.Path:
    convert(Conversion(source=str(source), output=str(output), **settings))
    return output


def weights(directory: object) -> bytes:
    return (pathlib.Path(str(directory)) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bitwise(dtype: str, tmp_path: pathlib.Path) -> None:
    source = checkpoints.write(tmp_path / "source", "llama3", dtype=dtype)
    sharded = to(tmp_path / "sharded", source, max_shard_size=20_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 1
    back = to(tmp_path / "back", to(tmp_path / "pit", sharded, format="pit"))
    assert weights(back) == weights(source)
    for path in pathlib.Path(source).iterdir():
        # Both say the same; only the exported one is not told whether it follows from the model's config.
        if path.name != "generation_config.json":
            assert (sharded / path.name).exists() == (path.name != "model.safetensors")
            assert path.name == "model.safetensors" or (sharded / path.name).read_bytes() == path.read_bytes()


def test_half_precision_is_read_as_float32(llama: str, tmp_path: pathlib.Path) -> None:
    back = to(tmp_path / "back", to(tmp_path / "half", llama, dtype="float16"))
    for name, tensor in safetensors.open_directory(back).items():
        half = safetensors.open_directory(llama)[name].read().astype(np.float16)
        assert tensor.code == "F32"
        np.testing.assert_array_equal(tensor.read(), half.astype(np.float32))


@pytest.mark.parametrize("layout", ["orbax", "legacy"])
def test_t5_by_way_of_t5x(layout: str, tmp_path: pathlib.Path) -> None:
    source = checkpoints.write(tmp_path / "source", "t5")
    there = to(tmp_path / "t5x", source, format="t5x", layout=layout, step=7)
    assert (there / "checkpoint_7").is_dir()
    assert weights(to(tmp_path / "back", there)) == weights(source)


def test_a_t5x_checkpoint_of_t5x_leaves(tmp_path: pathlib.Path) -> None:
    directory = checkpoints.DATA / "t5x" / "t5_1_1"
    config = str(directory / "config.json")
    out = to(tmp_path / "hf", directory / "legacy", config=config)
    want = pit_jax.load_pretrained(directory / "legacy", config=config).logits(IDS, decoder_input_ids=IDS)
    np.testing.assert_array_equal(pit_jax.load_pretrained(out).logits(IDS, decoder_input_ids=IDS), want)


def test_a_copy_of_ours_is_where_a_run_starts(llama: str, tmp_path: pathlib.Path) -> None:
    start = to(tmp_path / "start", llama, format="pit")
    recipe = small.recipe(
        tmp_path / "run",
        experiment=small.experiment(
            model=checkpoints.MODELS["llama3"], tokenizer=llama, lengths=LENGTHS, templates=Templates()
        ),
        stages=(small.sft("policy", init_from=str(start), training=small.training(2)),),
    )
    with small.devices(1):
        recipe.run()
    config = json.loads((to(tmp_path / "hf", tmp_path / "run" / "sft_policy") / "config.json").read_text())
    assert config == json.loads((pathlib.Path(llama) / "config.json").read_text())


def test_adapters_leave_merged_alone_and_come_together_again(
    gemma: str, adapted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stage = adapted / "sft_policy"
    want = pit_jax.load_pretrained(stage).logits(IDS)
    merged = pit_jax.load_pretrained(to(tmp_path / "merged", stage))
    np.testing.assert_allclose(merged.logits(IDS), want, atol=1e-5)
    assert float(np.abs(merged.logits(IDS) - pit_jax.load_pretrained(gemma).logits(IDS)).max()) > 1e-3
    adapter = to(tmp_path / "adapter", stage, format="peft")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == gemma
    again = to(tmp_path / "again", adapter, base=gemma)
    assert weights(again) == weights(tmp_path / "merged")
    assert (again / "tokenizer.json").exists()
    copy = to(tmp_path / "copy", adapter, base=gemma, format="peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (copy / name).read_bytes() == (adapter / name).read_bytes()


def test_reward_models_leave_as_classifiers_if_the_format_knows_them(
    gemma: str, adapted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    want = pit_jax.load_pretrained(adapted / "reward_bt").logits(IDS)
    out = to(tmp_path / "whole", adapted / "reward_bt")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["GemmaForSequenceClassification"]
    np.testing.assert_allclose(pit_jax.load_pretrained(out).logits(IDS), want, atol=1e-5)
    adapter = to(tmp_path / "adapter", adapted / "reward_bt", format="peft")
    assert weights(to(tmp_path / "merged", adapter, base=gemma)) == weights(out)
    with pytest.raises(ConfigError, match="must be 'last' to leave"):
        to(tmp_path / "gap", adapted / "reward_gap")
    assert not (tmp_path / "gap").exists()


def test_an_adapter_for_another_base(
    llama: str, adapted: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = to(tmp_path / "adapter", adapted / "sft_policy", format="peft")
    with pytest.raises(CheckpointError, match="is an adapter for another base"):
        to(tmp_path / "out", adapter, base=llama)
    assert not (tmp_path / "out").exists()
    # One that has the same shapes can be told by its name alone.
    other = checkpoints.write(tmp_path / "other", "gemma", seed=1)
    to(tmp_path / "out", adapter, base=other)
    assert "was trained on" in caplog.text


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("model", dict(format="t5x"), "in T5X. Keep it"),
        ("model", dict(format="peft"), "has no adapters"),
        ("model", dict(format="peft", dtype="bfloat16"), "convert.dtype = 'bfloat16' must be left out"),
        ("model", dict(format="hf", scanned=True), "convert.scanned = True must be left out for the format hf"),
        ("model", dict(format="safetensors"), "convert.format = 'safetensors' must be one of hf"),
        ("model", dict(config="x.json"), "for T5X checkpoints only"),
        ("model", dict(dtype="float16", format="pit"), "param_dtype = 'float16'"),
        ("model:best", {}, "is no stage of a run"),
        ("nothing", {}, "does not exist"),
    ],
)
def test_what_cannot_be_converted(
    source: str, settings: dict[str, object], message: str, llama: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(PitError, match=message):
        to(tmp_path / "out", pathlib.Path(llama).parent / source, **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_needs_its_base(adapted: pathlib.Path, gemma: str, tmp_path: pathlib.Path) -> None:
    adapter = to(tmp_path / "adapter", adapted / "sft_policy", format="peft")
    with pytest.raises(ConfigError, match=f"--base; its file names '{gemma}'"):
        to(tmp_path / "out", adapter)
    with pytest.raises(CheckpointError, match="has adapters of its own"):
        to(tmp_path / "out", adapter, base=str(adapted / "sft_policy"))
    with pytest.raises(ConfigError, match="belongs to a run"):
        to(tmp_path / "out", adapted / "sft_policy", format="pit")
    with pytest.raises(ConfigError, match="T5X has no adapters"):
        to(tmp_path / "out", adapted / "sft_policy", format="t5x")


def test_what_is_there_is_left_alone(llama: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        to(tmp_path, llama)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", ["hf", "pit", "t5x"])
def test_nothing_is_left_of_what_was_stopped(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.write(tmp_path / "source", "t5")

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_save.safetensors_writer, "write", stop)
    monkeypatch.setattr(convert_module.files, "write_json", stop)
    monkeypatch.setattr(convert_module.t5x_save, "save_t5x", stop)
    with pytest.raises(KeyboardInterrupt):
        to(tmp_path / "out", source, format=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_copy_in_another_dtype(llama: str, tmp_path: pathlib.Path) -> None:
    loaded = Artifact(to(tmp_path / "pit", llama, format="pit", dtype="bfloat16")).params()
    assert {leaf.dtype.name for _, leaf in named_leaves(loaded)} == {"bfloat16"}
