"""T5Gemma in Hugging Face's format: numbers of transformers, fields that are refused, and every tensor in its place."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Prompts
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.convert import stream
from pit_jax.models.convert.hf_export_config import Special
from pit_jax.models.convert.hf_fields import Fields
from pit_jax.models.convert.hf_load import load_hf
from pit_jax.models.convert.hf_save import save_hf
from pit_jax.models.convert.hf_t5gemma import (
    EXPORTED,
    PICTURES,
    T5GEMMA,
    exportable,
    t5gemma_config,
    t5gemma_json,
    t5gemma_tensors,
)
from pit_jax.models.convert.peft import load_peft, save_peft
from pit_jax.models.lora import Lora, split
from pit_jax.models.presets.catalog import language_model
from pit_jax.models.presets.t5gemma import T5GEMMA as PRESETS
from pit_jax.models.t5gemma import EncoderSize, T5Gemma, T5GemmaConfig

RECORDED = Path(__file__).parent.parent / "data" / "hf_t5gemma"
COMMON = {"dtype": "float32", "param_dtype": "float32"}


def content(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / name / "config.json").read_text())


def read(name: str, data: dict[str, Any]) -> T5GemmaConfig:
    return t5gemma_config(name, Fields(data, "config.json"), COMMON)


@pytest.mark.parametrize("name", T5GEMMA)
def test_logits_and_greedy_continuation_equal_transformers(name: str) -> None:
    lm, params = load_hf(RECORDED / name)
    assert isinstance(lm, T5Gemma)
    found = dict(np.load(RECORDED / name / "reference.npz"))
    ids, seen, response = (found[part] for part in ("input_ids", "attention_mask", "decoder_input_ids"))
    assert np.std(found["logits"]) > 0.3 and lm.config.window < response.shape[1] < ids.shape[1]
    # Padded on the right, and on the left.
    ids, seen = (
        np.vstack([a, np.stack([np.roll(row, -n) for row, n in zip(a, seen.sum(1), strict=True)])]) for a in (ids, seen)
    )
    logits = jax.jit(lm.logits)(params, ids, seen, np.vstack([response, response]))
    np.testing.assert_allclose(logits, np.vstack([found["logits"]] * 2), atol=1e-4, rtol=0)

    prompt = jnp.asarray(found["greedy_prompt"])
    prompts = Prompts(tokens=prompt, mask=jnp.ones_like(prompt, bool), reference=jnp.zeros_like(prompt, bool))
    keys, unreachable = jax.random.split(jax.random.key(0), 1), (lm.config.vocab_size,)
    settings = dict(max_new=found["greedy_ids"].shape[1], eos_ids=unreachable, pad_id=0)
    samples = generate(lm, params, prompts, keys, Sampling(temperature=0.0), **settings)
    np.testing.assert_array_equal(samples.tokens, found["greedy_ids"])


@pytest.mark.parametrize("name", T5GEMMA)
def test_reading_and_writing_is_bitwise(name: str) -> None:
    lm, params = load_hf(RECORDED / name)
    stored = load_file(RECORDED / name / "model.safetensors")
    for tensor, array in stream.unload(params, list(t5gemma_tensors(lm.config))):
        np.testing.assert_array_equal(array, stored.pop(tensor.name), err_msg=tensor.name)
    assert all(PICTURES.fullmatch(rest) for rest in stored) and bool(stored) == (name == "t5gemma2")


@pytest.mark.parametrize("name", ["t5gemma-9b-2b", "t5gemma-2b-2b", "t5gemma-2-4b-4b"])
@pytest.mark.parametrize("change", [{}, {"tied": False, "merged_attention": False, "shared_embedding": False}])
def test_every_parameter_is_one_tensor(name: str, change: dict[str, Any]) -> None:
    lm = T5Gemma(T5GemmaConfig(**PRESETS[name] | change))
    found: dict[str, list] = {}
    for tensor in t5gemma_tensors(lm.config):
        found.setdefault(tensor.path, []).append(tensor)
    leaves = dict(tree.named_leaves(lm.abstract()))
    assert found.keys() == leaves.keys()
    for path, tensors in found.items():
        stacked = tensors[0].layer is not None
        assert [tensor.layer for tensor in tensors] == (list(range(leaves[path].shape[0])) if stacked else [None]), path
        assert {tensor.our_shape for tensor in tensors} == {leaves[path].shape[1 if stacked else 0 :]}, path


def test_presets_are_what_published_files_say() -> None:
    stack = {"hidden_size": 2304, "layer_types": None, "query_pre_attn_scalar": 256, "rope_theta": 10000.0}
    nine = stack | {"hidden_size": 3584, "intermediate_size": 14_336, "num_hidden_layers": 42}
    nine |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    data = {"model_type": "t5gemma", "is_encoder_decoder": True, "encoder": nine, "decoder": stack}
    assert read("t5gemma", data) == T5GemmaConfig(**PRESETS["t5gemma-9b-2b"], **COMMON)
    layers = [kind for _ in range(3) for kind in ["sliding_attention"] * 5 + ["full_attention"]]
    rope = {"full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"}}
    rope |= {"sliding_attention": {"rope_theta": 10000, "rope_type": "default"}}
    small = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 1, "vocab_size": 262144, "sliding_window": 512, "layer_types": layers}
    small |= {"_sliding_window_pattern": 6, "rope_parameters": rope, "use_bidirectional_attention": False}
    data = {"encoder": {"text_config": small, "vision_config": {}}, "decoder": small, "eoi_token_index": 256000}
    assert read("t5gemma2", data) == T5GemmaConfig(**PRESETS["t5gemma-2-270m-270m"], **COMMON)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("t5gemma-2-")])
@pytest.mark.parametrize("change", [{}, {"attention_scale": 7**-0.5, "global_every": 0, "tied": False, "start_id": 5}])
def test_what_is_written_is_read_again(name: str, change: dict[str, Any]) -> None:
    config = T5GemmaConfig(**PRESETS[name] | COMMON | {"scan_layers": True} | change)
    assert exportable(config) is None
    assert read("t5gemma", json.loads(json.dumps(t5gemma_json(config)))) == config
    assert all(
        field in EXPORTED or value == T5GemmaConfig.__dataclass_fields__[field].default
        for field, value in vars(config).items()
    )


def test_what_transformers_does_not_have_does_not_leave() -> None:
    config = read("t5gemma", content("t5gemma"))
    for field, value in {"encoder_window": (3, 3), "attention_scale": 0.3, "width": 18}.items():
        broken = exportable(dataclasses.replace(config, **{field: value}))
        assert broken is not None and broken[0] == {"width": "heads"}.get(field, field)


@pytest.mark.parametrize("name", T5GEMMA)
def test_unknown_fields_are_refused_wherever_they_stand(name: str) -> None:
    places = [(), ("encoder",), ("decoder",), *([("encoder", "text_config")] if name == "t5gemma2" else [])]
    for place in places:
        data = inner = content(name)
        for step in place:
            inner = inner[step]
        inner["number_of_experts"] = 3
        with pytest.raises(ConfigError, match=rf"field {'.'.join([*place, 'number_of_experts'])} = 3 is unknown"):
            read(name, data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("t5gemma", {"rms_norm_eps": 1e-5}, "encoder and decoder differ in what is norm_eps here: 1e-06 and 1e-05"),
        ("t5gemma", {"attention_bias": True}, "decoder.attention_bias = true must be false"),
        ("t5gemma", {"hidden_activation": "silu"}, "hidden_activation = .silu. must be one of gelu_pytorch_tanh"),
        ("t5gemma", {"layer_types": ["full_attention"] * 2}, "layer_types of encoder and decoder must give"),
        ("t5gemma", {"layer_types": ["chunked"] * 2}, "decoder.layer_types = .* must name 2 layers"),
        ("t5gemma", {"cross_attention_hidden_size": 16}, "cross_attention_hidden_size = 16 must be null or 24"),
        ("t5gemma", {"sliding_window": None}, "differ in what is window"),
        ("t5gemma2", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0 must be null"),
        ("t5gemma2", {"hidden_size": 32}, "merged_attention = True must be False where the encoder has a width"),
        ("t5gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true must be false"),
    ],
)
def test_what_is_not_implemented_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    data = copy.deepcopy(content(name))
    data["decoder"] |= change
    with pytest.raises(ConfigError, match=message):
        read(name, data)


def test_layers_without_windows_and_matrices_of_their_own() -> None:
    data = content("t5gemma2")
    for stack in (data["encoder"]["text_config"], data["decoder"]):
        stack["layer_types"] = ["full_attention"] * 2
    config = read("t5gemma2", data | {"tie_word_embeddings": False})
    assert (config.window, config.encoder_window, config.global_every, config.local_rope_base) == (None, None, 0, None)
    assert not config.tied and not config.shared_embedding
    names = {tensor.name for tensor in t5gemma_tensors(config)}
    assert {f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")} | {
        "lm_head.out_proj.weight"
    } <= names
    data = content("t5gemma")
    assert read("t5gemma", data).encoder == EncoderSize(width=24, heads=3, kv_heads=1, head_dim=8, mlp=20)
    del data["encoder"]
    with pytest.raises(ConfigError, match="encoder = null must be a table"):
        read("t5gemma", data)


def test_t5gemma_leaves_as_it_came(tmp_path: Path) -> None:
    source = RECORDED / "t5gemma"
    network, params = load_hf(source)
    config = content("t5gemma")
    for name, given in (("kept", config), ("written", None)):
        save_hf(tmp_path / name, network, params, source_config=given, special=Special(pad=0, bos=2, eos=(1,)))
        ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / name, source))
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)
        assert load_hf(tmp_path / name)[0] == network


def test_t5gemma_2_cannot_leave_without_its_pictures(tmp_path: Path) -> None:
    network, params = load_hf(RECORDED / "t5gemma2")
    with pytest.raises(ConfigError, match="any Hugging Face family"):
        save_hf(tmp_path / "out", network, params)


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_adapters_leave_and_come_back(tmp_path: Path, name: str) -> None:
    network, _ = load_hf(RECORDED / name)
    config = dataclasses.replace(network.config, lora=Lora(rank=2, alpha=4.0))
    lm = language_model(config)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), lm.abstract())
    save_peft(tmp_path / "adapter", params, config, family=name, base_name="base")
    adapter = load_peft(tmp_path / "adapter", network.config)
    assert adapter.lora == config.lora
    assert jax.tree.structure(adapter.params) == jax.tree.structure(split(params)[1])
