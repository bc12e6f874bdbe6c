"""Our model configs as `config.json` and `generation_config.json` of the Hugging Face family that can express them.

A family expresses a config exactly or not at all: every field that it has no name for must have the value that the
family builds in. Names and values are those of transformers 5; vLLM reads the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pit_jax.core.errors import ConfigError, invalid
from pit_jax.models.config import HOW_IT_RUNS, ModelConfig
from pit_jax.models.convert.hf_t5gemma import EXPORTED, exportable, t5gemma_json
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.t5gemma import T5GemmaConfig

Json = dict[str, Any]
Limit = Callable[[Any], tuple[str, str] | None]
"""Returns (field, what it must do) of a config that the family cannot express, or None."""

_MAX_POSITIONS = 8192
"""Written for models with rotary positions and no scaling: they have no such limit, but servers size caches by it."""

RUNTIME = HOW_IT_RUNS | {"lora"}
"""Fields that no `config.json` holds."""

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu"}
_SHAPE = frozenset({"vocab_size", "width", "heads", "head_dim", "mlp", "norm_eps", "tied", "activation"})
_DECODER = _SHAPE | {"layers", "kv_heads", "rope_base", "rope_scaling"}
_WINDOW = frozenset({"window", "global_every", "global_layers"})
_BIASES = frozenset({"qkv_bias", "out_bias"})
_ENCODER_DECODER = _SHAPE | {
    "encoder_layers",
    "decoder_layers",
    "relative_buckets",
    "relative_max_distance",
    "start_id",
    "gated",
    "scale_logits",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Special:
    """Ids of the tokenizer's special tokens; every one of `eos` ends a response."""

    pad: int | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def fields(self) -> Json:
        """Return them under their names in `config.json`; a missing one is null, which is not the same as no entry."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        return {"pad_token_id": self.pad, "bos_token_id": self.bos, "eos_token_id": eos}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a Hugging Face family can express.

    name: its `model_type`. config: class of the configs it can express. causal, scalar: names of the classes with an
      output matrix and with a scalar head (None: it has none that reads the last token). free: fields that it has a
      name for. fixed: values that it builds in; other fields must have our default. limits: what else must hold.
    write: its own part of `config.json`.
    """

    name: str
    config: type[ModelConfig]
    causal: str
    scalar: str | None
    free: frozenset[str]
    fixed: Mapping[str, object]
    limits: tuple[Limit, ...]
    write: Callable[[Any], Json]

    def obstacles(self, config: ModelConfig) -> dict[str, str]:
        """Return, for each field of `config` that the family cannot express, what it would have to do."""
        found = {}
        for field in dataclasses.fields(config):
            want = self.fixed.get(field.name, field.default)
            if field.name not in self.free | RUNTIME and vars(config)[field.name] != want:
                found[field.name] = f"be {want!r}"
        return found | dict(broken for limit in self.limits if (broken := limit(config)))


def family_of(config: ModelConfig) -> Family:
    """Return the first family that expresses a config exactly.

    Raises:
      ConfigError: there is none; the field that stands in the way, in all families or in the nearest, is named.
    """
    config = plain(config)
    families = [family for family in FAMILIES.values() if isinstance(config, family.config)]
    obstacles = {family.name: family.obstacles(config) for family in families}
    for family in families:
        if not obstacles[family.name]:
            return family
    raise _no_family(config, obstacles)


def _no_family(config: ModelConfig, obstacles: Mapping[str, dict[str, str]]) -> ConfigError:
    """Return the error for a config, given by family which fields stand in the way and what they would have to do."""
    (nearest, found), *others = sorted(obstacles.items(), key=lambda item: len(item[1]))
    everywhere = [field for field in found if all(field in other for _, other in others)]
    field, *more = everywhere or list(found)
    if everywhere:
        fix = "This model cannot leave in that format."
        return config.bad(field, f"{found[field]} in any Hugging Face family", fix)
    ways = {nearest: {name: found[name] for name in more}}
    ways |= {name: rest for name, rest in others if len(rest) == len(found) and rest.keys() != found.keys()}
    hints = [f" For {way}, {f} must {rule}." for way, rest in ways.items() for f, rule in rest.items()]
    fix = "This model cannot leave in that format." + "".join(hints)
    return config.bad(field, f"{found[field]} in {nearest}, the nearest Hugging Face family", fix)


