"""T5X's network settings as our configs and back. T5X keeps them in gin files, not in its checkpoints."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from pit_jax.core.errors import ConfigError, invalid, nearest
from pit_jax.io.files import read_json
from pit_jax.models.config import HOW_IT_RUNS, ModelConfig
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig

NETWORKS = {
    "t5": "t5x.examples.t5.network.Transformer",
    "scalable_t5": "t5x.examples.scalable_t5.network.Transformer",
    "decoder_only": "t5x.examples.decoder_only.network.DecoderWrapper",
}
BUCKETS, MAX_DISTANCE = 32, 128
"""Of relative positions; numbers in T5X's code, not settings."""

_NETWORK = re.compile(r"(?:t5x\.)?(?:examples\.)?(t5|scalable_t5|decoder_only)\.network\.\w+")
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_tanh", "silu": "silu", "swish": "silu"}
_REMAT = {"none": "none", "minimal": "dots_with_no_batch_dims", "full": "full"}
_COMMON: dict[str, Any] = {
    "vocab_size": None,
    "dtype": "float32",
    "emb_dim": 512,
    "num_heads": 8,
    "head_dim": 64,
    "mlp_dim": 2048,
    "mlp_activations": ("relu",),
    "dropout_rate": 0.1,
    "logits_via_embedding": False,
    "float32_attention_logits": False,
}
_STACKS = {"num_encoder_layers": 6, "num_decoder_layers": 6}
_FIELDS = {
    "t5": _COMMON | _STACKS,
    "scalable_t5": _COMMON | _STACKS | {"remat_policy": "none", "scan_layers": True, "param_scan_axis": 1},
    "decoder_only": _COMMON | {"num_layers": 6},
}
"""Settings of each network with T5X's defaults."""

Spec = Mapping[str, Any]


def config_from_t5x(spec: Spec | str | os.PathLike[str], *, param_dtype: str = "float32") -> ModelConfig:
    """Return our config of a network of T5X.

    Args:
      spec: a mapping, or the path of a JSON file, with `network` (the class, such as
        t5x.examples.t5.network.Transformer), `model` (EncoderDecoderModel, DecoderOnlyModel or
        PrefixLanguageModel) and `config`, the network's settings by T5X's names, gin's `network.T5Config.emb_dim`
        included; what is left out has T5X's default. Optional: `relpos` {num_buckets, max_distance} and
        `inputs_bidirectional_attention`. Other entries beside `config` are ignored.
      param_dtype: of the parameters, which T5X does not count as a setting.

    Raises:
      ConfigError: the network, a setting or a value is not known; it is named.
      DataError: the file is missing or no JSON.
    """
    if not isinstance(spec, Mapping):
        spec = read_json(spec)
    for key in ("network", "config"):
        if not isinstance(spec, Mapping) or key not in spec:
            raise ConfigError(
                f"The description of a T5X network has no {key!r}. It takes network, model and config, such as "
                f"{{'network': {NETWORKS['t5']!r}, 'model': 'EncoderDecoderModel', 'config': {{'emb_dim': 768, ...}}}}."
            )
    kind = _kind(spec["network"])
    settings = _settings(kind, spec["config"])
    shared: dict[str, Any] = _shared(settings) | _relpos(spec) | {"param_dtype": param_dtype}
    if kind == "decoder_only":
        return DecoderOnlyConfig(
            layers=_integer(settings, "num_layers"),
            kv_heads=shared["heads"],
            position="relative",
            attention_scale=1.0,
            prefix_lm=_is_prefix_lm(spec),
            scale_logits=shared["tied"],
            **shared,
        )
    if spec.get("model", "EncoderDecoderModel") != "EncoderDecoderModel":
        raise invalid("model", spec["model"], f"be 'EncoderDecoderModel' with {spec['network']}", "Change either.")
    if kind == "scalable_t5":
        _choice(settings, "param_scan_axis", (0, 1))
        shared["remat"] = _REMAT[_choice(settings, "remat_policy", tuple(_REMAT))]
    return EncoderDecoderConfig(
        encoder_layers=_integer(settings, "num_encoder_layers"),
        decoder_layers=_integer(settings, "num_decoder_layers"),
        relative_per_layer=kind == "scalable_t5",
        **shared,
    )


def spec_from_config(config: ModelConfig, *, scanned: bool) -> dict[str, Any]:
    """Return the description of the T5X network that computes what a config of ours does.

    Args:
      config: of the model.
      scanned: whether T5X scans over the layers, which its scalable T5 alone can.

    Raises:
      ConfigError: T5X has no such network; the first setting that keeps it from being one is named.
    """
    if not isinstance(config, EncoderDecoderConfig | DecoderOnlyConfig):
        raise ConfigError(f"{type(config).__name__} is no T5 and no decoder-only model: T5X cannot hold it.")
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}.get(config.activation)
    if activation is None:
        raise config.bad("activation", f"be one of {', '.join(_ACTIVATIONS.values())} for T5X", "Export elsewhere.")
    settings = {
        "vocab_size": config.vocab_size,
        "dtype": config.dtype,
        "emb_dim": config.width,
        "num_heads": config.heads,
        "head_dim": config.head_dim,
        "mlp_dim": config.mlp,
        "mlp_activations": [activation, "linear"] if config.gated else [activation],
        "dropout_rate": config.dropout,
        "logits_via_embedding": config.tied,
    }
    spec: dict[str, Any] = {}
    if isinstance(config, DecoderOnlyConfig):
        kind = "decoder_only"
        settings["num_layers"] = config.layers
        spec |= {"model": "DecoderOnlyModel", "inputs_bidirectional_attention": config.prefix_lm}
    else:
        kind = "scalable_t5" if config.relative_per_layer else "t5"
        settings |= {"num_encoder_layers": config.encoder_layers, "num_decoder_layers": config.decoder_layers}
        spec |= {"model": "EncoderDecoderModel"}
    if kind == "scalable_t5":
        settings["scan_layers"] = scanned
    elif scanned:
        raise invalid("scanned", True, "be False for this model", "T5X scans over layers in its scalable T5 only.")
    relpos = {"num_buckets": config.relative_buckets, "max_distance": config.relative_max_distance}
    spec |= {"network": NETWORKS[kind], "config": settings, "relpos": relpos}
    _check_same(config, config_from_t5x(spec))
    return spec


