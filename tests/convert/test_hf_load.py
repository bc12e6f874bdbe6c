"""Hugging Face directories: same logits and continuations as transformers; clear refusals before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pit_jax.core.errors import CheckpointError, ConfigError, DataError, PitError
from pit_jax.core.types import Conditional, Prompts
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.convert import hf_load
from pit_jax.models.convert.hf_config import FAMILIES, config_from_hf
from pit_jax.models.convert.hf_load import load_hf
from pit_jax.models.convert.hf_t5gemma import T5GEMMA
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.models.trained import abstract_params
from pit_jax.sharding.mesh import MeshConfig, make_mesh

RECORDED = Path(__file__).parent.parent / "data" / "hf"
NAMES = sorted(path.name for path in RECORDED.iterdir() if path.is_dir())
TOLERANCE = 1e-4
NEW = 64


def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(RECORDED / name / "reference.npz"))


def logits(network: DecoderOnly | EncoderDecoder, params: Any, ids: np.ndarray, seen: np.ndarray, found: dict) -> Any:
    tokens, mask = jnp.asarray(ids), jnp.asarray(seen)
    if isinstance(network, EncoderDecoder):
        decoded = np.resize(found["decoder_input_ids"], (len(ids), found["decoder_input_ids"].shape[1]))
        return jax.jit(network.logits)(params, tokens, mask, jnp.asarray(decoded))
    return jax.jit(network.logits)(params, tokens, mask)


def copy(name: str, target: Path, **changes: Any) -> Path:
    """Copy a recorded model; fields of its config are changed, or removed where they are `...`."""
    directory = shutil.copytree(RECORDED / name, target / name)
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {field: value for field, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_continuation_equal_transformers(name: str) -> None:
    network, params = load_hf(RECORDED / name)
    found = reference(name)
    ids, seen = found["input_ids"], found["attention_mask"]
    # Padded on the right, and on the left, in one batch: the same numbers at the same tokens.
    left_ids, left_seen = (
        np.stack([np.roll(row, -n) for row, n in zip(a, seen.sum(1), strict=True)]) for a in (ids, seen)
    )
    both = np.asarray(logits(network, params, np.vstack([ids, left_ids]), np.vstack([seen, left_seen]), found))
    right, left = np.split(both, 2)
    expected = found["logits"]
    assert np.std(expected) > 0.3
    if isinstance(network, EncoderDecoder):
        np.testing.assert_allclose(right, expected, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(left, expected, atol=TOLERANCE, rtol=0)
    else:
        np.testing.assert_allclose(right[seen], expected[seen], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(left[left_seen], expected[seen], atol=TOLERANCE, rtol=0)

    prompt = jnp.asarray(found["greedy_prompt"])
    prompts = Prompts(tokens=prompt, mask=jnp.ones_like(prompt, bool), reference=jnp.zeros_like(prompt, bool))
    keys = jax.random.split(jax.random.key(0), 1)
    unreachable = (network.config.vocab_size,)
    samples = generate(
        network, params, prompts, keys, Sampling(temperature=0.0), max_new=NEW, eos_ids=unreachable, pad_id=0
    )
    np.testing.assert_array_equal(samples.tokens, found["greedy_ids"])


@pytest.mark.parametrize("name", ["gemma3_text", "t5_1_1"])
def test_a_mesh_of_four_holds_the_same_parameters_cut_by_the_rules(name: str, tmp_path: Path) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    _, whole = load_hf(RECORDED / name)
    network, cut = load_hf(_sharded(copy(name, tmp_path)), mesh=mesh)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(one, other)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(network, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, cut) == wanted
    assert not cut["embedding"]["token"].sharding.is_fully_replicated


def _sharded(directory: Path) -> Path:
    """Cut a model into two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / "model.safetensors").unlink()
    return directory


@pytest.mark.parametrize(
    ("stored", "asked", "ours"),
    [("bfloat16", None, "bfloat16"), ("float16", None, "float32"), ("float32", "bfloat16", "bfloat16"),
     ("bfloat16", "float32", "float32")],
)  # fmt: skip
def test_values_come_in_the_dtype_that_was_asked_for(stored: str, asked: str | None, ours: str, tmp_path: Path) -> None:
    directory = copy("mistral", tmp_path, dtype=stored)
    tensors = {name: x.astype(jnp.dtype(stored)) for name, x in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    network, params = load_hf(directory, dtype=asked)
    assert (network.config.dtype, network.config.param_dtype) == (ours, ours)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(ours)}
    expected = tensors["model.layers.1.mlp.up_proj.weight"].astype(ours).T
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][1], expected)


