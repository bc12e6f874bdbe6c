"""Reward, gap and value heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.models.heads import READOUTS, ScalarModel, ValueModel, take_trunk

from . import tiny

EXAMPLES = [([1, 2, 3, 4], [5, 6, 7]), ([8, 9, 10], [11]), ([12, 13, 14, 15, 16], [17, 18])]


def by_hand(model: ScalarModel, params: dict, x) -> list[float]:
    """Return the read-out of each row of an unpacked batch in plain NumPy."""
    hidden = model.lm.hidden(params["trunk"], x, attention=model.attention)
    kernel, bias = np.asarray(params["head"]["kernel"], np.float64), float(params["head"]["bias"])
    scores = []
    for row in range(len(x.prompt)):
        response = np.asarray(hidden.response[row], np.float64)[np.asarray(x.response_segments[row]) > 0]
        reference = np.asarray(hidden.prompt[row], np.float64)[np.asarray(x.prompt_reference[row])]
        if model.readout == "last":
            vector = response[-1]
        elif model.readout == "mean":
            vector = np.concatenate([response, reference]).mean(axis=0)
        else:
            vector = response.mean(axis=0) - (reference.mean(axis=0) if len(reference) else 0)
        scores.append(vector @ kernel + bias)
    return scores


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(("name", "attention"), [("rotary", "causal"), ("rotary", "bidirectional"), ("t5", "bidirectional")])
def test_scores_equal_numpy_and_packing_changes_nothing(
    name: str, attention: str, readout: str, references: int
) -> None:
    model = ScalarModel(tiny.MODELS[name], readout, attention)
    params = model.init(jax.random.key(0))
    params["head"]["bias"] = jnp.asarray(0.3)
    plain = tiny.batch([[example] for example in EXAMPLES], 6, 4, references=references)
    packed = tiny.batch([EXAMPLES[:2], EXAMPLES[2:]], 8, 6, references=references)
    expected = by_hand(model, params, plain)
    np.testing.assert_allclose(model.scores(params, plain, 1)[:, 0], expected, atol=1e-5)
    scores = model.scores(params, packed, 2)
    np.testing.assert_allclose([scores[0, 0], scores[0, 1], scores[1, 0]], expected, atol=1e-5)
    np.testing.assert_allclose(scores[1, 1], 0.3, atol=1e-6)


def test_candidate_and_reference_are_compared_not_confused() -> None:
    """With equal roles and a row that is symmetric, exchanging the two changes the sign only under the default."""
    model = ScalarModel(tiny.MODELS["t5"])
    params = model.init(jax.random.key(1))
    x = tiny.batch([[([1, 2, 3], [2, 3])], [([1, 9, 8], [2, 3])]], 3, 2, references=2)
    scores = model.scores(params, x, 1)[:, 0]
    assert abs(scores[0] - scores[1]) > 1e-4


def test_causal_reference_cannot_see_the_candidate() -> None:
    for attention, differs in (("causal", False), ("bidirectional", True)):
        lm = tiny.MODELS["rotary"]
        params = lm.init(jax.random.key(0))
        one, other = (tiny.batch([[([1, 2, 3], y)]], 3, 2, references=2) for y in ([4, 5], [6, 7]))
        first, second = (lm.hidden(params, x, attention=attention).prompt for x in (one, other))
        assert np.allclose(first, second) != differs


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_values_are_read_before_their_tokens(name: str) -> None:
    model = ValueModel(tiny.MODELS[name])
    params = model.init(jax.random.key(0))
    one = tiny.batch([[([1, 2], [3, 4, 5])]], 3, 4)
    other = tiny.batch([[([1, 2], [3, 9, 5])]], 3, 4)
    first, second = model.values(params, one), model.values(params, other)
    np.testing.assert_allclose(first[0, :2], second[0, :2], atol=1e-6)
    assert abs(first[0, 2] - second[0, 2]) > 1e-5
    assert first[0, 3] == 0
    assert first.dtype == jnp.float32


@pytest.mark.parametrize("model", [ScalarModel(tiny.MODELS["t5"]), ValueModel(tiny.MODELS["rotary"])])
def test_parameters_match_their_description_and_start_small(model) -> None:
    params = model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.abstract())
    axes = model.axes()
    assert axes["head"] == {"kernel": ("norm",), "bias": ()}
    assert axes["trunk"] == model.lm.axes()
    assert 0 < np.std(params["head"]["kernel"]) < 0.05
    assert hash(model) == hash(type(model)(model.lm))


def test_trunks_are_taken_over() -> None:
    lm = tiny.MODELS["rotary"]
    sft, model = lm.init(jax.random.key(0)), ScalarModel(lm)
    reward = model.with_trunk(take_trunk(sft), jax.random.key(1))
    assert reward["trunk"] is sft
    assert take_trunk(reward) is sft


@pytest.mark.parametrize("bad", [{"readout": "sum"}, {"attention": "sideways"}])
def test_unknown_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        ScalarModel(tiny.MODELS["rotary"], **bad)
