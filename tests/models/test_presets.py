"""Named sizes, and configs as plain data."""

from __future__ import annotations

import json

import jax
import pytest

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.io import serialize
from pit_jax.models.config import ModelConfig, RopeScaling
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.lora import Lora
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.models.presets.sizes import DECODER_ONLY, ENCODER_DECODER

# Exact numbers of parameters: those that the hub shows for the published weights.
LLAMA = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
}
QWEN = {
    "qwen-2-0.5b": 494_032_768,
    "qwen-2-1.5b": 1_543_714_304,
    "qwen-2-7b": 7_615_616_512,
    "qwen-2-72b": 72_706_203_648,
    "qwen-2.5-0.5b": 494_032_768,
    "qwen-2.5-1.5b": 1_543_714_304,
    "qwen-2.5-3b": 3_085_938_688,
    "qwen-2.5-7b": 7_615_616_512,
    "qwen-2.5-14b": 14_770_033_664,
    "qwen-2.5-32b": 32_763_876_352,
    "qwen-2.5-72b": 72_706_203_648,
    # The files of these two hold the tied matrix twice.
    "qwen-3-0.6b": 751_632_384 - 151_936 * 1024,
    "qwen-3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen-3-4b": 4_022_468_096,
    "qwen-3-8b": 8_190_735_360,
    "qwen-3-14b": 14_768_307_200,
    "qwen-3-32b": 32_762_123_264,
}
# Gemma 3 from 4b comes with an image encoder and a projection of its 1152 channels, which these presets leave out.
IMAGES = 416_866_032
GEMMA = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - IMAGES - 1152 * (2560 + 1),
    "gemma-3-12b": 12_187_325_040 - IMAGES - 1152 * (3840 + 1),
    "gemma-3-27b": 27_432_406_640 - IMAGES - 1152 * (5376 + 1),
}
T5_1_0 = {
    "t5-v1_0-small": 60_506_624,
    "t5-v1_0-base": 222_903_552,
    "t5-v1_0-large": 737_668_096,
    "t5-v1_0-3b": 2_851_598_336,
    "t5-v1_0-11b": 11_307_321_344,
}
# Size: (number of parameters of T5 1.1, width, heads, layers of both stacks).
T5_1_1 = {
    "small": (76_961_152, 512, 6, 16),
    "base": (247_577_856, 768, 12, 24),
    "large": (783_150_080, 1024, 16, 48),
    "xl": (2_849_757_184, 2048, 32, 48),
    "xxl": (11_135_332_352, 4096, 64, 48),
}


def published() -> dict[str, int]:
    """Return the counts by preset; mT5 and umT5 differ from T5 1.1 in vocabulary, and umT5 in tables of 32 buckets."""
    counts = LLAMA | QWEN | GEMMA | T5_1_0
    for size, (count, width, heads, layers) in T5_1_1.items():
        counts |= {f"t5-{size}": count, f"flan-t5-{size}": count}
        counts[f"mt5-{size}"] = count + 2 * width * (250_112 - 32_128)
        if size != "large":
            counts[f"umt5-{size}"] = count + 2 * width * (256_384 - 32_128) + 32 * heads * (layers - 2)
    return counts


