"""Hugging Face's tensor names and layouts, one table for reading, writing and adapters.

Their matrices are (outputs, inputs), ours inputs first; attention's have its heads taken apart in ours. One stack of
layers is one leaf in ours, with a leading axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from pit_jax.core.errors import invalid, nearest
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert.hf_config import DECODER_ONLY, ENCODER_DECODER, FAMILIES, HEAD, SCORE
from pit_jax.models.convert.hf_t5gemma import T5GEMMA, t5gemma_tensors
from pit_jax.models.convert.layout import Tensor, from_heads, into_heads, same, transposed
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.t5gemma import T5GemmaConfig

STEM = "model."
"""Before the names of a decoder-only model's tensors, except the output matrix's."""


def tensors(config: ModelConfig, family: str, stem: str = STEM) -> list[Tensor]:
    """Return every tensor of a language model, in the order of its layers.

    Args:
      config: the architecture.
      family: its `model_type`.
      stem: what decoder-only tensors' names start with.
    Raises:
      ConfigError: no such family, or one of the other kind of model.
    """
    if family not in FAMILIES:
        raise invalid(
            "family", family, f"be one of {', '.join(FAMILIES)}", f"Use one of them.{nearest(family, FAMILIES)}"
        )
    known: tuple[str, ...]
    if isinstance(config, T5GemmaConfig):
        known, found = T5GEMMA, t5gemma_tensors(config)
    elif isinstance(config, EncoderDecoderConfig):
        known, found = ENCODER_DECODER, _t5(config)
    else:
        assert isinstance(config, DecoderOnlyConfig)
        known, found = (*DECODER_ONLY, "gemma3"), _decoder_only(config, stem)
    if family not in known:
        rule = f"be one of {', '.join(known)} for a {type(config).__name__}"
        raise invalid("family", family, rule, "Use one of them.")
    return list(found)


def classifier_tensors(config: ModelConfig, family: str, stem: str = STEM) -> list[Tensor]:
    """Return every tensor of a `...ForSequenceClassification` with one label: a `ScalarModel` without its bias.

    Raises:
      ConfigError: as `tensors`, or the family is not known to have such a head.
    """
    if not isinstance(config, DecoderOnlyConfig):
        rule = f"be one of {', '.join(DECODER_ONLY)} for a model of rewards"
        raise invalid("family", family, rule, "Encoder-decoders have no such head of one map.")
    trunk = [tensor for tensor in tensors(config, family, stem) if not tensor.name.endswith(HEAD)]
    head = Tensor(name=SCORE, path="head/kernel", shape=(1, config.width), split=(config.width,), order=(0,))
    return [dataclasses.replace(tensor, path=f"trunk/{tensor.path}") for tensor in trunk] + [head]


def _decoder_only(config: DecoderOnlyConfig, stem: str) -> Iterator[Tensor]:
    vocab = (config.vocab_size, config.width)
    yield same(f"{stem}embed_tokens.weight", "embedding/token", vocab)
    # The same name is the norm before the feed-forward layer, or where there are four norms, the one after attention.
    norms = {"input_layernorm": "attention_norms/before", "post_attention_layernorm": "mlp_norms/before"}
    if config.post_norms:
        norms |= {
            "post_attention_layernorm": "attention_norms/after",
            "pre_feedforward_layernorm": "mlp_norms/before",
            "post_feedforward_layernorm": "mlp_norms/after",
        }
    for layer in range(config.layers):
        start = f"{stem}layers.{layer}."
        for theirs, ours in norms.items():
            yield same(f"{start}{theirs}.weight", f"layers/{ours}/scale", (config.width,), layer)
        yield from _attention(config, f"{start}self_attn.", layer)
        yield from _mlp(config, f"{start}mlp.", layer)
    yield same(f"{stem}norm.weight", "final_norm/scale", (config.width,))
    yield from _head(config, stem)


def _attention(config: DecoderOnlyConfig, start: str, layer: int) -> Iterator[Tensor]:
    parts = (("q", "query", config.heads), ("k", "key", config.kv_heads), ("v", "value", config.kv_heads))
    for letter, ours, heads in parts:
        name, path = f"{start}{letter}_proj.", f"layers/attention/{ours}"
        split = (heads, config.head_dim)
        yield into_heads(f"{name}weight", f"{path}/kernel", split, config.width, layer)
        if config.qkv_bias:
            shape = (math.prod(split),)
            yield Tensor(name=f"{name}bias", path=f"{path}/bias", layer=layer, shape=shape, split=split, order=(0, 1))
        if config.qk_norm and ours != "value":
            yield same(f"{start}{letter}_norm.weight", f"layers/attention/{ours}_norm/scale", (config.head_dim,), layer)
    split = (config.heads, config.head_dim)
    yield from_heads(f"{start}o_proj.weight", "layers/attention/out/kernel", split, config.width, layer)
    if config.out_bias:
        yield same(f"{start}o_proj.bias", "layers/attention/out/bias", (config.width,), layer)


def _mlp(config: DecoderOnlyConfig, start: str, layer: int) -> Iterator[Tensor]:
    wide, narrow = (config.mlp, config.width), (config.width, config.mlp)
    parts = [("gate", wide)] if config.gated else []
    for name, shape in [*parts, ("up", wide), ("down", narrow)]:
        yield transposed(f"{start}{name}_proj.weight", f"layers/mlp/{name}/kernel", shape, layer)
        if config.mlp_bias:
            yield same(f"{start}{name}_proj.bias", f"layers/mlp/{name}/bias", shape[:1], layer)


def _head(config: ModelConfig, stem: str) -> Iterator[Tensor]:
    if not config.tied:
        name = f"language_model.{HEAD}" if stem == "language_model.model." else HEAD
        path = "head/kernel" if config.adapts("head") else "head"
        yield transposed(name, path, (config.vocab_size, config.width))


def _t5(config: EncoderDecoderConfig) -> Iterator[Tensor]:
    yield same("shared.weight", "embedding/token", (config.vocab_size, config.width))
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        sublayers = ["attention", "mlp"] if side == "encoder" else ["attention", "cross", "mlp"]
        for layer in range(count):
            for index, sublayer in enumerate(sublayers):
                start, path = f"{side}.block.{layer}.layer.{index}.", f"{side}/layers/"
                norm = f"{path}{sublayer}_norms/before/scale"
                yield same(f"{start}layer_norm.weight", norm, (config.width,), layer)
                if sublayer == "mlp":
                    yield from _t5_mlp(config, f"{start}DenseReluDense.", f"{path}mlp/", layer)
                else:
                    kind = "SelfAttention" if sublayer == "attention" else "EncDecAttention"
                    yield from _t5_attention(config, f"{start}{kind}.", f"{path}{sublayer}/", layer)
        yield from _t5_bias(config, side, count)
        yield same(f"{side}.final_layer_norm.weight", f"{side}/final_norm/scale", (config.width,))
    yield from _head(config, "")


def _t5_attention(config: EncoderDecoderConfig, start: str, path: str, layer: int) -> Iterator[Tensor]:
    heads = (config.heads, config.head_dim)
    for letter, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        yield into_heads(f"{start}{letter}.weight", f"{path}{ours}/kernel", heads, config.width, layer)
    yield from_heads(f"{start}o.weight", f"{path}out/kernel", heads, config.width, layer)


def _t5_mlp(config: EncoderDecoderConfig, start: str, path: str, layer: int) -> Iterator[Tensor]:
    wide = (config.mlp, config.width)
    inputs = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    for theirs, ours in inputs.items():
        yield transposed(f"{start}{theirs}.weight", f"{path}{ours}/kernel", wide, layer)
    yield transposed(f"{start}wo.weight", f"{path}down/kernel", wide[::-1], layer)


def _t5_bias(config: EncoderDecoderConfig, side: str, count: int) -> Iterator[Tensor]:
    """Yield the tables of relative positions: one per layer (umT5), or the first layer's, which all share."""
    name = f"{side}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = (config.relative_buckets, config.heads)
    if not config.relative_per_layer:
        yield same(name.format(0), f"{side}/relative_bias/table", shape)
        return
    for layer in range(count):
        yield same(name.format(layer), f"{side}/layers/relative_bias/table", shape, layer)
