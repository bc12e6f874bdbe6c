"""Qwen 2, 2.5 and 3.

The norms of the largest base models of 2 and 2.5 add 1e-5; those of the instruction-tuned ones add 1e-6.
"""

from __future__ import annotations

from typing import Any

_QWEN = dict(norm_eps=1e-6, rope_base=1_000_000.0)
# Small models share the matrix of embedding and output; large ones pad the vocabulary further.
_SMALL = _QWEN | dict(vocab_size=151_936, qkv_bias=True)
_LARGE = _QWEN | dict(vocab_size=152_064, qkv_bias=True, tied=False)
_LARGER = _LARGE | dict(norm_eps=1e-5)
_QWEN_3 = _QWEN | dict(vocab_size=151_936, head_dim=128, qk_norm=True)

_0_5B = dict(width=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864) | _SMALL
_1_5B = dict(width=1536, layers=28, heads=12, kv_heads=2, head_dim=128, mlp=8960) | _SMALL
_7B = dict(width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18_944) | _LARGE
_72B = dict(width=8192, layers=80, heads=64, kv_heads=8, head_dim=128, mlp=29_568) | _LARGER
_14B = dict(width=5120, layers=48, heads=40, kv_heads=8, head_dim=128, mlp=13_824) | _LARGER

QWEN: dict[str, dict[str, Any]] = {
    "qwen-2-0.5b": _0_5B,
    "qwen-2-1.5b": _1_5B,
    "qwen-2-7b": _7B,
    "qwen-2-72b": _72B,
    "qwen-2.5-0.5b": _0_5B,
    "qwen-2.5-1.5b": _1_5B,
    "qwen-2.5-3b": dict(width=2048, layers=36, heads=16, kv_heads=2, head_dim=128, mlp=11_008) | _SMALL,
    "qwen-2.5-7b": _7B,
    "qwen-2.5-14b": _14B,
    "qwen-2.5-32b": _14B | dict(layers=64, mlp=27_648),
    "qwen-2.5-72b": _72B,
    "qwen-3-0.6b": dict(width=1024, layers=28, heads=16, kv_heads=8, mlp=3072) | _QWEN_3,
    "qwen-3-1.7b": dict(width=2048, layers=28, heads=16, kv_heads=8, mlp=6144) | _QWEN_3,
    "qwen-3-4b": dict(width=2560, layers=36, heads=32, kv_heads=8, mlp=9728) | _QWEN_3,
    "qwen-3-8b": dict(width=4096, layers=36, heads=32, kv_heads=8, mlp=12_288, tied=False) | _QWEN_3,
    "qwen-3-14b": dict(width=5120, layers=40, heads=40, kv_heads=8, mlp=17_408, tied=False) | _QWEN_3,
    "qwen-3-32b": dict(width=5120, layers=64, heads=64, kv_heads=8, mlp=25_600, tied=False) | _QWEN_3,
}