def test_older_spellings_mean_the_same(tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
    linear = {"rope_type": "linear", "factor": 4.0}
    older = {
        "llama3": {"rope_scaling": llama3 | {"original_max_position_embeddings": 8}, "rope_theta": 500.0},
        "llama_yarn": {"rope_scaling": yarn, "rope_theta": 1000.0},
        "qwen2": {"rope_theta": 10_000.0, "rope_scaling": None, "layer_types": ...},
        "gemma": {"rope_theta": 10_000.0, "tie_word_embeddings": ..., "hidden_act": "gelu", "hidden_activation": None},
        "gemma2": {"rope_theta": 10_000.0, "layer_types": ..., "cache_implementation": "hybrid"},
        "gemma3_text": {"rope_scaling": linear, "rope_theta": 50_000.0, "rope_local_base_freq": 500.0},
        "t5": {"dense_act_fn": ..., "is_gated_act": ..., "scale_decoder_outputs": ..., "n_positions": 512},
        "t5_1_1": {"scale_decoder_outputs": ..., "tie_word_embeddings": False},
    }
    for name, changes in older.items():
        new = hf_load.read_network(RECORDED / name)
        dtype = {"dtype": ..., "torch_dtype": "float32"}
        old = hf_load.read_network(copy(name, tmp_path, rope_parameters=..., **changes, **dtype))
        assert old == new, name


def test_a_field_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(ConfigError, match=r"config.json: field attention_sinks = 4 is unknown") as error:
            load_hf(copy(name, tmp_path, attention_sinks=4))
        assert name in str(error.value)
    with pytest.raises(ConfigError, match=r"Did you mean 'rms_norm_eps'"):
        load_hf(copy("llama3", tmp_path / "misspelt", rms_norm_epsilon=1e-5))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"model_type": "lama"}, r"model_type = 'lama' must be one of .* Did you mean 'llama'"),
        ("llama3", {"model_type": "mixtral"}, r"model_type = 'mixtral' must be one of"),
        ("llama3", {"hidden_act": "mish"}, r'hidden_act = "mish" must be one of'),
        ("llama3", {"quantization_config": {"quant_method": "awq"}}, r"quantization_config = .*awq.* Quantised"),
        ("llama3", {"vocab_size": "96"}, r'vocab_size = "96" must be a whole number'),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            r'rope_type = "longrope" must be one',
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "knots": 3}},
            r"rope_parameters.knots = 3",
        ),
        ("llama3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5 must be"),
        ("llama3", {"auto_map": {"AutoModel": "modeling.M"}}, r"auto_map = .* must be"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = .* must be"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, r"layer_types = .* must name 2 layers"),
        ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention = true must be"),
        ("gemma2", {"sliding_window": None}, r"sliding_window = null must be a number"),
        ("t5", {"is_encoder_decoder": False}, r"is_encoder_decoder = false must be true"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, r'feed_forward_proj = "gated-tanh" must be one of'),
        ("t5", {"dtype": "float8_e4m3fn"}, r'dtype = "float8_e4m3fn" must be one of'),
    ],
)
def test_what_is_not_implemented_is_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_hf(copy(name, tmp_path, **changes))


@pytest.fixture
def nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("parameters were allocated")

    monkeypatch.setattr(hf_load.stream, "_fill", never)


def rewrite(directory: Path, change: dict[str, np.ndarray | None]) -> Path:
    """Replace tensors, or remove those that are None."""
    tensors = load_file(directory / "model.safetensors") | change
    save_file({name: x for name, x in tensors.items() if x is not None}, directory / "model.safetensors")
    return directory


