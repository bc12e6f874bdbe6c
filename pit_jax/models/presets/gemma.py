"""Gemma 1, 2 and 3 (the language model of 3, without its image encoder)."""

from __future__ import annotations

from typing import Any

from pit_jax.models.config import RopeScaling

_GEMMA = dict(head_dim=256, activation="gelu_tanh", norm_offset=1.0, scale_embedding=True, norm_eps=1e-6)
_GEMMA_1 = _GEMMA | dict(vocab_size=256_000)
_GEMMA_2 = _GEMMA_1 | dict(
    post_norms=True,
    attention_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    window=4096,
    global_every=2,
)
_GEMMA_3 = _GEMMA | dict(
    vocab_size=262_144,
    post_norms=True,
    qk_norm=True,
    attention_scale=256**-0.5,
    window=512,
    global_every=6,
    rope_base=1_000_000.0,
    local_rope_base=10_000.0,
)
_GEMMA_3_LONG = _GEMMA_3 | dict(vocab_size=262_208, window=1024, rope_scaling=RopeScaling(kind="linear", factor=8.0))
# The largest ones have narrower heads, and scale by the width a head would have without that.
_GEMMA_2_27B = _GEMMA_2 | dict(head_dim=128, attention_scale=(4608 / 32) ** -0.5)
_GEMMA_3_27B = _GEMMA_3_LONG | dict(head_dim=128, attention_scale=(5376 / 32) ** -0.5)

GEMMA: dict[str, dict[str, Any]] = {
    "gemma-2b": dict(width=2048, layers=18, heads=8, kv_heads=1, mlp=16_384) | _GEMMA_1,
    "gemma-7b": dict(width=3072, layers=28, heads=16, kv_heads=16, mlp=24_576) | _GEMMA_1,
    "gemma-2-2b": dict(width=2304, layers=26, heads=8, kv_heads=4, mlp=9216) | _GEMMA_2,
    "gemma-2-9b": dict(width=3584, layers=42, heads=16, kv_heads=8, mlp=14_336) | _GEMMA_2,
    "gemma-2-27b": dict(width=4608, layers=46, heads=32, kv_heads=16, mlp=36_864) | _GEMMA_2_27B,
    "gemma-3-270m": dict(width=640, layers=18, heads=4, kv_heads=1, mlp=2048) | _GEMMA_3,
    "gemma-3-1b": dict(width=1152, layers=26, heads=4, kv_heads=1, mlp=6912) | _GEMMA_3,
    "gemma-3-4b": dict(width=2560, layers=34, heads=8, kv_heads=4, mlp=10_240) | _GEMMA_3_LONG,
    "gemma-3-12b": dict(width=3840, layers=48, heads=16, kv_heads=8, mlp=15_360) | _GEMMA_3_LONG,
    "gemma-3-27b": dict(width=5376, layers=62, heads=32, kv_heads=16, mlp=21_504) | _GEMMA_3_27B,
}