def export_config(config: ModelConfig, *, special: Special, dtype: str, scalar: bool = False) -> tuple[Family, Json]:
    """Return the family that expresses a config, and its `config.json`.

    Args:
      config: of the language model, or of a reward model's trunk.
      special: ids of special tokens.
      dtype: of the tensors beside it.
      scalar: for a reward model that reads the last token.
    Raises:
      ConfigError: no family can express the config, or an id lies outside the vocabulary.
    """
    family = family_of(config)
    data = Special().fields() | family.write(plain(config)) | {"model_type": family.name, "use_cache": True}
    return family, finish_config(
        family, data, special=special, dtype=dtype, vocab_size=config.vocab_size, scalar=scalar
    )


def finish_config(family: Family, data: Json, *, special: Special, dtype: str, vocab_size: int, scalar: bool) -> Json:
    """Return a `config.json`, ours or a checkpoint's own, with everything that an export can change.

    Raises:
      ConfigError: an id lies outside the vocabulary, or a scalar model has no padding id of its own.
    """
    for name, ids in {"pad": (special.pad,), "bos": (special.bos,), "eos": special.eos}.items():
        for one in ids:
            if one is not None and not 0 <= one < vocab_size:
                raise invalid(f"Special.{name}", one, f"lie in [0, {vocab_size})", "Use the model's own tokenizer.")
    # Where nothing is known of the tokens, what a checkpoint's own config leaves out is left out.
    known = special.fields() if special != Special() else {}
    ids = {name: value for name, value in known.items() if value is not None or name not in data}
    data = {name: value for name, value in data.items() if name != "torch_dtype"} | ids
    data |= {"dtype": dtype, "vocab_size": vocab_size, "architectures": [family.causal]}
    if scalar:
        data |= {"architectures": [family.scalar], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        pad, eos = data.get("pad_token_id"), data.get("eos_token_id")
        # Answers end with the first EOS, so another one may well be what fills rows (as in Qwen's chat models).
        if pad is None or pad == (eos[0] if isinstance(eos, list) and eos else eos):
            rule = "be the id of a token that is in no text: scores are read at the last token that is not padding"
            fix = "Give the tokenizer a padding token (pad_token in tokenizer_config.json)."
            raise invalid("Special.pad", pad, rule, fix)
    return dict(sorted(data.items()))


def generation_config(data: Json) -> Json:
    """Return `generation_config.json` for a `config.json`: the special ids by which generation starts and stops."""
    names = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True} | {name: data[name] for name in names if data.get(name) is not None}


def plain(config: ModelConfig) -> ModelConfig:
    """Return the config with values that mean the default replaced by it, so that equal models have equal configs."""
    if isinstance(config, EncoderDecoderConfig):
        scaled = None if config.scale_logits == config.tied else config.scale_logits
        return dataclasses.replace(config, scale_logits=scaled)
    if not isinstance(config, DecoderOnlyConfig):
        return config
    if config.attention_scale == config.head_dim**-0.5:
        config = dataclasses.replace(config, attention_scale=None)
    if config.windowed.any():
        everywhere = tuple(int(layer) for layer in np.flatnonzero(~config.windowed))
        config = dataclasses.replace(config, global_every=0, global_layers=everywhere or None)
    else:
        config = dataclasses.replace(config, window=None, global_every=0, global_layers=None, local_rope_base=None)
    if config.local_rope_base == config.rope_base and config.rope_scaling is None:
        config = dataclasses.replace(config, local_rope_base=None)
    return config


def _heads_divide_width(config: DecoderOnlyConfig) -> tuple[str, str] | None:
    return ("heads", f"divide width = {config.width}") if config.width % config.heads else None


def _heads_fill_width(config: DecoderOnlyConfig) -> tuple[str, str] | None:
    wide = config.heads * config.head_dim != config.width
    return ("head_dim", f"be width / heads = {config.width / config.heads:g}") if wide else None


def _same_biases(config: DecoderOnlyConfig) -> tuple[str, str] | None:
    return ("out_bias", f"be qkv_bias = {config.qkv_bias}") if config.out_bias != config.qkv_bias else None


