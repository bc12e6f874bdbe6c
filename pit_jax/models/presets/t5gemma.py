"""Sizes of T5Gemma and T5Gemma 2 by name, as data; shapes and settings are the published ones."""

from __future__ import annotations

from typing import Any

from pit_jax.models.config import RopeScaling
from pit_jax.models.t5gemma import EncoderSize

Sizes = dict[str, Any]

# Stacks of T5Gemma: two are Gemma 2's, the others T5's and one between its large and its XL.
_S = dict(width=512, heads=8, kv_heads=8, head_dim=64, mlp=1024)
_B = dict(width=768, heads=12, kv_heads=12, head_dim=64, mlp=2048)
_L = dict(width=1024, heads=16, kv_heads=16, head_dim=64, mlp=2816)
_ML = dict(width=1152, heads=4, kv_heads=4, head_dim=256, mlp=6912)
_XL = dict(width=2048, heads=32, kv_heads=32, head_dim=64, mlp=5120)
_2B = dict(width=2304, heads=8, kv_heads=4, head_dim=256, mlp=9216)
_9B = dict(width=3584, heads=16, kv_heads=8, head_dim=256, mlp=14_336)


def _t5gemma(size: Sizes, encoder_layers: int, decoder_layers: int) -> Sizes:
    return size | dict(
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        vocab_size=256_000,
        attention_softcap=50.0,
        logit_softcap=30.0,
        window=4096,
        encoder_window=(4096, 4096),
        global_every=2,
    )


def _t5gemma2(size: Sizes, count: int, window: int) -> Sizes:
    return size | dict(
        encoder_layers=count,
        decoder_layers=count,
        vocab_size=262_144,
        qk_norm=True,
        merged_attention=True,
        shared_embedding=True,
        rope_base=1_000_000.0,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        local_rope_base=10_000.0,
        window=window,
        encoder_window=((window - 1) // 2, window // 2),
        global_every=6,
    )


_NANO = dict(width=64, heads=4, kv_heads=2, head_dim=16, mlp=128)
_NANO_SCALE = dict(vocab_size=128, scan_layers=False, window=8)

T5GEMMA: dict[str, Sizes] = {
    "t5gemma-nano": _t5gemma(_NANO, 2, 2) | _NANO_SCALE | dict(encoder_window=(8, 8)),
    "t5gemma-s-s": _t5gemma(_S, 8, 8),
    "t5gemma-b-b": _t5gemma(_B, 12, 12),
    "t5gemma-l-l": _t5gemma(_L, 24, 24),
    "t5gemma-ml-ml": _t5gemma(_ML, 26, 26),
    "t5gemma-xl-xl": _t5gemma(_XL, 24, 24),
    "t5gemma-2b-2b": _t5gemma(_2B, 26, 26),
    "t5gemma-9b-2b": _t5gemma(_2B, 42, 26) | dict(encoder=EncoderSize(**_9B)),
    "t5gemma-9b-9b": _t5gemma(_9B, 42, 42),
    "t5gemma-2-nano": _t5gemma2(_NANO, 2, 8) | _NANO_SCALE | dict(global_every=2),
    "t5gemma-2-270m-270m": _t5gemma2(dict(width=640, heads=4, kv_heads=1, head_dim=256, mlp=2048), 18, 512),
    "t5gemma-2-1b-1b": _t5gemma2(dict(width=1152, heads=4, kv_heads=1, head_dim=256, mlp=6912), 26, 512),
    "t5gemma-2-4b-4b": _t5gemma2(dict(width=2560, heads=8, kv_heads=4, head_dim=256, mlp=10_240), 34, 1024),
}
