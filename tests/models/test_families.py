"""What the families' settings do: which layers see what, how they are turned, where prompts look, full logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.types import Conditional, Params
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder

from . import tiny


def reached(lm: ConditionalLM, x: Conditional, place: int) -> set[int]:
    """Return the token ids on which the causal hidden state at a place of `[prompt | response]` depends."""
    params = tiny.params(lm)

    def outputs(table: jax.Array) -> jax.Array:
        bound = params | {"embedding": params["embedding"] | {"token": table}}
        return jnp.concatenate(lm.hidden(bound, x, attention="causal"), axis=1)[0, place]

    found = np.any(jax.jit(jax.jacrev(outputs))(params["embedding"]["token"]) != 0, axis=(0, 2))
    return set(np.flatnonzero(found))


def test_prompts_of_a_prefix_lm_see_all_of_themselves_and_no_response() -> None:
    packed = tiny.batch([[([1, 2, 3], [11, 12]), ([4, 5], [21])]], 6, 4)
    lm, causal = tiny.MODELS["t5x_decoder"], DecoderOnly(dataclasses.replace(tiny.T5X_DECODER, prefix_lm=False))
    expected = {0: {1, 2, 3}, 2: {1, 2, 3}, 3: {4, 5}, 6: {1, 2, 3, 11}, 7: {1, 2, 3, 11, 12}, 8: {4, 5, 21}}
    assert {place: reached(lm, packed, place) for place in expected} == expected
    assert reached(causal, packed, 0) == {1} and reached(causal, packed, 3) == {4}


def test_the_layers_that_see_everything_are_those_listed() -> None:
    config = dataclasses.replace(tiny.GEMMA3, layers=7, global_layers=None)
    for change, expected in (
        ({}, [True] * 7),
        ({"global_layers": (2, 5)}, [True, True, False, True, True, False, True]),
        ({"global_every": 3}, [True, True, False, True, True, False, True]),
        ({"global_layers": ()}, [True] * 7),
    ):
        np.testing.assert_array_equal(dataclasses.replace(config, **change).windowed, expected)
    assert not np.any(tiny.ROTARY.windowed)
    lm, x = tiny.MODELS["gemma3"], tiny.batch([[([1, 2, 3, 4, 5, 6, 7, 8], [11, 12])]], 8, 2)
    assert reached(lm, x, 7) == set(range(1, 9))
    everywhere_near = DecoderOnly(dataclasses.replace(tiny.GEMMA3, global_layers=None))
    assert reached(everywhere_near, x, 7) == set(range(2, 9))


def logp_with(config: DecoderOnlyConfig, **change) -> np.ndarray:
    """Return log-probabilities of a changed config whose parameters have the same shapes."""
    lm, x = DecoderOnly(config), tiny.batch([[(list(range(1, 20)), list(range(20, 26)))]], 19, 6)
    return np.asarray(tiny.logp(DecoderOnly(dataclasses.replace(config, **change)), tiny.params(lm), x))


@pytest.mark.slow
def test_local_and_global_layers_have_angles_of_their_own() -> None:
    near_only = dataclasses.replace(tiny.GEMMA3, global_layers=None)
    # Windowed layers read the local base alone, the others the global one with its scaling alone.
    same = logp_with(near_only)
    np.testing.assert_array_equal(logp_with(near_only, rope_base=7.0, rope_scaling=None), same)
    plain = logp_with(near_only, local_rope_base=None, rope_base=100.0, rope_scaling=None)
    np.testing.assert_allclose(plain, same, atol=1e-6)
    far_only = dataclasses.replace(tiny.GEMMA3, global_layers=(0, 1, 2))
    np.testing.assert_array_equal(logp_with(far_only, local_rope_base=3.0), logp_with(far_only))
    # Every setting moves the mixture.
    mixture = logp_with(tiny.GEMMA3)
    changes: list[dict] = [{"local_rope_base": 50.0}, {"local_rope_base": None}, {"rope_scaling": None}]
    for change in (*changes, {"rope_base": 500.0}, {"global_layers": (2,)}):
        assert np.max(np.abs(logp_with(tiny.GEMMA3, **change) - mixture)) > 1e-3, change


@pytest.mark.parametrize("name", ["gemma3", "t5x_decoder", "umt5"])
def test_scanned_layers_keep_what_differs_between_them(name: str) -> None:
    lm, x = tiny.MODELS[name], tiny.plain()
    other = type(lm)(dataclasses.replace(lm.config, scan_layers=not lm.config.scan_layers))
    np.testing.assert_allclose(
        tiny.logp(lm, tiny.params(lm), x), tiny.logp(other, tiny.params(lm), x), atol=1e-5, rtol=1e-5
    )


def test_equal_tables_of_all_layers_are_the_shared_one() -> None:
    shared, own = tiny.MODELS["t5x_decoder"], dataclasses.replace(tiny.T5X_DECODER, relative_per_layer=True)
    params, x = tiny.params(shared), tiny.plain()
    table = params["relative_bias"]["table"]
    layers = params["layers"] | {"relative_bias": {"table": jnp.stack([table] * own.layers)}}
    moved: Params = {name: value for name, value in params.items() if name != "relative_bias"} | {"layers": layers}
    np.testing.assert_allclose(tiny.logp(DecoderOnly(own), moved, x), tiny.logp(shared, params, x), atol=1e-6)
    layers["relative_bias"]["table"] = layers["relative_bias"]["table"].at[1].add(jnp.arange(8.0)[:, None])
    assert not np.allclose(tiny.logp(DecoderOnly(own), moved, x), tiny.logp(shared, params, x), atol=1e-2)


def joined(x: Conditional, left: int, right: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (tokens, mask, prefix) of each example in one run, with padding of token 7 on both sides."""
    rows, length = x.prompt.shape[0], x.prompt.shape[1] + x.response.shape[1]
    tokens = np.full((rows, left + length + right), 7, np.int32)
    mask, prefix = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row in range(rows):
        prompt = np.asarray(x.prompt[row])[np.asarray(x.prompt_segments[row]) > 0]
        response = np.asarray(x.response[row])[np.asarray(x.response_segments[row]) > 0]
        size = len(prompt) + len(response)
        start = tokens.shape[1] - size if left else 0
        tokens[row, start : start + size] = np.concatenate([prompt, response])
        mask[row, start : start + size], prefix[row, start : start + len(prompt)] = True, True
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(prefix)