def _not_exact_gelu(config: ModelConfig) -> tuple[str, str] | None:
    # Gemma and gated T5 read "gelu" as the approximation, for the sake of their first published configs.
    return ("activation", "not be 'gelu'") if config.activation == "gelu" else None


def _not_exact_gated_gelu(config: ModelConfig) -> tuple[str, str] | None:
    return _not_exact_gelu(config) if config.gated else None


def _window_everywhere(config: DecoderOnlyConfig) -> tuple[str, str] | None:
    some = config.window is not None and not config.windowed.all()
    return ("window", "hold in every layer") if some else None


def _whole_scale(config: DecoderOnlyConfig) -> tuple[str, str] | None:
    scale = config.attention_scale
    if scale is None or math.isclose(_scalar(config) ** -0.5, scale, rel_tol=1e-12):
        return None
    return "attention_scale", "be n^-1/2 of a whole number n"


def _plain_logits(config: EncoderDecoderConfig) -> tuple[str, str] | None:
    return ("scale_logits", "be False") if config.logit_scale != 1.0 else None


def _scaled_logits(config: EncoderDecoderConfig) -> tuple[str, str] | None:
    # transformers 5 scales the logits of every umT5, tied or not.
    return None if config.logit_scale != 1.0 else ("scale_logits", "be True")


def _scalar(config: DecoderOnlyConfig) -> int:
    return config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)


def _rope(config: DecoderOnlyConfig) -> Json:
    scaling, plain = config.rope_scaling, {"rope_type": "default", "rope_theta": config.rope_base}
    if scaling is None:
        return plain
    rope = plain | {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return rope
    rope |= {"original_max_position_embeddings": scaling.original_max_positions}
    if scaling.kind == "llama3":
        return rope | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    factor = {} if scaling.attention_factor is None else {"attention_factor": float(scaling.attention_factor)}
    return rope | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow} | factor


def _max_positions(config: DecoderOnlyConfig) -> int:
    scaling = config.rope_scaling
    if scaling is None:
        return _MAX_POSITIONS
    # transformers warns of a limit that is not the factor times what the model was trained on.
    return math.ceil(scaling.factor * (scaling.original_max_positions or _MAX_POSITIONS))


def _llama(config: DecoderOnlyConfig) -> Json:
    """Return what all decoder-only families write; the keys that only some of them read harm no other."""
    return {
        "attention_bias": config.out_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATIONS[config.activation],
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "max_position_embeddings": _max_positions(config),
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope(config),
        "tie_word_embeddings": config.tied,
    }


def _llama_with_mlp_bias(config: DecoderOnlyConfig) -> Json:
    return _llama(config) | {"mlp_bias": config.mlp_bias}


def _mistral(config: DecoderOnlyConfig) -> Json:
    data = _llama(config) | {"sliding_window": config.window}
    del data["attention_bias"]
    return data


def _layer_types(config: DecoderOnlyConfig) -> list[str]:
    return ["sliding_attention" if near else "full_attention" for near in config.windowed]


def _qwen(config: DecoderOnlyConfig) -> Json:
    kinds, near = _layer_types(config), bool(config.windowed.any())
    window = {"use_sliding_window": near, "sliding_window": config.window}
    # Older readers know no list: they take every layer from this one on as windowed.
    first = kinds.index("sliding_attention") if near else config.layers
    return _llama(config) | window | {"layer_types": kinds, "max_window_layers": first}


def _qwen2(config: DecoderOnlyConfig) -> Json:
    data = _qwen(config)
    del data["attention_bias"], data["head_dim"]
    return data


