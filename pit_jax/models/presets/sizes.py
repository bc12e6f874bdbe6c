"""Model sizes by name, as data.

Shapes are the published ones. Llama 3.2 also stretches its rotary angles for contexts beyond 8,192 tokens, which
these presets leave out.
"""

from __future__ import annotations

from typing import Any

_LLAMA = dict(activation="silu", norm_eps=1e-5, rope_base=500_000.0, vocab_size=128_256)
_SMALL_SCALE = dict(scan_layers=False)

DECODER_ONLY: dict[str, dict[str, Any]] = {
    "nano": dict(vocab_size=128, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp=256) | _SMALL_SCALE,
    "micro": dict(vocab_size=512, width=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384) | _SMALL_SCALE,
    "small": dict(vocab_size=8192, width=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp=1024) | _SMALL_SCALE,
    "llama-3.2-1b": dict(width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192) | _LLAMA,
    "llama-3-8b": dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336, tied=False) | _LLAMA,
    "qwen-2.5-0.5b": dict(
        vocab_size=151_936,
        width=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        mlp=4864,
        qkv_bias=True,
        rope_base=1_000_000.0,
        norm_eps=1e-6,
    ),
    "gemma-2b": dict(
        vocab_size=256_000,
        width=2048,
        layers=18,
        heads=8,
        kv_heads=1,
        head_dim=256,
        mlp=16_384,
        activation="gelu_tanh",
        norm_offset=1.0,
        scale_embedding=True,
    ),
}

ENCODER_DECODER: dict[str, dict[str, Any]] = {
    "t5-nano": dict(vocab_size=128, width=64, heads=4, head_dim=16, mlp=128, encoder_layers=2, decoder_layers=2)
    | _SMALL_SCALE,
    "t5-small": dict(vocab_size=32_128, width=512, heads=6, head_dim=64, mlp=1024, encoder_layers=8, decoder_layers=8),
    "t5-base": dict(
        vocab_size=32_128, width=768, heads=12, head_dim=64, mlp=2048, encoder_layers=12, decoder_layers=12
    ),
    "t5-large": dict(
        vocab_size=32_128, width=1024, heads=16, head_dim=64, mlp=2816, encoder_layers=24, decoder_layers=24
    ),
    "t5-xl": dict(vocab_size=32_128, width=2048, heads=32, head_dim=64, mlp=5120, encoder_layers=24, decoder_layers=24),
    "t5-xxl": dict(
        vocab_size=32_128, width=4096, heads=64, head_dim=64, mlp=10_240, encoder_layers=24, decoder_layers=24
    ),
}
