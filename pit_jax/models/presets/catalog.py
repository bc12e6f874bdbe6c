"""Configs by name, and models by config."""

from __future__ import annotations

import dataclasses
from typing import Any

from pit_jax.core.errors import invalid, nearest
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import ModelConfig
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from pit_jax.models.presets.sizes import DECODER_ONLY, ENCODER_DECODER
from pit_jax.models.presets.t5gemma import T5GEMMA
from pit_jax.models.t5gemma import T5Gemma, T5GemmaConfig

_FAMILIES = {
    "decoder_only": (DecoderOnlyConfig, DecoderOnly, DECODER_ONLY),
    "encoder_decoder": (EncoderDecoderConfig, EncoderDecoder, ENCODER_DECODER),
    "t5gemma": (T5GemmaConfig, T5Gemma, T5GEMMA),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the config of a named size, with any of its fields replaced.

    Raises:
      ConfigError: no such name, or no such field.
    """
    for family, (_, _, sizes) in _FAMILIES.items():
        if name in sizes:
            return _config(family, sizes[name] | overrides)
    known = [name for _, _, sizes in _FAMILIES.values() for name in sizes]
    fix = f"Use one of them, or bind a config class.{nearest(name, known)}"
    raise invalid("preset.name", name, f"be one of {', '.join(known)}", fix)


def language_model(config: ModelConfig) -> ConditionalLM:
    """Return the model of a config, of whichever family."""
    return _FAMILIES[_family(config)][1](config)


def _config(family: str, fields: dict[str, Any]) -> ModelConfig:
    config_class = _FAMILIES[family][0]
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in fields:
        if name not in known:
            rule = f"be a field of {config_class.__name__}: {', '.join(known)}"
            raise invalid("model config field", name, rule, f"Correct the name.{nearest(name, known)}")
    return config_class(**fields)


def _family(config: ModelConfig) -> str:
    for family, (config_class, _, _) in _FAMILIES.items():
        if isinstance(config, config_class):
            return family
    rule = f"be a config of one of the families {', '.join(_FAMILIES)}"
    classes = ", ".join(config_class.__name__ for config_class, _, _ in _FAMILIES.values())
    raise invalid("model config", config, rule, f"Use {classes} or preset().")
