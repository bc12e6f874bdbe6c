"""Adapters in PEFT's format: names and layouts, there and back bit for bit, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.core.tree import named_leaves
from pit_jax.core.types import Params
from pit_jax.models import lora
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert.peft import load_peft, save_peft
from pit_jax.models.lora import Lora

from .test_hf_save import CONFIGS, model, random_params

EVERYTHING = Lora(rank=3, alpha=6.0, targets=lora.TARGETS)
SOME = Lora(rank=2, alpha=0.5, targets=("query", "out", "down"), rslora=True)
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def out(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / "out"


def adapted(name: str, settings: Lora) -> tuple[str, ModelConfig, Params]:
    """Return (family, config with adapters, adapters drawn at random)."""
    family, config = CONFIGS[name]
    config = dataclasses.replace(config, lora=settings)
    return family, config, random_params(lora.split(model(config).abstract())[1])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "t5", "t5_1_1"])
@pytest.mark.parametrize("settings", [EVERYTHING, SOME])
def test_there_and_back_is_bitwise(out: epath.Path, name: str, settings: Lora) -> None:
    family, config, params = adapted(name, settings)
    save_peft(out, params, config, family=family, base_name="some/base")
    base = dataclasses.replace(config, lora=None)
    found, adapters, head = load_peft(out, base)
    assert head is None
    assert dataclasses.replace(found, targets=settings.targets) == settings
    assert set(found.targets) == {target for target in settings.targets if config.adapts(target)}
    left, right = dict(named_leaves(adapters)), dict(named_leaves(params))
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)
    again = out.parent / "again"
    same = dataclasses.replace(base, lora=found)
    save_peft(again, jax.tree.map(jnp.asarray, adapters), same, family=family, base_name="some/base")
    for file in (WEIGHTS, SETTINGS):
        assert (again / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "group", "leaf", "module"),
    [
        ("llama", "attention", "query", "model.layers.1.self_attn.q_proj"),
        ("llama", "attention", "out", "model.layers.1.self_attn.o_proj"),
        ("llama", "mlp", "down", "model.layers.1.mlp.down_proj"),
        ("t5_1_1", "cross", "value", "decoder.block.1.layer.1.EncDecAttention.v"),
        ("t5_1_1", "mlp", "gate", "decoder.block.1.layer.2.DenseReluDense.wi_0"),
    ],
)
def test_matrices_are_named_and_laid_out_as_pefts(
    out: epath.Path, name: str, group: str, leaf: str, module: str
) -> None:
    family, config, params = adapted(name, EVERYTHING)
    save_peft(out, params, config, family=family, base_name="some/base")
    tensors = safetensors.numpy.load_file(str(out / WEIGHTS))
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
    layers = params["decoder"]["layers"] if family == "t5" else params["layers"]
    ours = layers[group][leaf]
    # y = x (A B) in ours, y = x (B A)^T in theirs.
    update = np.tensordot(np.asarray(ours["lora_a"][1]), np.asarray(ours["lora_b"][1]), 1)
    assert (a.shape[0], b.shape[1]) == (3, 3)
    np.testing.assert_allclose((b @ a).T.reshape(update.shape), update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_settings(out: epath.Path, name: str, task: str) -> None:
    family, config, params = adapted(name, SOME)
    save_peft(out, params, config, family=family, base_name="some/base")
    settings = json.loads((out / SETTINGS).read_text())
    modules = {"llama": ["down_proj", "o_proj", "q_proj"], "t5": ["o", "q", "wo"]}[name]
    want = dict(peft_type="LORA", r=2, lora_alpha=0.5, use_rslora=True, target_modules=modules, task_type=task)
    want |= dict(base_model_name_or_path="some/base", bias="none", fan_in_fan_out=False, modules_to_save=None)
    assert {name: settings[name] for name in want} == want


def test_a_scalar_head_comes_along(out: epath.Path) -> None:
    family, config, params = adapted("llama", dataclasses.replace(SOME, targets=("query", "head")))
    kernel = jnp.arange(16.0)
    save_peft(out, params, config, family=family, base_name="some/base", head=kernel)
    tensors = safetensors.numpy.load_file(str(out / WEIGHTS))
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], kernel[None])
    settings = json.loads((out / SETTINGS).read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    found = load_peft(out, dataclasses.replace(config, lora=None))
    np.testing.assert_array_equal(found.head, kernel)
    assert found.lora.targets == ("query",)


def test_regular_expressions_that_name_whole_kinds(out: epath.Path) -> None:
    family, config, params = adapted("t5", SOME)
    save_peft(out, params, config, family=family, base_name="some/base")
    _edit(out, target_modules=r".*\.(q|o|wo)")
    assert set(load_peft(out, dataclasses.replace(config, lora=None)).lora.targets) == set(SOME.targets)


def test_copies_of_the_base_are_passed_over(out: epath.Path) -> None:
    family, config, params = adapted("llama", EVERYTHING)
    save_peft(out, params, config, family=family, base_name="some/base")
    name, base = "base_model.model.lm_head.base_layer.weight", dataclasses.replace(config, lora=None)
    _tensors(lambda tensors: tensors.update({name: np.zeros((40, 16), np.float32)}))(out)
    assert set(load_peft(out, base).lora.targets) == set(lora.TARGETS)
    _tensors(lambda tensors: tensors.update({name: np.zeros((50, 16), np.float32)}))(out)
    with pytest.raises(CheckpointError, match=r"another base: lm_head.weight has shape \[50, 16\]"):
        load_peft(out, base)


def test_without_adapters_there_is_nothing_to_save(out: epath.Path) -> None:
    family, config = CONFIGS["llama"]
    with pytest.raises(ConfigError, match=r"lora = None"):
        save_peft(out, {}, config, family=family, base_name="some/base")


def _edit(out: epath.Path, **fields: Any) -> None:
    settings = json.loads((out / SETTINGS).read_text())
    (out / SETTINGS).write_text(json.dumps(settings | fields))


def _settings(**fields: Any) -> Callable[[epath.Path], None]:
    return lambda out: _edit(out, **fields)


def _tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[epath.Path], None]:
    def apply(out: epath.Path) -> None:
        tensors = safetensors.numpy.load_file(str(out / WEIGHTS))
        change(tensors)
        safetensors.numpy.save_file(tensors, str(out / WEIGHTS))

    return apply


def _only_some_layers(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        del tensors[name]


def _one_more(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)})


def _wider(tensors: dict[str, np.ndarray]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = np.zeros((2, 64), np.float32)


def _pickled(out: epath.Path) -> None:
    (out / WEIGHTS).rename(out / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_settings(use_dora=True), "use_dora = True must not be set"),
        (_settings(bias="all"), "bias = 'all' must be 'none'"),
        (_settings(peft_type="IA3"), "peft_type = 'IA3' must be 'LORA'"),
        (_settings(fan_in_fan_out=True), "fan_in_fan_out"),
        (_settings(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (_settings(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (_settings(layers_to_transform=[0]), "layers_to_transform"),
        (_settings(modules_to_save=["embed_tokens"]), r"modules_to_save names \['embed_tokens'\]"),
        (_settings(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (_settings(from_the_future=1), "from_the_future = 1 must not be set"),
        (_settings(task_type="TOKEN_CLS"), "task_type = 'TOKEN_CLS'"),
        (_settings(r=None), "has no r"),
        (_settings(r="8"), "r and lora_alpha must be numbers"),
        (lambda out: (out / SETTINGS).write_text("[]"), "is not a table"),
        (_settings(target_modules=["q_proj"]), "target_modules differ in model.layers.0.mlp.down_proj"),
        (_settings(target_modules=r".*layers\.0.*(q|o|down)_proj"), "target_modules differ in"),
        (_tensors(_only_some_layers), "has none for model.layers.0"),
        (
            _tensors(_one_more("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight")),
            "another base.*layers.7",
        ),
        (_tensors(_one_more("base_model.model.model.embed_tokens.lora_embedding_A")), "embed_tokens"),
        (_tensors(lambda tensors: tensors.clear()), "lacks every lora_A"),
        (_tensors(_wider), r"another base: .*q_proj.lora_A.weight has shape \[2, 64\], .* need \[2, 16\]"),
        (_settings(r=4), r"has shape \[2, 16\], and this base and the rank .* need \[4, 16\]"),
        (_pickled, "is pickled"),
    ],
)
def test_what_cannot_be_read_is_refused(out: epath.Path, spoil: Callable[[epath.Path], None], message: str) -> None:
    family, config, params = adapted("llama", SOME)
    save_peft(out, params, config, family=family, base_name="some/base")
    spoil(out)
    with pytest.raises(CheckpointError, match=message):
        load_peft(out, dataclasses.replace(config, lora=None))
