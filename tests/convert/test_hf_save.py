"""What leaves as a Hugging Face directory: files byte for byte, configs of every family, reward models, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.core.tree import named_leaves
from pit_jax.core.types import Params
from pit_jax.io import files, safetensors_writer
from pit_jax.models.config import ModelConfig, RopeScaling
from pit_jax.models.convert.hf_config import config_from_hf
from pit_jax.models.convert.hf_export_config import Special, export_config, family_of, generation_config, plain
from pit_jax.models.convert.hf_save import save_hf
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.lora import Lora

from ..models import hf_mapping

SPECIAL = Special(pad=0, bos=2, eos=(1, 3))
SHAPE: dict[str, Any] = dict(vocab_size=40, width=16, heads=2, head_dim=12, mlp=24)
DECODER: dict[str, Any] = SHAPE | dict(layers=3, kv_heads=1, tied=False)
GEMMA: dict[str, Any] = DECODER | dict(activation="gelu_tanh", norm_offset=1.0, scale_embedding=True, tied=True)
GEMMA2: dict[str, Any] = GEMMA | dict(post_norms=True, attention_scale=20**-0.5, logit_softcap=6.0, window=4)
T5: dict[str, Any] = SHAPE | dict(encoder_layers=3, decoder_layers=2, relative_buckets=8, relative_max_distance=16)
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_positions=8)
YARN = RopeScaling(kind="yarn", factor=2.0, original_max_positions=8, attention_factor=1.1)

CONFIGS: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("llama", DecoderOnlyConfig(**DECODER, rope_base=500.0, norm_eps=1e-5)),
    "llama_scaled": ("llama", DecoderOnlyConfig(**DECODER, rope_scaling=LLAMA3)),
    "llama_biased": ("llama", DecoderOnlyConfig(**DECODER, qkv_bias=True, out_bias=True, mlp_bias=True)),
    "mistral": ("mistral", DecoderOnlyConfig(**DECODER, window=4)),
    "mistral_odd_width": ("mistral", DecoderOnlyConfig(**DECODER | dict(width=18, heads=4))),
    "qwen2": ("qwen2", DecoderOnlyConfig(**DECODER | dict(head_dim=8, qkv_bias=True, tied=True))),
    "qwen2_yarn": ("qwen2", DecoderOnlyConfig(**DECODER | dict(head_dim=8, qkv_bias=True), rope_scaling=YARN)),
    "qwen3": ("qwen3", DecoderOnlyConfig(**DECODER, qk_norm=True)),
    "qwen3_window": ("qwen3", DecoderOnlyConfig(**DECODER, qk_norm=True, window=4, global_layers=(0, 1))),
    "gemma": ("gemma", DecoderOnlyConfig(**GEMMA)),
    "gemma2": ("gemma2", DecoderOnlyConfig(**GEMMA2, attention_softcap=5.0, global_every=2)),
    "gemma3": ("gemma3_text", DecoderOnlyConfig(**GEMMA2, qk_norm=True, local_rope_base=100.0, global_every=3)),
    "t5": ("t5", EncoderDecoderConfig(**T5, gated=False, activation="relu", tied=True)),
    "t5_1_1": ("t5", EncoderDecoderConfig(**T5)),
    "t5_scaled": ("t5", EncoderDecoderConfig(**T5, scale_logits=True)),
    "umt5": ("umt5", EncoderDecoderConfig(**T5, relative_per_layer=True, scale_logits=True)),
}


def model(config: ModelConfig) -> DecoderOnly | EncoderDecoder:
    """Return the model of a config."""
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config)
    assert isinstance(config, DecoderOnlyConfig)
    return DecoderOnly(config)


def random_params(abstract: Params) -> Params:
    """Return random parameters, norm scales, biases and both matrices of adapters too."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), abstract)


def spread(params: Params) -> Params:
    """Return parameters over four devices, each leaf cut along its first axis that can be."""
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf: jax.Array) -> jax.Array:
        axes = [i for i, size in enumerate(leaf.shape) if size % 4 == 0][:1]
        spec = [("fsdp" if i in axes else None) for i in range(leaf.ndim)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, params)


