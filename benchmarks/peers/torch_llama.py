"""The shapes as Hugging Face models with random weights, on a GPU if there is one."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmarks.speed.record import Record, of_laps, versions
from benchmarks.speed.shapes import Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config(shape: Shape, **changes: Any) -> transformers.LlamaConfig:
    """Return the config of a shape."""
    return transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, rms_norm_eps=shape.norm_eps, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base}, tie_word_embeddings=True,
        attention_dropout=0.0, **changes,
    )  # fmt: skip


def model(kind: type, settings: transformers.LlamaConfig, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """Return a model of a class with parameters in `dtype`, made where it is to be."""
    settings._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return kind(settings)
    finally:
        torch.set_default_dtype(before)


def wait() -> None:
    """Wait until the GPU has done everything."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def record(packages: tuple[str, ...], **fields: Any) -> Record:
    """Return the record of this process; `fields` are those that torch does not know."""
    on_gpu = DEVICE.type == "cuda"
    return of_laps(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        device_memory=torch.cuda.max_memory_allocated() if on_gpu else None,
        versions=versions("torch", "transformers", *packages),
        **fields,
    )