def _check_same(config: ModelConfig, again: ModelConfig) -> None:
    """Raise for the first field in which a config differs from what T5X makes of it."""
    for field in dataclasses.fields(config):
        ours, theirs = vars(config)[field.name], vars(again)[field.name]
        if field.name == "scale_logits" and ours is None:
            ours = config.tied
        if field.name == "scale_logits" and theirs is None:
            theirs = again.tied
        if field.name not in HOW_IT_RUNS and ours != theirs:
            fix = "Merge the adapter first." if field.name == "lora" else "Keep it as a checkpoint of pit_jax."
            raise invalid(f"{type(config).__name__}.{field.name}", ours, f"be {theirs!r} in T5X", fix)


def _kind(network: object) -> str:
    name = str(network).strip("@").removesuffix("()")
    match = _NETWORK.fullmatch(name)
    if match is None:
        raise invalid("network", network, f"be one of {', '.join(NETWORKS.values())}", "Other networks are not known.")
    return match[1]


def _settings(kind: str, given: object) -> dict[str, Any]:
    """Return all settings of a network, those left out with T5X's defaults."""
    if not isinstance(given, Mapping):
        raise invalid("config", given, "be an object with the network's settings", "Use T5X's names of them.")
    known = _FIELDS[kind]
    settings = dict(known)
    for key, value in given.items():
        name = str(key).rpartition(".")[2]
        if name not in known:
            raise ConfigError(f"config.{key} = {value!r} is not a setting of {NETWORKS[kind]}.{nearest(name, known)}")
        settings[name] = _literal(value)
    return settings


def _literal(value: Any) -> Any:
    """Return what a string of gin's stands for, such as "('gelu', 'linear')"; anything else as it is."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        return value


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig."""
    dtype = str(settings["dtype"]).rpartition(".")[2]
    if dtype not in ("float32", "bfloat16"):
        raise invalid("config.dtype", settings["dtype"], "be 'float32' or 'bfloat16'", "Use one of them.")
    rate = settings["dropout_rate"]
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise invalid("config.dropout_rate", rate, "be a number", "Use 0.0 to switch it off.")
    # Our attention scores are float32 always, so that this one is only looked at.
    _choice(settings, "float32_attention_logits", (False, True))
    activation, gated = _activations(settings["mlp_activations"])
    return {
        "vocab_size": _integer(settings, "vocab_size"),
        "width": _integer(settings, "emb_dim"),
        "heads": _integer(settings, "num_heads"),
        "head_dim": _integer(settings, "head_dim"),
        "mlp": _integer(settings, "mlp_dim"),
        "activation": activation,
        "gated": gated,
        "tied": _choice(settings, "logits_via_embedding", (False, True)),
        "dropout": float(rate),
        "dtype": dtype,
    }


def _activations(value: Any) -> tuple[str, bool]:
    """Return our activation, and whether a linear projection is multiplied by it."""
    names = list(value) if isinstance(value, list | tuple) else [value]
    known = bool(names) and names[0] in _ACTIVATIONS and names[1:] in ([], ["linear"])
    if not known:
        rule = f"be one of {', '.join(_ACTIVATIONS)}, alone or followed by 'linear'"
        raise invalid("config.mlp_activations", value, rule, "Other products are not known.")
    return _ACTIVATIONS[names[0]], len(names) == 2


def _is_prefix_lm(spec: Spec) -> bool:
    """Return whether prompts are seen in both directions; it leaves no trace in a checkpoint, hence is asked for."""
    both_ways = spec.get("inputs_bidirectional_attention")
    models = {"DecoderOnlyModel": bool(both_ways), "PrefixLanguageModel": True}
    if spec.get("model") not in models or both_ways not in (None, False, True):
        rule = "be 'DecoderOnlyModel' or 'PrefixLanguageModel' (a prefix LM sees its prompt in both directions)"
        raise invalid("model", spec.get("model"), rule, "A checkpoint does not tell which: name it.")
    return models[spec["model"]]


def _relpos(spec: Spec) -> dict[str, int]:
    given = spec.get("relpos", {})
    known = {"num_buckets": BUCKETS, "max_distance": MAX_DISTANCE}
    if not isinstance(given, Mapping) or given.keys() - known:
        raise invalid("relpos", given, f"have the entries {', '.join(known)} only", "Remove the others.")
    numbers = known | dict(given)
    return {
        "relative_buckets": _integer(numbers, "num_buckets", of="relpos"),
        "relative_max_distance": _integer(numbers, "max_distance", of="relpos"),
    }


def _integer(settings: Mapping[str, Any], name: str, of: str = "config") -> int:
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(f"{of}.{name}", value, "be a whole number of at least 1", "Take it from the run's gin file.")
    return value


def _choice(settings: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    value = settings[name]
    same = [choice for choice in choices if choice == value and type(choice) is type(value)]
    if not same:
        raise invalid(f"config.{name}", value, f"be one of {', '.join(map(repr, choices))}", "Use one of them.")
    return same[0]
