"""Tiny Hugging Face checkpoints with tokenizers that fit them."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax

from pit_jax.models.config import ModelConfig
from pit_jax.models.convert.hf_export_config import Special
from pit_jax.models.convert.hf_save import save_hf
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.presets.catalog import language_model
from pit_jax.text.tokenizer import load_tokenizer, tokenizer_files

DATA = pathlib.Path(__file__).parents[1] / "data"
_SHAPE: dict[str, Any] = dict(width=16, heads=2, head_dim=8, mlp=32)
MODELS: dict[str, ModelConfig] = {
    "llama3": DecoderOnlyConfig(**_SHAPE, vocab_size=352, layers=2, kv_heads=1, tied=False),
    "gemma": DecoderOnlyConfig(
        **_SHAPE, vocab_size=528, layers=2, kv_heads=2, activation="gelu_tanh", norm_offset=1.0, scale_embedding=True
    ),
    "t5": EncoderDecoderConfig(**_SHAPE, vocab_size=224, encoder_layers=2, decoder_layers=2),
}
"""By the name of the tokenizer."""


def write(directory: pathlib.Path, name: str, *, dtype: str | None = None, seed: int = 0) -> str:
    """Write a checkpoint of random weights with the tokenizer `name`, and return where."""
    tokenizer, lm = load_tokenizer(DATA / "hf_tokenizers" / name), language_model(MODELS[name])
    special = Special(pad=tokenizer.pad_id, bos=tokenizer.bos_id, eos=tokenizer.eos_ids)
    save_hf(
        directory,
        lm,
        lm.init(jax.random.key(seed)),
        tokenizer=tokenizer_files(tokenizer),
        dtype=dtype,
        special=special,
    )
    return str(directory)


def copy(source: str, target: pathlib.Path) -> pathlib.Path:
    """Copy a checkpoint, to be spoilt."""
    shutil.copytree(source, target)
    return target
