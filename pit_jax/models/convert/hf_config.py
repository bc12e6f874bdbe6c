"""Hugging Face's `config.json` as our configs, in the spellings of transformers 4 and 5.

A field is read, or known to be harmless, or an error. Defaults are those that transformers takes where a file leaves
a field out. Widths and counts that are wrong show in the shapes of tensors, which are compared before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pit_jax.core.errors import ConfigError, nearest
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert.hf_fields import Fields
from pit_jax.models.convert.hf_rope import rotary, rotary_by_layer
from pit_jax.models.convert.hf_t5gemma import T5GEMMA, t5gemma_config
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig

HEAD, SCORE = "lm_head.weight", "score.weight"
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
"""Dtype of our parameters for that of the file: float32 holds float16 exactly, and can be trained in."""

QUANTISED = ("quantization_config", "compression_config")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def config_from_hf(
    config: Mapping[str, Any], tensor_names: Collection[str], *, where: str, dtype: str | None = None
) -> ModelConfig:
    """Return our config for a `config.json`.

    Args:
      config: its content.
      tensor_names: of the checkpoint: whether there is an output matrix decides whether a T5 is tied.
      where: the file, for errors.
      dtype: of parameters and activations; None: the file's own (float32 for float16).
    Raises:
      ConfigError: the family is unknown, the weights are quantised, or a field is unknown or has a value that is not
        implemented.
    """
    fields = Fields(config, where)
    for name in QUANTISED:
        if fields.take(name, None) is not None:
            raise fields.bad(name, "be absent", "Quantised weights cannot be read: use the checkpoint they came from.")
    own = _dtype(fields, "float32")
    family = family_of(config, where=where)
    if family == "gemma3":
        fields = _text_part(fields)
        own = _dtype(fields, own)
        family = fields.choice("model_type", {"gemma3_text": "gemma3_text"}, "gemma3_text")
    fields.take("model_type", None)
    common = {"dtype": dtype or own, "param_dtype": dtype or own}
    if family in T5GEMMA:
        return t5gemma_config(family, fields, common)
    if family in ENCODER_DECODER:
        return _encoder_decoder(family, fields, HEAD not in tensor_names, common)
    # A classifier has no output matrix, and its trunk needs none.
    return _decoder_only(family, fields, SCORE in tensor_names, common)


def family_of(config: Mapping[str, Any], *, where: str) -> str:
    """Return the `model_type`.

    Raises:
      ConfigError: it is missing or unknown; the known ones are named.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        hint = nearest(str(family), FAMILIES)
        raise ConfigError(
            f"{where}: model_type = {family!r} must be one of {', '.join(FAMILIES)}. "
            f"Other architectures cannot be read.{hint}"
        )
    return family


def _dtype(fields: Fields, default: str) -> str:
    fields.take("torch_dtype", None)
    return fields.choice("dtype" if "dtype" in fields else "torch_dtype", DTYPES, default)


def _text_part(fields: Fields) -> Fields:
    """Return the settings of the language model inside a Gemma 3 that sees pictures, once the others are checked."""
    text = fields.table("text_config")
    if text is None:
        raise fields.bad("text_config", "be a table", "Copy the file anew.")
    fields.expect("tie_word_embeddings", True, None)
    pictures = ("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index")
    fields.finish(("model_type", "vision_config", "image_token_id", "boi_token_id", "eoi_token_id", *pictures))
    return text


