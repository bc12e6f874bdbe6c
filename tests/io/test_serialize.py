from __future__ import annotations

import dataclasses
import json

import pytest

from pit_jax.core.errors import CheckpointError
from pit_jax.data.open import DataSpec
from pit_jax.data.synthetic import SyntheticConfig, generate
from pit_jax.io import serialize
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Curriculum, Round
from pit_jax.text.codec import Lengths
from pit_jax.text.template import Templates

MODEL = DecoderOnlyConfig(vocab_size=11, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8)
CONFIGS = [
    MODEL,
    ScalarModel(DecoderOnly(MODEL), "last", "causal"),
    RlConfig(beta=1e-3, whiten=True),
    Curriculum(rounds=(Round(name="a", steps=2, references=("chosen", "policy")),)),
    Templates(policy="Q: {prompt}\n", bos=False),
    Lengths(inputs=3, targets=2),
    DataSpec(path=("a.jsonl", "b.jsonl"), window=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_configs_survive_a_file(config: object) -> None:
    text = json.dumps(serialize.to_json(config))
    back = serialize.from_json(json.loads(text))
    assert back == config
    assert hash(back) == hash(config)


def test_nested_containers_become_json_and_come_back_as_tuples() -> None:
    value = {"a": [1, (2.5, None)], 3: frozenset({"y", "x"}), "b": {"c": True}}
    data = serialize.to_json(value)
    assert data == {"a": [1, [2.5, None]], "3": ["x", "y"], "b": {"c": True}}
    assert serialize.from_json(data) == {"a": (1, (2.5, None)), "3": ("x", "y"), "b": {"c": True}}


def test_functions_are_written_by_name_and_other_objects_refused() -> None:
    written = serialize.to_json(DataSpec(generator=generate, config=SyntheticConfig(num_records=1)))
    assert written["generator"] == "pit_jax.data.synthetic:generate"
    assert written["config"]["__type__"] == "pit_jax.data.synthetic:SyntheticConfig"
    with pytest.raises(TypeError, match="cannot hold .*object"):
        serialize.to_json({"a": object()})


@dataclasses.dataclass(frozen=True)
class Outside:
    x: int = 0


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (f"{Outside.__module__}:Outside", "must name a class of pit_jax"),
        ("os:system", "must name a class of pit_jax"),
        ("pit_jax_evil.module:Config", "must name a class of pit_jax"),
        ("pit_jax.io.files:write_text", "must name a configuration dataclass"),
        ("pit_jax.io.files:os.system", "must name a configuration dataclass"),
        ("pit_jax.io.files:shutil.rmtree", "must name a configuration dataclass"),
        ("pit_jax.rl.config:Gone", "this version of pit_jax does not have"),
        ("pit_jax.gone:Config", "this version of pit_jax does not have"),
    ],
)
def test_only_config_classes_of_the_package_are_built(path: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        serialize.from_json({"__type__": path, "x": 1})


def test_fields_another_version_had_are_named() -> None:
    data = serialize.to_json(RlConfig()) | {"gone": 1}
    with pytest.raises(CheckpointError, match="RlConfig.*gone"):
        serialize.from_json(data)


def test_differences_name_every_path_once() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": None}
    new = {"a": 1.5, "b": {"c": [1, 3, 4]}, "e": None, "f": True}
    assert serialize.differences(old, new) == [
        "a: 1 -> 1.5",
        "b.c.1: 2 -> 3",
        "b.d: 'x' -> '(absent)'",
        "b.c.2: '(absent)' -> 4",
        "f: '(absent)' -> True",
    ]
    assert serialize.differences(old, dict(reversed(old.items()))) == []


def test_empty_containers_are_a_difference() -> None:
    assert serialize.differences({"a": []}, {"a": {}}) == ["a: [] -> {}"]
    assert serialize.differences({"a": {}}, {}) == ["a: {} -> '(absent)'"]
    assert serialize.differences({"a": []}, {"a": [1]}) == ["a: [] -> '(absent)'", "a.0: '(absent)' -> 1"]
    assert serialize.differences({"a": True}, {"a": 1}) == ["a: True -> 1"]
    assert serialize.differences({"a": 1}, {"a": 1.0}) == []


def test_round_trip_is_no_difference() -> None:
    for config in CONFIGS:
        data = serialize.to_json(config)
        assert serialize.differences(json.loads(json.dumps(data)), data) == []