@pytest.mark.parametrize(("left", "right"), [(0, 2), (3, 0)])
@pytest.mark.parametrize("name", ["learned", "gemma3", "t5x_decoder"])
def test_full_logits_give_the_scores_of_responses(name: str, left: int, right: int) -> None:
    # Without a role embedding, which would need to know what is a prompt.
    config = dataclasses.replace(tiny.DECODERS[name].config, role_embedding=False)
    lm, x = DecoderOnly(config), tiny.plain()
    params = tiny.params(lm)
    tokens, mask, prefix = joined(x, left, right)
    logits = jax.jit(lm.logits)(params, tokens, mask, prefix if config.prefix_lm else None)
    assert logits.dtype == jnp.float32 and logits.shape == (*tokens.shape, tiny.VOCABULARY)
    logp = jax.nn.log_softmax(logits)[:, :-1]
    logp = np.take_along_axis(np.asarray(logp), np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    expected = np.asarray(tiny.logp(lm, params, x))
    for row in range(len(logp)):
        count = int(np.sum(np.asarray(x.response_segments[row]) > 0))
        responses = np.flatnonzero(np.asarray(mask & ~prefix)[row]) - 1
        np.testing.assert_allclose(logp[row, responses], expected[row, :count], atol=1e-5)


def test_a_prefix_looks_in_both_directions() -> None:
    lm, x = DecoderOnly(dataclasses.replace(tiny.ROTARY, role_embedding=False)), tiny.plain()
    tokens, mask, prefix = joined(x, 0, 0)
    params = tiny.params(lm)
    changed = tokens.at[:, 1].set(40)
    for marks, moves in ((prefix, True), (None, False)):
        one, two = (jax.jit(lm.logits)(params, ids, mask, marks)[:, 0] for ids in (tokens, changed))
        assert np.allclose(one, two, atol=1e-5) != moves
    # Nothing of a prefix sees what comes after it.
    last = tokens.at[:, 6:].set(40)
    one, two = (jax.jit(lm.logits)(params, ids, mask, prefix)[2] for ids in (tokens, last))
    np.testing.assert_allclose(one[:6], two[:6], atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_full_logits_of_encoder_decoders(name: str) -> None:
    lm, x = EncoderDecoder(dataclasses.replace(tiny.MODELS[name].config, role_embedding=False)), tiny.plain()
    params = tiny.params(lm)
    start = jnp.full((x.response.shape[0], 1), lm.config.start_id)
    inputs = jnp.concatenate([start, x.response[:, :-1]], axis=1)
    mask = x.prompt_segments > 0
    logits = jax.jit(lm.logits)(params, x.prompt, mask, inputs)
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(x.response)[:, :, None], axis=2)
    seen = np.asarray(x.response_segments) > 0
    np.testing.assert_allclose(logp[..., 0][seen], tiny.logp(lm, params, x)[seen], atol=1e-5)
    shift = [int(n) for n in jnp.sum(~mask, axis=1)]
    left = jnp.stack([jnp.roll(row, n) for row, n in zip(x.prompt, shift, strict=True)])
    left_mask = jnp.stack([jnp.roll(row, n) for row, n in zip(mask, shift, strict=True)])
    np.testing.assert_allclose(jax.jit(lm.logits)(params, left, left_mask, inputs), logits, atol=1e-4)


def test_scale_logits_is_as_tied_unless_given() -> None:
    scales = {
        (tied, scaled): dataclasses.replace(tiny.T5, tied=tied, scale_logits=scaled).logit_scale
        for tied in (True, False)
        for scaled in (None, True, False)
    }
    assert {key for key, scale in scales.items() if scale != 1} == {(True, None), (True, True), (False, True)}
    assert set(scales.values()) == {1.0, tiny.T5.width**-0.5}


def test_scores_start_alike_whatever_their_scale() -> None:
    stds = []
    for scale in (None, 1.0):
        config = dataclasses.replace(tiny.ROTARY, width=64, head_dim=16, attention_scale=scale)
        params = jax.jit(DecoderOnly(config).init)(jax.random.key(0))
        stds.append(np.std(params["layers"]["attention"]["query"]["kernel"]) * (scale or 16**-0.5))
    np.testing.assert_allclose(stds[0], stds[1], rtol=1e-5)