@pytest.mark.usefixtures("nothing_is_allocated")
def test_tensors_that_do_not_fit_are_named_before_anything_is_allocated(tmp_path: Path) -> None:
    cases: list[tuple[dict, type[PitError], str]] = [
        ({"lm_head.weight": None}, CheckpointError, r"lacks 1 of \d+ tensors: lm_head.weight"),
        ({"model.layers.1.mlp.up_proj.weight": None}, CheckpointError, r"lacks .* model.layers.1.mlp.up_proj.weight"),
        ({"model.embed_tokens.weight": np.zeros((95, 24), np.float32)}, CheckpointError,
         r"model.embed_tokens.weight has shape \[95, 24\], and config.json implies \[96, 24\]"),
        ({"model.layers.0.mlp.up_proj.weight": np.zeros((40, 24), np.int8)}, CheckpointError,
         r"model.layers.0.mlp.up_proj.weight has dtype I8; F32, BF16, F16 can be read"),
    ]  # fmt: skip
    for number, (change, error, message) in enumerate(cases):
        directory = rewrite(copy("mistral", tmp_path / str(number)), change)
        with pytest.raises(error, match=message):
            load_hf(directory)


def test_what_is_left_over_is_reported_unless_it_holds_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant, own = np.zeros(4, np.float32), np.zeros((2, 2), np.float32)
    silent = {"model.layers.0.self_attn.rotary_emb.inv_freq": constant}
    with caplog.at_level(logging.WARNING):
        load_hf(rewrite(copy("mistral", tmp_path / "a"), silent))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load_hf(rewrite(copy("mistral", tmp_path / "b"), silent | {"model.layers.0.adapter.weight": own}))
    assert "1 tensors are not used: model.layers.0.adapter.weight" in caplog.text


def test_an_output_matrix_of_its_own_unties_a_model_that_calls_itself_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedding = load_file(RECORDED / "gemma" / "model.safetensors")["model.embed_tokens.weight"]
    same, _ = load_hf(rewrite(copy("gemma", tmp_path / "a"), {"lm_head.weight": embedding}))
    assert same.config.tied
    assert not caplog.records
    other, params = load_hf(rewrite(copy("gemma", tmp_path / "b"), {"lm_head.weight": embedding + 1}))
    assert not other.config.tied
    np.testing.assert_array_equal(params["head"], embedding.T + 1)
    assert "read as untied" in caplog.text


def test_a_language_model_inside_one_that_sees_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = copy("gemma3_text", tmp_path)
    text = json.loads((directory / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 4,
             "dtype": "float32", "image_token_index": 90}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(outer))
    inner = load_file(directory / "model.safetensors")
    pictures = {"vision_tower.encoder.weight": np.zeros((2, 2), np.float32)}
    for number, stem in enumerate(("language_model.model.", "model.language_model.")):
        tensors = {name.replace("model.", stem, 1): x for name, x in inner.items()} | pictures
        save_file(tensors, directory / "model.safetensors")
        with caplog.at_level(logging.INFO):
            network, params = load_hf(directory)
        assert network == hf_load.read_network(RECORDED / "gemma3_text")
        np.testing.assert_array_equal(params["embedding"]["token"], inner["model.embed_tokens.weight"])
        assert [r.levelno for r in caplog.records if "left out 1 tensors" in r.message] == [logging.INFO] * (number + 1)


def test_a_classifier_of_one_label_is_a_reward_model(tmp_path: Path) -> None:
    score = np.random.default_rng(0).standard_normal((1, 24)).astype(np.float32)
    directory = rewrite(copy("qwen3", tmp_path / "one"), {"lm_head.weight": None, "score.weight": score})
    network, params = load_hf(directory)
    assert isinstance(network, ScalarModel)
    assert (network.readout, network.attention) == ("last", "causal")
    ids = jnp.asarray(reference("qwen3")["input_ids"][:1])
    ones = jnp.ones_like(ids)
    x = Conditional(prompt=ids[:, :9], prompt_segments=ones[:, :9], prompt_reference=jnp.zeros((1, 9), bool),
                    response=ids[:, 9:], response_segments=ones[:, 9:])  # fmt: skip
    hidden = jax.jit(lambda trunk, x: network.lm.hidden(trunk, x, attention="causal"))(params["trunk"], x)
    scores = jax.jit(lambda params, x: network.scores(params, x, 1))(params, x)
    np.testing.assert_allclose(scores[0, 0], hidden.response[0, -1] @ score[0], rtol=1e-5)
    with pytest.raises(CheckpointError, match="its head has 3 labels"):
        load_hf(rewrite(copy("qwen3", tmp_path / "three"), {"score.weight": np.zeros((3, 24), np.float32)}))


