"""T5Gemma and T5Gemma 2 in Hugging Face's format: `config.json` and tensor names, in the spelling of transformers 5.

Of T5Gemma 2 the part that reads text: what sees pictures is left out, as is the vector of its own that the token after
a picture has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pit_jax.core.errors import ConfigError
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert.hf_fields import Fields
from pit_jax.models.convert.hf_rope import rotary, rotary_by_layer
from pit_jax.models.convert.layout import Tensor, from_heads, into_heads, same, transposed
from pit_jax.models.t5gemma import EncoderSize, T5GemmaConfig

T5GEMMA = ("t5gemma", "t5gemma2")
"""Every `model_type` of the family."""

HEAD = "lm_head.out_proj.weight"
PICTURES = re.compile(
    r"model\.(encoder\.(vision_tower|multi_modal_projector)\..*|(en|de)coder\.embed_tokens\.eoi_embedding)"
)
"""Tensors of T5Gemma 2 that text has no use for."""

EXPORTED = frozenset(
    {
        *("vocab_size", "width", "heads", "kv_heads", "head_dim", "mlp", "norm_eps", "tied", "start_id", "rope_base"),
        *("encoder", "encoder_layers", "decoder_layers", "window", "encoder_window", "global_every"),
        *("attention_scale", "attention_softcap", "logit_softcap"),
    }
)
"""Fields of ours that transformers' T5Gemma has a name for. T5Gemma 2 cannot leave: there is none without pictures."""

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}
_HARMLESS = ("model_type", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size", "classifier_dropout_rate")
_PICTURES = ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")


class _Stack(NamedTuple):
    """What one of the two tables says; `shared` are fields of ours that encoder and decoder have in common."""

    size: EncoderSize
    scale: float
    windowed: list[bool]
    shared: dict[str, Any]


def t5gemma_config(family: str, fields: Fields, common: dict[str, Any]) -> T5GemmaConfig:
    """Return our config for the content of a `config.json`.

    Args:
      family: its `model_type`, one of `T5GEMMA`.
      fields: its fields.
      common: fields of ours that it does not decide.
    Raises:
      ConfigError: a field is missing or unknown, has a value that is not implemented, or differs between encoder and
        decoder where ours have it in common.
    """
    newer = family == "t5gemma2"
    fields.expect("is_encoder_decoder", True)
    tied, pictures = fields.flag("tie_word_embeddings", True), _PICTURES if newer else ()
    outer, decoder_fields = _table(fields, "encoder"), _table(fields, "decoder")
    fields.finish((*_HARMLESS, *pictures))
    encoder_fields = _table(outer, "text_config") if newer else outer
    if newer:
        outer.finish((*_HARMLESS, *pictures))
    start = decoder_fields.integer("bos_token_id", 2)
    encoder, decoder = (_stack(part, newer) for part in (encoder_fields, decoder_fields))
    decoder_fields.expect("cross_attention_hidden_size", None, encoder.size.width)
    for part in (encoder_fields, decoder_fields):
        # Layers are listed one by one, so that how the list came about tells nothing new.
        part.finish((*_HARMLESS, "_sliding_window_pattern"))
    scale = None if all(part.scale == part.size.head_dim**-0.5 for part in (encoder, decoder)) else encoder.scale
    given = {name: (encoder.shared[name], value) for name, value in decoder.shared.items()}
    if scale is not None:
        given["attention_scale"] = (encoder.scale, decoder.scale)
    for name, (one, other) in given.items():
        if one != other:
            raise ConfigError(
                f"{fields.where}: encoder and decoder differ in what is {name} here: {one} and {other}. "
                "Such models are not implemented."
            )
    shared: dict[str, Any] = decoder.shared | {"attention_scale": scale} | _windows(fields, encoder, decoder, newer)
    return T5GemmaConfig(
        **vars(decoder.size) | shared | common,
        encoder=None if encoder.size == decoder.size else encoder.size,
        encoder_layers=len(encoder.windowed),
        decoder_layers=len(decoder.windowed),
        qk_norm=newer,
        merged_attention=newer,
        shared_embedding=newer and tied,
        tied=tied,
        start_id=start,
    )


def _table(fields: Fields, name: str) -> Fields:
    found = fields.table(name)
    if found is None:
        raise fields.bad(name, "be a table", "Copy the file anew.")
    return found


def _stack(fields: Fields, newer: bool) -> _Stack:
    fields.expect("attention_bias", False)
    # Which of the two a stack is, its place says.
    fields.expect("is_decoder", True, False)
    fields.expect("use_bidirectional_attention", False, None)
    local = None
    if newer:
        # transformers has this field and does not read it.
        fields.expect("attn_logit_softcapping", None)
        base, scaling, local = rotary_by_layer(fields, 1_000_000.0, 10_000.0)
    else:
        base, scaling = rotary(fields, 10_000.0)
    size = EncoderSize(
        width=fields.integer("hidden_size", 2304),
        heads=fields.integer("num_attention_heads", 8),
        kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=fields.integer("head_dim", 256),
        mlp=fields.integer("intermediate_size", 9216),
    )
    shared = {
        "vocab_size": fields.integer("vocab_size", 262_208 if newer else 256_000),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": fields.choice("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
        "attention_softcap": None if newer else fields.nullable("attn_logit_softcapping", 50.0),
        "logit_softcap": fields.nullable("final_logit_softcapping", None if newer else 30.0),
        "window": fields.nullable("sliding_window", 4096.0),
        "rope_base": base,
        "rope_scaling": scaling,
        "local_rope_base": local,
    }
    scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
    return _Stack(size, scale, _windowed(fields, newer), shared)


def _windowed(fields: Fields, newer: bool) -> list[bool]:
    """Return which layers have a window."""
    count, names = fields.integer("num_hidden_layers", 26), {"sliding_attention": True, "full_attention": False}
    every = fields.integer("sliding_window_pattern", 6) if newer else 2
    given = fields.take("layer_types", None)
    if given is None:
        return [number % every != 0 for number in range(1, count + 1)]
    if not isinstance(given, list) or len(given) != count or not set(given) <= names.keys():
        raise fields.bad("layer_types", f"name {count} layers: {', '.join(names)}", "Correct the file.")
    return [names[name] for name in given]


def _windows(fields: Fields, encoder: _Stack, decoder: _Stack, newer: bool) -> dict[str, Any]:
    """Return the fields that say which layers have a window, and how far it reaches."""
    stacks, window = (encoder.windowed, decoder.windowed), decoder.shared["window"]
    if not any(map(any, stacks)):
        return {"window": None, "local_rope_base": None}
    every = next((layers.index(False) + 1 for layers in stacks if False in layers), 0)
    patterns = [[every == 0 or number % every != 0 for number in range(1, len(layers) + 1)] for layers in stacks]
    if window is None or patterns != list(stacks):
        raise ConfigError(
            f"{fields.where}: layer_types of encoder and decoder must give each layer a window but every n-th, with "
            "the same n and a sliding_window. Other patterns are not implemented."
        )
    size = int(window)
    reach = ((size - 1) // 2, size // 2) if newer else (size, size)
    return {"window": size, "encoder_window": reach, "global_every": every}


def t5gemma_json(config: T5GemmaConfig) -> dict[str, Any]:
    """Return what `config.json` says of a T5Gemma that has only fields of `EXPORTED` and passes `exportable`."""
    return {
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
        "encoder": _stack_json(config, config.encoder_config, config.encoder_layers, decoder=False),
        "decoder": _stack_json(config, config, config.decoder_layers, decoder=True),
    }


def exportable(config: T5GemmaConfig) -> tuple[str, str] | None:
    """Return (field, what it must do) where transformers' T5Gemma has no such model."""
    window, scale = config.window, config.attention_scale
    if window is not None and config.encoder_window != (window, window):
        return "encoder_window", f"be {(window, window)}"
    if scale is not None and round(scale**-2) ** -0.5 != scale:
        return "attention_scale", "be n^-1/2 of a whole number n"
    for size in (config, config.encoder_config):
        if size.width % size.heads:
            return "heads", f"divide width = {size.width}"
    return None


def _stack_json(config: T5GemmaConfig, size: ModelConfig, count: int, *, decoder: bool) -> dict[str, Any]:
    every, windowed = config.global_every, config.window is not None
    kinds = [windowed and (every == 0 or number % every != 0) for number in range(1, count + 1)]
    scale = size.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        "model_type": "t5_gemma_module",
        "is_decoder": decoder,
        "bos_token_id": config.start_id,
        "cross_attention_hidden_size": config.prompt_width if decoder else None,
        "vocab_size": config.vocab_size,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": count,
        "num_attention_heads": size.heads,
        "num_key_value_heads": config.block(decoder=decoder).kv_heads,
        "head_dim": size.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": config.window,
        "layer_types": ["sliding_attention" if near else "full_attention" for near in kinds],
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def t5gemma_tensors(config: T5GemmaConfig) -> Iterator[Tensor]:
    """Yield every tensor, in the order of its layers."""
    if not config.shared_embedding:
        shape = (config.vocab_size, config.prompt_width)
        yield same("model.encoder.embed_tokens.weight", "encoder_embedding/token", shape)
    side = "encoder" if config.shared_embedding else "decoder"
    vocab = (config.vocab_size, config.width)
    yield same(f"model.{side}.embed_tokens.weight", "embedding/token", vocab)
    encoder = config.encoder_config
    for layer in range(config.encoder_layers):
        yield from _layer(config, "encoder", encoder, layer)
    yield same("model.encoder.norm.weight", "encoder/final_norm/scale", (encoder.width,))
    for layer in range(config.decoder_layers):
        yield from _layer(config, "decoder", config, layer)
    yield same("model.decoder.norm.weight", "decoder/final_norm/scale", (config.width,))
    if not config.tied:
        yield transposed(HEAD, "head/kernel" if config.adapts("head") else "head", vocab)


def _layer(config: T5GemmaConfig, side: str, size: ModelConfig, layer: int) -> Iterator[Tensor]:
    start, path = f"model.{side}.layers.{layer}.", f"{side}/layers"
    cross = config.block(decoder=side == "decoder").cross
    sublayers = {"self_attn": "attention", "cross_attn": "cross", "feedforward": "mlp"}
    for theirs, ours in sublayers.items():
        if ours != "cross" or cross is not None:
            for place, name in (("before", "pre"), ("after", "post")):
                norm = f"{start}{name}_{theirs}_layernorm.weight"
                yield same(norm, f"{path}/{ours}_norms/{place}/scale", (size.width,), layer)
    yield from _attention(config, side, "attention", size.width, layer)
    if cross is not None:
        yield from _attention(config, side, "cross", cross, layer)
    for name, shape in {
        "gate": (size.mlp, size.width),
        "up": (size.mlp, size.width),
        "down": (size.width, size.mlp),
    }.items():
        yield transposed(f"{start}mlp.{name}_proj.weight", f"{path}/mlp/{name}/kernel", shape, layer)


def _attention(config: T5GemmaConfig, side: str, ours: str, source: int, layer: int) -> Iterator[Tensor]:
    """Yield the tensors of one attention; `source` is the width of what keys and values are made of."""
    start = f"model.{side}.layers.{layer}.{'cross_attn' if ours == 'cross' else 'self_attn'}."
    path, block = f"{side}/layers/{ours}", config.block(decoder=side == "decoder")
    size = config if side == "decoder" else config.encoder_config
    heads, kv_heads = (size.heads, size.head_dim), (block.kv_heads, size.head_dim)
    yield into_heads(f"{start}q_proj.weight", f"{path}/query/kernel", heads, size.width, layer)
    yield into_heads(f"{start}k_proj.weight", f"{path}/key/kernel", kv_heads, source, layer)
    yield into_heads(f"{start}v_proj.weight", f"{path}/value/kernel", kv_heads, source, layer)
    yield from_heads(f"{start}o_proj.weight", f"{path}/out/kernel", heads, size.width, layer)
    if config.qk_norm:
        for letter, name in (("q", "query"), ("k", "key")):
            yield same(f"{start}{letter}_norm.weight", f"{path}/{name}_norm/scale", (size.head_dim,), layer)
