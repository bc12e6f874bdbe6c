"""Reward, gap and value heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import READOUTS, ScalarModel, ValueModel

from . import tiny

EXAMPLES = [([1, 2, 3, 4], [5, 6, 7]), ([8, 9, 10], [11]), ([12, 13, 14, 15, 16], [17, 18])]


def head(bias: float) -> dict[str, jax.Array]:
    kernel = np.random.default_rng(1).normal(0, 0.3, tiny.ROTARY.width)
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias)}


def by_hand(model: ScalarModel, params: dict, x) -> list[float]:
    """Return the read-out of each row of an unpacked batch in plain NumPy."""
    _, causal, bidirectional = tiny.everything(model.lm, params["trunk"], x)
    hidden = causal if model.attention == "causal" else bidirectional
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
@pytest.mark.parametrize(
    ("name", "attention"), [("rotary", "causal"), ("rotary", "bidirectional"), ("t5", "bidirectional")]
)
def test_scores_equal_numpy_and_packing_changes_nothing(
    name: str, attention: str, readout: str, references: int
) -> None:
    model = ScalarModel(tiny.MODELS[name], readout, attention)
    params = {"trunk": tiny.params(model.lm), "head": head(0.3)}
    plain = tiny.batch([[example] for example in EXAMPLES], 6, 4, references=references)
    packed = tiny.batch([EXAMPLES[:2], EXAMPLES[2:]], 8, 6, references=references)
    expected = by_hand(model, params, plain)
    np.testing.assert_allclose(jax.jit(model.scores, static_argnums=2)(params, plain, 1)[:, 0], expected, atol=1e-5)
    scores = jax.jit(model.scores, static_argnums=2)(params, packed, 2)
    np.testing.assert_allclose([scores[0, 0], scores[0, 1], scores[1, 0]], expected, atol=1e-5)
    np.testing.assert_allclose(scores[1, 1], 0.3, atol=1e-6)


def test_the_gap_of_a_response_with_itself_is_the_bias_where_nothing_tells_them_apart() -> None:
    config = dataclasses.replace(tiny.T5, role_embedding=False, encoder_layers=1, decoder_layers=1)
    model = ScalarModel(EncoderDecoder(config))
    trunk = tiny.params(model.lm)
    # Without position and context, equal tokens have equal states.
    trunk["encoder"]["layers"]["attention"] = jax.tree.map(jnp.zeros_like, trunk["encoder"]["layers"]["attention"])
    same, other = (tiny.batch([[([1, 2, 3], y)]], 3, 2, references=2) for y in ([2, 3], [2, 4]))
    params = {"trunk": trunk, "head": head(0.3)}
    score = jax.jit(model.scores, static_argnums=2)
    np.testing.assert_allclose(score(params, same, 1), 0.3, atol=1e-6)
    assert abs(float(score(params, other, 1)[0, 0]) - 0.3) > 1e-3


def test_only_bidirectional_references_see_the_candidate() -> None:
    lm = tiny.MODELS["rotary"]
    one, other = (tiny.batch([[([1, 2, 3], y)]], 3, 2, references=2) for y in ([4, 5], [6, 7]))
    first, second = (tiny.everything(lm, tiny.params(lm), x) for x in (one, other))
    np.testing.assert_array_equal(first[1].prompt, second[1].prompt)
    assert not np.allclose(first[2].prompt, second[2].prompt)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_values_are_read_before_their_tokens(name: str) -> None:
    model = ValueModel(tiny.MODELS[name])
    params = {"trunk": tiny.params(model.lm), "head": head(0.3)}
    one = tiny.batch([[([1, 2], [3, 4, 5])]], 3, 4)
    other = tiny.batch([[([1, 2], [3, 9, 5])]], 3, 4)
    values = jax.jit(model.values)
    first, second = values(params, one), values(params, other)
    np.testing.assert_allclose(first[0, :2], second[0, :2], atol=1e-6)
    assert abs(first[0, 2] - second[0, 2]) > 1e-5
    assert first[0, 3] == 0
    assert first.dtype == jnp.float32


@pytest.mark.parametrize("model", [ScalarModel(tiny.MODELS["t5"]), ValueModel(tiny.MODELS["rotary"])])
def test_parameters_match_their_description_and_start_small(model) -> None:
    params = model.with_trunk(tiny.params(model.lm), jax.random.key(0))
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, model.abstract())
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    axes = model.axes()
    assert axes["head"] == {"kernel": ("norm",), "bias": ()}
    assert axes["trunk"] == model.lm.axes()
    assert 0 < np.std(params["head"]["kernel"]) < 0.05
    assert hash(model) == hash(type(model)(model.lm))


def test_a_trunk_is_taken_over_as_it_is() -> None:
    lm = tiny.MODELS["rotary"]
    sft = tiny.params(lm)
    assert ScalarModel(lm).with_trunk(sft, jax.random.key(1))["trunk"] is sft


@pytest.mark.parametrize("bad", [{"readout": "sum"}, {"attention": "sideways"}])
def test_unknown_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        ScalarModel(tiny.MODELS["rotary"], **bad)


@pytest.mark.parametrize("readout", READOUTS)
def test_the_bias_which_no_comparison_determines_is_not_trained(readout: str) -> None:
    lm, x = tiny.MODELS["rotary"], tiny.plain()
    model = ScalarModel(lm, readout)
    params = {"trunk": tiny.params(lm), "head": head(0.3)}
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(model.scores(p, x, 1))))(params)["head"]
    assert float(gradient["bias"]) == 0.0
    assert float(jnp.abs(gradient["kernel"]).max()) > 0.0
