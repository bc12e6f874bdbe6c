"""T5 1.0 and 1.1, Flan-T5, mT5 and umT5; a plain `t5-` is T5 1.1."""

from __future__ import annotations

from typing import Any

_1_0 = dict(vocab_size=32_128, activation="relu", gated=False, tied=True)
_1_1 = dict(vocab_size=32_128)
_MT5 = dict(vocab_size=250_112)
_UMT5 = dict(vocab_size=256_384, relative_per_layer=True)

_SMALL = dict(width=512, heads=6, head_dim=64, mlp=1024, encoder_layers=8, decoder_layers=8)
_BASE = dict(width=768, heads=12, head_dim=64, mlp=2048, encoder_layers=12, decoder_layers=12)
_LARGE = dict(width=1024, heads=16, head_dim=64, mlp=2816, encoder_layers=24, decoder_layers=24)
_XL = _LARGE | dict(width=2048, heads=32, mlp=5120)
_XXL = _LARGE | dict(width=4096, heads=64, mlp=10_240)

T5: dict[str, dict[str, Any]] = {
    "t5-v1_0-small": dict(width=512, heads=8, head_dim=64, mlp=2048, encoder_layers=6, decoder_layers=6) | _1_0,
    "t5-v1_0-base": _BASE | dict(mlp=3072) | _1_0,
    "t5-v1_0-large": _LARGE | dict(mlp=4096) | _1_0,
    "t5-v1_0-3b": _LARGE | dict(heads=32, head_dim=128, mlp=16_384) | _1_0,
    "t5-v1_0-11b": _LARGE | dict(heads=128, head_dim=128, mlp=65_536) | _1_0,
    "t5-small": _SMALL | _1_1,
    "t5-base": _BASE | _1_1,
    "t5-large": _LARGE | _1_1,
    "t5-xl": _XL | _1_1,
    "t5-xxl": _XXL | _1_1,
    "flan-t5-small": _SMALL | _1_1,
    "flan-t5-base": _BASE | _1_1,
    "flan-t5-large": _LARGE | _1_1,
    "flan-t5-xl": _XL | _1_1,
    "flan-t5-xxl": _XXL | _1_1,
    "mt5-small": _SMALL | _MT5,
    "mt5-base": _BASE | _MT5,
    "mt5-large": _LARGE | _MT5,
    "mt5-xl": _XL | _MT5,
    "mt5-xxl": _XXL | _MT5,
    "umt5-small": _SMALL | _UMT5,
    "umt5-base": _BASE | _UMT5,
    "umt5-xl": _XL | _UMT5,
    "umt5-xxl": _XXL | _UMT5,
}
