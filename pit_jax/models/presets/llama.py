"""Llama and Mistral."""

from __future__ import annotations

from typing import Any

from pit_jax.models.config import RopeScaling

_8B = dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336, tied=False, norm_eps=1e-5)
_70B = dict(width=8192, layers=80, heads=64, kv_heads=8, head_dim=128, mlp=28_672, tied=False, norm_eps=1e-5)

_LLAMA_2 = dict(vocab_size=32_000)
_LLAMA_3 = dict(vocab_size=128_256, norm_eps=1e-5, rope_base=500_000.0)
_LLAMA_3_1 = _LLAMA_3 | dict(rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=8192))
_LLAMA_3_2 = _LLAMA_3 | dict(rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_max_positions=8192))

LLAMA: dict[str, dict[str, Any]] = {
    "llama-2-7b": _8B | dict(kv_heads=32, mlp=11_008) | _LLAMA_2,
    "llama-2-13b": _8B | dict(width=5120, layers=40, heads=40, kv_heads=40, mlp=13_824) | _LLAMA_2,
    "llama-2-70b": _70B | _LLAMA_2,
    "llama-3-8b": _8B | _LLAMA_3,
    "llama-3-70b": _70B | _LLAMA_3,
    "llama-3.1-8b": _8B | _LLAMA_3_1,
    "llama-3.1-70b": _70B | _LLAMA_3_1,
    "llama-3.1-405b": _70B | dict(width=16_384, layers=126, heads=128, mlp=53_248) | _LLAMA_3_1,
    "llama-3.2-1b": dict(width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192) | _LLAMA_3_2,
    "llama-3.2-3b": dict(width=3072, layers=28, heads=24, kv_heads=8, head_dim=128, mlp=8192) | _LLAMA_3_2,
    "mistral-7b-v0.1": _8B | dict(vocab_size=32_000, window=4096),
    "mistral-7b-v0.3": _8B | dict(vocab_size=32_768, rope_base=1_000_000.0),
}