def _decoder_only(family: str, fields: Fields, scores: bool, common: dict[str, Any]) -> DecoderOnlyConfig:
    sizes = _SIZES[family]
    width, heads = fields.integer("hidden_size", sizes["width"]), fields.integer("num_attention_heads", sizes["heads"])
    layers = fields.integer("num_hidden_layers", sizes["layers"])
    head_dim = fields.integer("head_dim", sizes.get("head_dim", width // max(heads, 1)))
    tied = fields.flag("tie_word_embeddings", family.startswith("gemma"))
    kv_default = heads if "num_key_value_heads" in fields else sizes.get("kv_heads", heads)
    shape = {
        "vocab_size": fields.integer("vocab_size", sizes["vocab"]),
        "width": width,
        "mlp": fields.integer("intermediate_size", sizes["mlp"]),
        "layers": layers,
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", kv_default),
        "head_dim": head_dim,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied": tied or scores,
    }
    own = DECODER_ONLY[family](fields, layers)
    if own.get("attention_scale") == head_dim**-0.5:
        own["attention_scale"] = None
    fields.finish(_IGNORED.get(family, ()))
    return DecoderOnlyConfig(**shape, **own, **common)


def _llama(fields: Fields, layers: int) -> dict[str, Any]:
    fields.expect("rope_interleaved", False)
    bias = fields.flag("attention_bias", False)
    own = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}
    return own | _rotary(fields) | _silu(fields)


def _mistral(fields: Fields, layers: int) -> dict[str, Any]:
    # transformers goes by `sliding_window` alone; a list of layers is another family's and must agree.
    window = fields.nullable("sliding_window", 4096)
    uniform = ["full_attention" if window is None else "sliding_attention"] * layers
    fields.expect("layer_types", None, uniform)
    return {"window": None if window is None else int(window)} | _rotary(fields) | _silu(fields)


def _qwen2(fields: Fields, layers: int) -> dict[str, Any]:
    fields.expect("use_mrope", False)
    return {"qkv_bias": True} | _qwen_windows(fields, layers) | _rotary(fields) | _silu(fields)


def _qwen3(fields: Fields, layers: int) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    own = {"qkv_bias": bias, "out_bias": bias, "qk_norm": True}
    return own | _qwen_windows(fields, layers) | _rotary(fields) | _silu(fields)


def _qwen_windows(fields: Fields, layers: int) -> dict[str, Any]:
    used, first = fields.flag("use_sliding_window", False), fields.integer("max_window_layers", 28)
    window = fields.nullable("sliding_window", 4096)
    return _windows(
        fields, window if used else None, [used and window is not None and n >= first for n in range(layers)]
    )


def _gemma(fields: Fields, layers: int) -> dict[str, Any]:
    # The released files say "gelu" and mean its approximation.
    names = ACTIVATIONS | {"gelu": "gelu_tanh"}
    activation = fields.choice("hidden_act", names, "gelu")
    if fields.take("hidden_activation", None) is not None:
        activation = fields.choice("hidden_activation", names, "gelu")
    return _gemma_common(fields) | {"activation": activation} | _rotary(fields)


def _gemma2(fields: Fields, layers: int) -> dict[str, Any]:
    own = _post_norm_gemma(fields, attention_softcap=50.0, logit_softcap=30.0)
    windowed = [n % 2 == 0 for n in range(layers)]
    return own | _windows(fields, fields.nullable("sliding_window", 4096), windowed) | _rotary(fields)


def _gemma3(fields: Fields, layers: int) -> dict[str, Any]:
    own = _post_norm_gemma(fields, attention_softcap=None, logit_softcap=None) | {"qk_norm": True}
    every = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    windowed = [(n + 1) % every != 0 for n in range(layers)]
    own |= _windows(fields, fields.nullable("sliding_window", 4096), windowed)
    base, scaling, local = rotary_by_layer(fields, 1_000_000.0, 10_000.0)
    local_base = None if own["window"] is None else local
    return own | {"rope_base": base, "rope_scaling": scaling, "local_rope_base": local_base}


def _gemma_common(fields: Fields) -> dict[str, Any]:
    fields.expect("use_bidirectional_attention", None, False)
    bias = fields.flag("attention_bias", False)
    return {"norm_offset": 1.0, "scale_embedding": True, "qkv_bias": bias, "out_bias": bias}


def _post_norm_gemma(fields: Fields, *, attention_softcap: float | None, logit_softcap: float | None) -> dict[str, Any]:
    return _gemma_common(fields) | {
        "activation": fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "post_norms": True,
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_softcap": fields.nullable("attn_logit_softcapping", attention_softcap),
        "logit_softcap": fields.nullable("final_logit_softcapping", logit_softcap),
    }


def _silu(fields: Fields) -> dict[str, Any]:
    return {"activation": fields.choice("hidden_act", ACTIVATIONS, "silu")}


def _rotary(fields: Fields) -> dict[str, Any]:
    base, scaling = rotary(fields, 10_000.0)
    return {"rope_base": base, "rope_scaling": scaling}


def _windows(fields: Fields, window: float | None, default: list[bool]) -> dict[str, Any]:
    """Return which layers see only a window: those of `layer_types`, or `default` where a file has none."""
    windowed, names = default, {"sliding_attention": True, "full_attention": False}
    given = fields.take("layer_types", None)
    if given is not None:
        if not isinstance(given, list) or len(given) != len(default) or not set(given) <= names.keys():
            raise fields.bad("layer_types", f"name {len(default)} layers: {', '.join(names)}", "Correct the file.")
        windowed = [names[name] for name in given]
    if not any(windowed):
        return {"window": None}
    if window is None:
        raise fields.bad("sliding_window", "be a number, as some layers have a window", "Correct the file.")
    if all(windowed):
        return {"window": int(window)}
    every = windowed.index(False) + 1
    if windowed == [(n + 1) % every != 0 for n in range(len(windowed))]:
        return {"window": int(window), "global_every": every}
    return {"window": int(window), "global_layers": tuple(n for n, near in enumerate(windowed) if not near)}


def _encoder_decoder(family: str, fields: Fields, tied: bool, common: dict[str, Any]) -> EncoderDecoderConfig:
    fields.expect("is_encoder_decoder", True)
    layers = fields.integer("num_layers", 6 if family == "t5" else 8)
    activation, gated = _feed_forward(fields, "relu" if family == "t5" else "gated-gelu")
    scaled = _scales_logits(family, fields)
    config = EncoderDecoderConfig(
        vocab_size=fields.integer("vocab_size", 32_128 if family == "t5" else 250_112),
        width=fields.integer("d_model", 512),
        heads=fields.integer("num_heads", 8 if family == "t5" else 6),
        head_dim=fields.integer("d_kv", 64),
        mlp=fields.integer("d_ff", 2048 if family == "t5" else 1024),
        encoder_layers=layers,
        decoder_layers=fields.integer("num_decoder_layers", layers),
        activation=activation,
        gated=gated,
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        tied=tied,
        scale_logits=None if scaled == tied else scaled,
        relative_buckets=fields.integer("relative_attention_num_buckets", 32),
        relative_max_distance=fields.integer("relative_attention_max_distance", 128),
        relative_per_layer=family == "umt5",
        start_id=fields.integer("decoder_start_token_id", fields.integer("pad_token_id", 0)),
        **common,
    )
    fields.finish(_IGNORED.get(family, ()))
    return config


def _feed_forward(fields: Fields, default: str) -> tuple[str, bool]:
    """Return activation and gating: "relu" or "gated-gelu", or in two fields, which are newer."""
    names = {name: (ours, False) for name, ours in ACTIVATIONS.items()}
    names |= {f"gated-{name}": (ours, True) for name, ours in ACTIVATIONS.items()}
    names["gated-gelu"] = ("gelu_tanh", True)
    activation, gated = fields.choice("feed_forward_proj", names, default)
    gated = fields.flag("is_gated_act", gated)
    if fields.take("dense_act_fn", None) is not None:
        activation = fields.choice("dense_act_fn", ACTIVATIONS, "relu")
    return activation, gated


def _scales_logits(family: str, fields: Fields) -> bool:
    """Return whether logits are multiplied by D^-1/2: where the embedding was tied when the model was trained."""
    tied = fields.flag("tie_word_embeddings", True)
    major = str(fields.take("transformers_version", "4")).partition(".")[0]
    if family == "mt5" and major.isdecimal() and int(major) >= 5:
        # Since then files call every T5 tied, and the mT5 of transformers scales never.
        tied = False
    return fields.flag("scale_decoder_outputs", tied)


_GEMMA2 = {"width": 2304, "mlp": 9216, "layers": 26, "heads": 8, "kv_heads": 4, "head_dim": 256}
_QWEN = {"vocab": 151_936, "width": 4096, "mlp": 22_016, "layers": 32, "heads": 32, "kv_heads": 32}
_SIZES: dict[str, dict[str, int]] = {
    "llama": {"vocab": 32_000, "width": 4096, "mlp": 11_008, "layers": 32, "heads": 32},
    "mistral": {"vocab": 32_000, "width": 4096, "mlp": 14_336, "layers": 32, "heads": 32, "kv_heads": 8},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma": {"vocab": 256_000, "width": 3072, "mlp": 24_576, "layers": 28, "heads": 16, "head_dim": 256},
    "gemma2": _GEMMA2 | {"vocab": 256_000},
    "gemma3_text": _GEMMA2 | {"vocab": 262_208},
}
"""What transformers takes for a field that is absent (key/value heads: as many as heads)."""

_IGNORED: dict[str, tuple[str, ...]] = {
    "llama": ("is_llama_config",),
    "gemma2": ("hidden_act",),
    "gemma3_text": ("hidden_act",),
    "umt5": ("scalable_attention",),
}
"""Fields that a family's model never reads, though another's does."""

DECODER_ONLY: dict[str, Callable[[Fields, int], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
ENCODER_DECODER = ("t5", "mt5", "umt5")
FAMILIES = (*DECODER_ONLY, "gemma3", *ENCODER_DECODER, *T5GEMMA)
"""Every `model_type` that can be read."""