PUBLISHED = published()
# What papers and model cards say, in the digits that they give.
ROUNDED = {
    "llama-2-7b": "6.74e9",
    "llama-3.1-405b": "406e9",
    "llama-3.2-3b": "3.21e9",
    "mistral-7b-v0.1": "7.24e9",
    "qwen-2.5-1.5b": "1.54e9",
    "qwen-3-8b": "8.2e9",
    "qwen-3-32b": "32.8e9",
    "gemma-2-27b": "27.2e9",
    "gemma-3-1b": "1.0e9",
    "t5-v1_0-large": "738e6",
    "mt5-small": "300e6",
    "mt5-base": "582e6",
    "mt5-large": "1.23e9",
    "mt5-xl": "3.74e9",
    "mt5-xxl": "12.9e9",
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


@pytest.mark.parametrize("name", ROUNDED)
def test_counts_agree_with_the_rounded_published_ones(name: str) -> None:
    digits, exponent = ROUNDED[name].split("e")
    decimals = len(digits.partition(".")[2])
    assert f"{PUBLISHED[name] / 10 ** int(exponent):.{decimals}f}" == digits


def test_every_preset_has_a_count() -> None:
    assert {*DECODER_ONLY, *ENCODER_DECODER} == PUBLISHED.keys() | OURS.keys()


def test_published_windows_and_angles() -> None:
    far = {
        name: [n for n, windowed in enumerate(preset(name).windowed) if not windowed]
        for name in ("mistral-7b-v0.1", "gemma-2-2b", "gemma-3-270m", "gemma-3-1b")
    }
    assert far["mistral-7b-v0.1"] == []
    assert far["gemma-2-2b"] == list(range(1, 26, 2))
    assert far["gemma-3-270m"] == [5, 11, 17] and far["gemma-3-1b"] == [5, 11, 17, 23]
    assert preset("llama-3-8b").rope_scaling is None
    for name, factor in (("llama-3.1-8b", 8.0), ("llama-3.2-1b", 32.0)):
        assert preset(name).rope_scaling == RopeScaling(kind="llama3", factor=factor, original_max_positions=8192)
    for name, scale in (("gemma-2-27b", 144), ("gemma-3-27b", 168), ("gemma-3-12b", 256)):
        assert preset(name).attention_scale == pytest.approx(scale**-0.5)


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


def test_lists_and_nested_settings_survive_json() -> None:
    lora = Lora(rank=4, alpha=8.0, targets=["query", "value"])
    config = preset("gemma-3-4b", global_every=0, global_layers=[5, 11], lora=lora)
    again = serialize.from_json(json.loads(json.dumps(serialize.to_json(config))))
    assert again == config and hash(again) == hash(config)
    assert again.global_layers == (5, 11) and again.rope_scaling.factor == 8


DECODER = dict(vocab_size=8, width=8, heads=4, head_dim=2, mlp=8, layers=1, kv_heads=2)
LINEAR = RopeScaling(kind="linear", factor=2.0)
T5 = dict(vocab_size=8, width=8, heads=4, head_dim=2, mlp=8, encoder_layers=1, decoder_layers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, r"DecoderOnlyConfig.width = 0 must be at least 1"),
        ({"kv_heads": 3}, "divide heads = 4"),
        ({"head_dim": 3}, "even with rotary"),
        ({"position": "absolute"}, "'rotary', 'learned' or 'relative'"),
        ({"position": "learned"}, "max_positions = None must be given"),
        ({"max_positions": 8}, "only then"),
        ({"activation": "gelu_tan"}, "Did you mean 'gelu_tanh'"),
        ({"remat": "some"}, "remat = 'some' must be one of none, full"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"dropout": 1.0}, r"lie in \[0, 1\)"),
        ({"norm_eps": 0.0}, "positive"),
        ({"rope_base": -1.0}, "positive"),
        ({"global_every": 2}, "without a window"),
        ({"global_layers": (0,)}, "without a window"),
        ({"local_rope_base": 10.0}, "without a window"),
        ({"window": 4, "global_every": 2, "global_layers": (0,)}, "None with global_every"),
        ({"window": 4, "global_layers": (1,)}, "among 0, ..., 0"),
        ({"layers": 4, "window": 4, "global_layers": (2, 1)}, "in their order"),
        ({"position": "relative", "rope_scaling": LINEAR}, "rope_scaling = .* None without rotary"),
        ({"position": "relative", "window": 4, "local_rope_base": 3.0}, "local_rope_base = 3.0 must be None without"),
        ({"position": "relative", "relative_buckets": 5}, "must be even"),
        ({"position": "relative", "relative_max_distance": 16}, "more than relative_buckets / 2 = 16"),
        ({"relative_per_layer": True}, "False without relative positions"),
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