def _gemma2(config: DecoderOnlyConfig) -> Json:
    data = _llama(config)
    return data | {
        "hidden_activation": data["hidden_act"],
        "query_pre_attn_scalar": _scalar(config),
        "sliding_window": config.window,
        "layer_types": _layer_types(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _gemma3(config: DecoderOnlyConfig) -> Json:
    everywhere = _rope(config)
    local = config.local_rope_base
    near = everywhere if local is None else {"rope_type": "default", "rope_theta": local}
    return _gemma2(config) | {"rope_parameters": {"full_attention": everywhere, "sliding_attention": near}}


def _t5(config: EncoderDecoderConfig) -> Json:
    kind = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    gated = {"gelu_new": "gated-gelu"}.get(kind, f"gated-{kind}")
    scaled = config.logit_scale != 1.0
    return {
        "d_ff": config.mlp,
        "d_kv": config.head_dim,
        "d_model": config.width,
        "decoder_start_token_id": config.start_id,
        "dense_act_fn": kind,
        "dropout_rate": config.dropout,
        "feed_forward_proj": gated if config.gated else kind,
        "is_encoder_decoder": True,
        "is_gated_act": config.gated,
        "layer_norm_epsilon": config.norm_eps,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "num_layers": config.encoder_layers,
        "relative_attention_max_distance": config.relative_max_distance,
        "relative_attention_num_buckets": config.relative_buckets,
        # transformers 4 decides the scale by tying, transformers 5 by the second key, and tying by what is in the file.
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": scaled,
    }


_GEMMA = {"norm_offset": 1.0, "scale_embedding": True}
_GEMMA2 = _GEMMA | {"post_norms": True}
_GEMMA2_FREE = _DECODER | _WINDOW | _BIASES | {"attention_scale", "logit_softcap"}


def _decoder(name: str, prefix: str, **fields: Any) -> Family:
    scalar = fields.pop("scalar", f"{prefix}ForSequenceClassification")
    return Family(name=name, config=DecoderOnlyConfig, causal=f"{prefix}ForCausalLM", scalar=scalar, **fields)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _decoder(
            "llama",
            "Llama",
            free=_DECODER | _BIASES | {"mlp_bias"},
            fixed={},
            limits=(_heads_divide_width, _same_biases),
            write=_llama_with_mlp_bias,
        ),
        _decoder(
            "mistral",
            "Mistral",
            free=_DECODER | _WINDOW,
            fixed={},
            limits=(_window_everywhere,),
            write=_mistral,
        ),
        _decoder(
            "qwen2",
            "Qwen2",
            free=_DECODER | _WINDOW,
            fixed={"qkv_bias": True},
            limits=(_heads_fill_width,),
            write=_qwen2,
        ),
        _decoder(
            "qwen3",
            "Qwen3",
            free=_DECODER | _WINDOW | _BIASES,
            fixed={"qk_norm": True},
            limits=(_same_biases,),
            write=_qwen,
        ),
        _decoder(
            "gemma",
            "Gemma",
            free=_DECODER | _BIASES,
            fixed=_GEMMA,
            limits=(_same_biases, _not_exact_gelu),
            write=_llama,
        ),
        _decoder(
            "gemma2",
            "Gemma2",
            free=_GEMMA2_FREE | {"attention_softcap"},
            fixed=_GEMMA2,
            limits=(_heads_divide_width, _same_biases, _whole_scale),
            write=_gemma2,
        ),
        _decoder(
            "gemma3_text",
            "Gemma3",
            scalar="Gemma3TextForSequenceClassification",
            free=_GEMMA2_FREE | {"local_rope_base"},
            fixed=_GEMMA2 | {"qk_norm": True},
            limits=(_heads_divide_width, _same_biases, _whole_scale),
            write=_gemma3,
        ),
        Family(
            name="t5",
            config=EncoderDecoderConfig,
            causal="T5ForConditionalGeneration",
            scalar=None,
            free=_ENCODER_DECODER,
            fixed={},
            limits=(_not_exact_gated_gelu,),
            write=_t5,
        ),
        Family(
            name="mt5",
            config=EncoderDecoderConfig,
            causal="MT5ForConditionalGeneration",
            scalar=None,
            free=_ENCODER_DECODER,
            fixed={},
            limits=(_not_exact_gated_gelu, _plain_logits),
            write=_t5,
        ),
        Family(
            name="umt5",
            config=EncoderDecoderConfig,
            causal="UMT5ForConditionalGeneration",
            scalar=None,
            free=_ENCODER_DECODER,
            fixed={"relative_per_layer": True},
            limits=(_not_exact_gated_gelu, _scaled_logits),
            write=_t5,
        ),
        Family(
            name="t5gemma",
            config=T5GemmaConfig,
            causal="T5GemmaForConditionalGeneration",
            scalar=None,
            free=EXPORTED,
            fixed={},
            limits=(exportable,),
            write=t5gemma_json,
        ),
    )
}
"""By `model_type`, in the order in which they are tried."""
