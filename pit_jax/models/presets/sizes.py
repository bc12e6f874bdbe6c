"""Model sizes by name, as data: ours, and the published ones of every family."""

from __future__ import annotations

from typing import Any

from pit_jax.models.presets.gemma import GEMMA
from pit_jax.models.presets.llama import LLAMA
from pit_jax.models.presets.qwen import QWEN
from pit_jax.models.presets.t5 import T5

_SMALL_SCALE = dict(scan_layers=False)

_OUR_DECODERS: dict[str, dict[str, Any]] = {
    "nano": dict(vocab_size=128, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp=256) | _SMALL_SCALE,
    "micro": dict(vocab_size=512, width=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384) | _SMALL_SCALE,
    "small": dict(vocab_size=8192, width=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp=1024) | _SMALL_SCALE,
}
_OUR_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5-nano": dict(vocab_size=128, width=64, heads=4, head_dim=16, mlp=128, encoder_layers=2, decoder_layers=2)
    | _SMALL_SCALE,
}

DECODER_ONLY: dict[str, dict[str, Any]] = _OUR_DECODERS | LLAMA | QWEN | GEMMA
ENCODER_DECODER: dict[str, dict[str, Any]] = _OUR_ENCODER_DECODERS | T5