def tensors_of(directory: epath.Path) -> dict[str, np.ndarray]:
    """Return all tensors, as the safetensors library reads them."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(str(file))
    return found


@pytest.fixture
def out(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / "out"


def test_a_file_is_byte_for_byte_the_librarys(out: epath.Path) -> None:
    random = np.random.default_rng(1)
    shapes = {"b": (2,), "a.é": (3, 5), "c": (), "empty": (0, 4), "z": (7,)}
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.float32, ml_dtypes.bfloat16)
    arrays = {n: np.asarray(random.normal(size=s), t) for (n, s), t in zip(shapes.items(), dtypes, strict=True)}
    entries = [safetensors_writer.Entry(name=n, shape=a.shape, dtype=a.dtype) for n, a in arrays.items()]
    plan = safetensors_writer.plan(entries, max_shard_size=10**6)
    with safetensors_writer.new_directory(out) as place:
        safetensors_writer.write(place, plan, (arrays[entry.name] for entry in plan.entries))
    theirs = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == theirs
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_tensors_are_cut_into_files_by_the_hubs_rule(out: epath.Path) -> None:
    # Of float32, hence ten numbers a file: a tensor that is too large gets its own and leaves the current one open.
    sizes = {"f": 6, "e": 30, "d": 4, "c": 1, "b": 9, "a": 1}
    entries = [safetensors_writer.Entry(name=n, shape=(k,), dtype=np.dtype(np.float32)) for n, k in sizes.items()]
    plan = safetensors_writer.plan(entries, max_shard_size=40)
    out.mkdir()
    safetensors_writer.write(out, plan, (np.full(entry.shape, ord(entry.name), np.float32) for entry in plan.entries))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 51, "total_size": 204}
    assert {name: int(file[6:11]) for name, file in index["weight_map"].items()} == dict(e=1, f=2, d=2, c=3, b=3, a=4)
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)}
    assert {n: a[0] for n, a in tensors_of(out).items()} == {name: ord(name) for name in sizes}


def test_no_half_directories(out: epath.Path, monkeypatch) -> None:
    config = CONFIGS["llama"][1]
    params = random_params(model(config).abstract())
    monkeypatch.setattr(files, "free_bytes", lambda directory: 1000)
    with pytest.raises(CheckpointError, match=r"0\.0 MB free"):
        save_hf(out, model(config), params)
    assert not list(out.parent.iterdir())
    monkeypatch.undo()
    out.mkdir()
    save_hf(out, model(config), params)
    with pytest.raises(CheckpointError, match="not an empty directory"):
        save_hf(out, model(config), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_come_back(name: str) -> None:
    family, config = CONFIGS[name]
    found, data = export_config(config, special=SPECIAL, dtype="bfloat16")
    assert (found.name, data["model_type"], data["architectures"]) == (family, family, [found.causal])
    assert (data["pad_token_id"], data["bos_token_id"], data["eos_token_id"]) == (0, 2, [1, 3])
    heads = set() if config.tied else {"lm_head.weight"}
    read = config_from_hf(json.loads(json.dumps(data)), heads, where="config.json")
    assert plain(read) == plain(dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16"))
    starts = {"decoder_start_token_id": 0} if family.endswith("t5") else {}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [1, 3]}
    assert generation_config(data) == {"_from_model_config": True} | ids | starts


def _decoder(**fields: Any) -> DecoderOnlyConfig:
    return DecoderOnlyConfig(**DECODER | fields)


def _t5(**fields: Any) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(**T5 | fields)


@pytest.mark.parametrize(
    ("config", "field", "where"),
    [
        (_decoder(role_embedding=True), "role_embedding", "any"),
        (_decoder(gated=False), "gated", "any"),
        (_decoder(position="learned", max_positions=8), "position", "any"),
        (_decoder(position="relative"), "position", "any"),
        (_decoder(prefix_lm=True), "prefix_lm", "any"),
        (_decoder(scale_embedding=True), "scale_embedding", "llama"),
        (_decoder(qkv_bias=True), "out_bias", "llama"),
        (_decoder(window=4, global_every=2), "window", "mistral"),
        (DecoderOnlyConfig(**GEMMA2 | dict(attention_scale=0.3)), "attention_scale", "any"),
        (_t5(role_embedding=True), "role_embedding", "any"),
        (_t5(activation="gelu"), "activation", "any"),
        (_t5(relative_per_layer=True), "relative_per_layer", "t5.*For umt5, scale_logits must be True"),
    ],
)
def test_what_no_family_has_is_named(config: ModelConfig, field: str, where: str) -> None:
    with pytest.raises(ConfigError, match=rf"Config\.{field} = .* in {where}"):
        family_of(config)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_arrives(out: epath.Path, devices: int, dtype: str) -> None:
    config = dataclasses.replace(CONFIGS["llama"][1], param_dtype=dtype)
    params = random_params(model(config).abstract())
    save_hf(out, model(config), spread(params) if devices == 4 else params, max_shard_size=4000, special=SPECIAL)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    found = tensors_of(out)
    assert {array.dtype for array in found.values()} == {np.dtype(jnp.dtype(dtype))}
    assert isinstance(config, DecoderOnlyConfig)
    _same(hf_mapping.decoder_only_params(config, found), params)


def test_an_encoder_decoder_in_half_precision(out: epath.Path) -> None:
    config = CONFIGS["t5_1_1"][1]
    assert isinstance(config, EncoderDecoderConfig)
    params = random_params(model(config).abstract())
    save_hf(out, model(config), params, dtype="float16", special=Special(pad=0, eos=(1,)))
    _same(
        hf_mapping.encoder_decoder_params(config, tensors_of(out)), jax.tree.map(lambda a: a.astype("float16"), params)
    )
    data = json.loads((out / "config.json").read_text())
    assert (data["dtype"], data["eos_token_id"], data["bos_token_id"]) == ("float16", 1, None)


def test_numbers_beyond_half_precision_are_refused(out: epath.Path) -> None:
    config = CONFIGS["qwen2"][1]
    params = random_params(model(config).abstract())
    params["final_norm"]["scale"] *= 1e6
    with pytest.raises(ConfigError, match="float16' must hold every number of model.norm.weight"):
        save_hf(out, model(config), params, dtype="float16")
    assert not list(out.parent.iterdir())


def _same(found: Params, want: Params) -> None:
    left, right = dict(named_leaves(found)), dict(named_leaves(want))
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[name]), err_msg=name)


def test_the_checkpoints_own_config_is_kept(out: epath.Path) -> None:
    config = CONFIGS["llama"][1]
    params = random_params(model(config).abstract())
    _, data = export_config(config, special=SPECIAL, dtype="float32")
    own = data | {"transformers_version": "4.57.6", "max_position_embeddings": 77, "torch_dtype": "float32"}
    del own["dtype"]
    save_hf(out, model(config), params, source_config=own, dtype="bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert written == data | {"transformers_version": "4.57.6", "max_position_embeddings": 77, "dtype": "bfloat16"}
    out.rmtree()
    save_hf(out, model(config), params, source_config=own | {"rms_norm_eps": 0.1})
    written = json.loads((out / "config.json").read_text())
    assert (written["rms_norm_eps"], "transformers_version" in written) == (1e-5, False)


def test_adapters_are_merged(out: epath.Path) -> None:
    lora = Lora(rank=3, alpha=5.0, targets=("query", "out", "down", "head"), rslora=True)
    config = dataclasses.replace(CONFIGS["llama"][1], lora=lora)
    assert isinstance(config, DecoderOnlyConfig)
    params = random_params(model(config).abstract())
    save_hf(out, model(config), spread(params))
    layers, merged = params["layers"], dataclasses.replace(config, lora=None)
    found = hf_mapping.decoder_only_params(merged, tensors_of(out))
    scale = 5.0 / 3**0.5
    for group, name, inputs in (("attention", "query", 1), ("attention", "out", 2), ("mlp", "down", 1)):
        leaf = layers[group][name]
        for n in range(config.layers):
            update = np.tensordot(np.asarray(leaf["lora_a"][n], "d"), np.asarray(leaf["lora_b"][n], "d"), 1)
            want = np.asarray(leaf["kernel"][n], "d") + scale * update
            assert update.ndim == inputs + leaf["lora_b"].ndim - 2
            np.testing.assert_allclose(found["layers"][group][name]["kernel"][n], want, rtol=1e-5, atol=1e-6)
    head = params["head"]
    want = np.asarray(head["kernel"]) + scale * np.asarray(head["lora_a"]) @ np.asarray(head["lora_b"])
    np.testing.assert_allclose(found["head"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["layers"]["mlp"]["up"]["kernel"], layers["mlp"]["up"]["kernel"])


def _reward(**fields: Any) -> tuple[ScalarModel, Params]:
    network = ScalarModel(DecoderOnly(_decoder()), **dict(readout="last", attention="causal") | fields)
    params = random_params(network.abstract())
    return network, params | {"head": params["head"] | {"bias": jnp.zeros(())}}


def test_a_reward_model_leaves_as_a_classifier(out: epath.Path) -> None:
    network, params = _reward()
    save_hf(out, network, params, special=SPECIAL)
    data = json.loads((out / "config.json").read_text())
    assert data["architectures"] == ["LlamaForSequenceClassification"]
    assert (data["id2label"], data["pad_token_id"]) == ({"0": "LABEL_0"}, 0)
    found = tensors_of(out)
    np.testing.assert_array_equal(found.pop("score.weight"), params["head"]["kernel"][None])
    assert "lm_head.weight" not in found
    trunk = {name: leaf for name, leaf in params["trunk"].items() if name != "head"}
    assert isinstance(network.lm, DecoderOnly)
    _same(hf_mapping.decoder_only_params(dataclasses.replace(network.lm.config, tied=True), found), trunk)


def _biased() -> tuple[ScalarModel, Params]:
    network, params = _reward()
    return network, params | {"head": params["head"] | {"bias": jnp.ones(())}}


def _with_encoder() -> tuple[ScalarModel, Params]:
    network = ScalarModel(EncoderDecoder(_t5()), readout="last", attention="causal")
    return network, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), network.abstract())


@pytest.mark.parametrize(
    ("make", "special", "message"),
    [
        (lambda: _reward(readout="mean"), SPECIAL, "readout = 'mean' must be 'last' to leave"),
        (lambda: _reward(attention="bidirectional"), SPECIAL, "attention = 'bidirectional'"),
        (_biased, SPECIAL, "bias = 1.0 must be 0"),
        (_with_encoder, SPECIAL, "t5 has no scalar head"),
        (lambda: (ValueModel(DecoderOnly(_decoder())), {}), SPECIAL, "A ValueModel scores every token"),
        (_reward, Special(eos=(1,)), "pad = None"),
        (_reward, Special(pad=1, eos=(1,)), "pad = 1 must be the id of a token that is in no text"),
        (_reward, Special(pad=40, eos=(1,)), r"pad = 40 must lie in \[0, 40\)"),
    ],
)
def test_reward_models_that_the_format_does_not_know(
    out: epath.Path, make: Callable[[], tuple[ScalarModel | ValueModel, Params]], special: Special, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        save_hf(out, *make(), special=special)
    assert not out.exists()


def test_tokenizer_files_are_written_and_sampling_settings_kept(out: epath.Path) -> None:
    config = CONFIGS["qwen2"][1]
    tokenizer = {"tokenizer.json": b"1", "generation_config.json": b'{"eos_token_id": [1, 2], "top_p": 0.9}'}
    save_hf(out, model(config), random_params(model(config).abstract()), tokenizer=tokenizer)
    names = {path.name for path in out.iterdir()}
    assert names == {"tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}
    assert (out / "tokenizer.json").read_bytes() == b"1"
    written = json.loads((out / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["top_p"]) == ([1, 2], 0.9)
