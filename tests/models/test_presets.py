"""Named sizes, and configs as plain data."""

from __future__ import annotations

import json

import jax
import pytest

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.io import serialize
from pit_jax.models.config import ModelConfig
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.models.presets.sizes import DECODER_ONLY, ENCODER_DECODER

PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "qwen-2.5-0.5b": 494_032_768,
    "gemma-2b": 2_506_172_416,
    "t5-small": 76_961_152,
    "t5-base": 247_577_856,
    "t5-large": 783_150_080,
    "t5-xl": 2_849_757_184,
    "t5-xxl": 11_135_332_352,
}
OURS = {"nano": (50_000, 200_000), "micro": (0.5e6, 2e6), "small": (8e6, 12e6), "t5-nano": (50_000, 300_000)}


@pytest.mark.parametrize("name", [*DECODER_ONLY, *ENCODER_DECODER])
def test_parameter_counts(name: str) -> None:
    count = tree.parameter_count(language_model(preset(name)).abstract())
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:
        low, high = OURS[name]
        assert low < count < high


@pytest.mark.parametrize("name", ["nano", "t5-base"])
def test_overrides_and_round_trip_through_json(name: str) -> None:
    config = preset(name, vocab_size=99, dtype="bfloat16")
    assert (config.vocab_size, config.dtype) == (99, "bfloat16")
    again = serialize.from_json(json.loads(json.dumps(serialize.to_json(config))))
    assert again == config and hash(again) == hash(config)
    assert language_model(again) == language_model(config)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'nano'"):
        preset("nanoo")
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        preset("nano", widht=3)
    with pytest.raises(ConfigError, match="config of one of the families"):
        language_model(ModelConfig(vocab_size=8, width=8, heads=1, head_dim=8, mlp=8))


DECODER = dict(vocab_size=8, width=8, heads=4, head_dim=2, mlp=8, layers=1, kv_heads=2)
T5 = dict(vocab_size=8, width=8, heads=4, head_dim=2, mlp=8, encoder_layers=1, decoder_layers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, r"DecoderOnlyConfig.width = 0 must be at least 1"),
        ({"kv_heads": 3}, "divide heads = 4"),
        ({"head_dim": 3}, "even with rotary"),
        ({"position": "absolute"}, "'rotary' or 'learned'"),
        ({"position": "learned"}, "max_positions = None must be given"),
        ({"max_positions": 8}, "only then"),
        ({"activation": "gelu_tan"}, "Did you mean 'gelu_tanh'"),
        ({"remat": "some"}, "remat = 'some' must be one of none, full"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"dropout": 1.0}, r"lie in \[0, 1\)"),
        ({"norm_eps": 0.0}, "positive"),
        ({"rope_base": -1.0}, "positive"),
        ({"global_every": 2}, "without a window"),
        ({"window": 0}, "at least 1"),
    ],
)
def test_bad_decoder_only_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderOnlyConfig(**(DECODER | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_buckets": 6}, "multiple of 4"),
        ({"relative_max_distance": 16}, "more than relative_buckets / 2 = 16"),
        ({"start_id": 8}, r"lie in \[0, 8\)"),
        ({"decoder_layers": 0}, "at least 1"),
    ],
)
def test_bad_encoder_decoder_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderDecoderConfig(**(T5 | change))


def test_largest_preset_is_described_without_allocation() -> None:
    lm = language_model(preset("t5-xxl"))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(lm.abstract()))