def test_t5_finds_its_embedding_under_any_of_its_names(tmp_path: Path) -> None:
    _, expected = load_hf(RECORDED / "t5")
    embedding = load_file(RECORDED / "t5" / "model.safetensors")["shared.weight"]
    copies = {"shared.weight": None, "decoder.embed_tokens.weight": embedding}
    _, params = load_hf(rewrite(copy("t5", tmp_path), copies))
    np.testing.assert_array_equal(params["embedding"]["token"], expected["embedding"]["token"])


def test_configs_of_published_models() -> None:
    """Fields as the released files have them, where they differ from what is recorded."""
    file = {"model_type": "llama", "hidden_size": 4096, "rope_theta": 500_000.0, "num_key_value_heads": 8}
    file |= {"torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1}
    llama = config_from_hf(file | {"max_position_embeddings": 8192, "rope_scaling": None}, (), where="f")
    assert isinstance(llama, DecoderOnlyConfig)
    assert (llama.head_dim, llama.kv_heads, llama.dtype, llama.tied, llama.norm_eps) == (
        128,
        8,
        "bfloat16",
        False,
        1e-6,
    )
    mistral = {"model_type": "mistral"}
    assert config_from_hf(mistral, (), where="f").window == 4096
    assert config_from_hf(mistral | {"sliding_window": None}, (), where="f").window is None
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    gemma = config_from_hf({"model_type": "gemma3", "text_config": text, "dtype": "bfloat16"}, (), where="f")
    assert isinstance(gemma, DecoderOnlyConfig)
    assert (gemma.vocab_size, gemma.heads, gemma.kv_heads, gemma.global_every) == (262_208, 8, 4, 6)
    assert (gemma.rope_base, gemma.local_rope_base, gemma.rope_scaling.factor) == (1e6, 1e4, 8.0)
    assert (gemma.dtype, gemma.tied, gemma.attention_scale) == ("bfloat16", True, None)
    qwen = {"model_type": "qwen2", "use_mrope": False, "sliding_window": 131_072, "max_window_layers": 28}
    assert config_from_hf(qwen, (), where="f").window is None


def test_scaling_of_logits_and_tying_of_t5s() -> None:
    def t5(family: str, names: tuple[str, ...] = ("lm_head.weight",), **fields: Any) -> tuple[bool, float]:
        config = config_from_hf({"model_type": family, "d_model": 4} | fields, names, where="f")
        assert isinstance(config, EncoderDecoderConfig)
        return config.tied, config.logit_scale

    assert t5("t5", ()) == (True, 0.5)
    assert t5("t5", tie_word_embeddings=False) == (False, 1.0)
    assert t5("t5", tie_word_embeddings=True, scale_decoder_outputs=False) == (False, 1.0)
    assert t5("t5", scale_decoder_outputs=True) == (False, 0.5)
    assert t5("mt5", tie_word_embeddings=False, transformers_version="4.9.0") == (False, 1.0)
    assert t5("mt5", (), tie_word_embeddings=True, transformers_version="4.57.6") == (True, 0.5)
    assert t5("mt5", tie_word_embeddings=True, transformers_version="5.23.0") == (False, 1.0)
    assert t5("umt5", tie_word_embeddings=False, scalable_attention=True) == (False, 1.0)


def test_a_config_in_the_place_of_the_files(tmp_path: Path) -> None:
    ours = hf_load.read_network(RECORDED / "llama3").config
    directory = copy("llama3", tmp_path, attention_sinks=4)
    network, _ = load_hf(directory, config=ours)
    assert network.config == ours


def test_places_that_hold_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        load_hf(tmp_path / "nowhere")
    broken = copy("llama3", tmp_path)
    (broken / "config.json").write_text("[1]")
    with pytest.raises(DataError, match=r"config.json is not a table"):
        load_hf(broken)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"without the package huggingface_hub"):
        load_hf("someone/some-model")


def test_every_family_is_recorded() -> None:
    recorded = {json.loads((RECORDED / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert recorded | {"gemma3", *T5GEMMA} == set(FAMILIES)
