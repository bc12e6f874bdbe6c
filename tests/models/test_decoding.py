"""Decoding with a cache equals the full forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.models.decoder_only import DecoderOnly

from . import tiny


@pytest.mark.parametrize("name", tiny.MODELS)
def test_cached_decoding_equals_the_full_pass(name: str) -> None:
    lm = tiny.MODELS[name]
    params = tiny.params(lm)
    examples = [([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]), ([12], [13, 14, 15, 16, 17]), ([18, 19, 20], [1] * 5)]
    x = tiny.batch([[example] for example in examples], 6, 5, references=2)
    expected = jax.jit(lm.logprobs)(params, x)
    logits, cache = jax.jit(lm.prefill, static_argnums=2)(params, tiny.prompts_of(x), 5)
    step = jax.jit(lm.step)
    for t in range(5):
        assert logits.dtype == jnp.float32
        rows = np.arange(len(examples))
        logp = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(logp[rows, np.asarray(x.response[:, t])], expected.logp[:, t], atol=1e-5)
        np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), expected.log_z[:, t], atol=1e-5)
        logits, cache = step(params, cache, x.response[:, t])
    # The call after the last token has room too.
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_rows_do_not_depend_on_their_batch_mates_or_on_padding(name: str) -> None:
    lm = tiny.MODELS[name]
    params = tiny.params(lm)
    alone = tiny.batch([[([5, 6, 7], [8, 9])]], 3, 2)
    among = tiny.batch([[([1, 2, 3, 4, 5], [3, 3])], [([5, 6, 7], [8, 9])]], 8, 2)
    prefill, step = jax.jit(lm.prefill, static_argnums=2), jax.jit(lm.step)
    one, one_cache = prefill(params, tiny.prompts_of(alone), 2)
    two, two_cache = prefill(params, tiny.prompts_of(among), 4)
    np.testing.assert_allclose(one[0], two[1], atol=1e-5)
    one, _ = step(params, one_cache, alone.response[:, 0])
    two, _ = step(params, two_cache, among.response[:, 0])
    np.testing.assert_allclose(one[0], two[1], atol=1e-5)


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_unrolled_layers_read_prompts_as_a_loop_does(name: str) -> None:
    lm = tiny.DECODERS[name]
    params, prompts = tiny.params(lm), tiny.prompts_of(tiny.batch([[([1, 2, 3, 4, 5], [6])], [([7, 8], [9])]], 7, 1))
    empty = dataclasses.replace(prompts, mask=prompts.mask.at[1].set(False))
    read = jax.jit(DecoderOnly.prefill, static_argnums=(0, 3))
    loop, unrolled = (DecoderOnly(dataclasses.replace(lm.config, scan_layers=scan)) for scan in (True, False))
    for given in (prompts, empty):
        found, wanted = (jax.tree.leaves(read(form, params, given, 1)[0]) for form in (unrolled, loop))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_last_of_unrolled_layers_computes_one_state_of_a_prompt() -> None:
    lm = DecoderOnly(dataclasses.replace(tiny.LEARNED, layers=1))
    prompts, abstract = tiny.prompts_of(tiny.batch([[([3] * 24, [6])]] * 2, 24, 1)), lm.abstract()
    analysis = jax.jit(lm.prefill, static_argnums=2).lower(abstract, prompts, 1).compile().cost_analysis()
    whole = jax.jit(lambda params: lm.logits(params, prompts.tokens, prompts.mask)).lower(abstract).compile()
    assert analysis["flops"] < whole.cost_analysis()["flops"] / 4


@pytest.mark.parametrize("name", ["learned", "t5"])
def test_the_cache_is_carried_without_copies(name: str) -> None:
    lm = tiny.MODELS[name]
    prompts = tiny.prompts_of(tiny.batch([[([5, 6, 7], [8])]], 3, 1))
    params = tiny.params(lm)
    _, cache = jax.eval_shape(lambda: lm.prefill(params, prompts, 4))
    step = jax.jit(lm.step, donate_argnums=1)
    compiled = step.lower(params, cache, jnp.zeros(1, jnp.int32)).compile()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.prompt, cache.own)))
    assert compiled.memory_analysis().alias_size_in_bytes >= whole


def test_learned_positions_must_suffice() -> None:
    lm = DecoderOnly(tiny.LEARNED)
    prompts = tiny.prompts_of(tiny.batch([[([5], [8])]], 30, 1))
    with pytest.raises(ConfigError, match="max_positions = 32 must be at least 30 prompt tokens"):
        lm.prefill(tiny.params(lm), prompts, 3)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_rows_that_share_a_prompt_equal_rows_with_a_prompt_each(name: str) -> None:
    lm, params = tiny.MODELS[name], tiny.params(tiny.MODELS[name])
    x = tiny.batch(
        [[one] for one in [([1, 2, 3, 4, 5, 6], [7]), ([12], [13]), ([18, 19, 20], [1])]], 6, 1, references=2
    )
    prompts = tiny.prompts_of(x)
    shared, shared_cache = jax.jit(lm.prefill, static_argnums=(2, 3))(params, prompts, 4, 2)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), prompts)
    plain, plain_cache = jax.jit(lm.prefill, static_argnums=(2,))(params, repeated, 4)
    step, tokens = jax.jit(lm.step), np.random.default_rng(1).integers(1, 20, (3, 6)).astype(np.int32)
    for token in (*tokens, None):
        np.testing.assert_allclose(shared, plain, atol=1e-5)
        if token is not None:
            shared, shared_cache = step(params, shared_cache, jnp.asarray(token))
            plain, plain_cache = step(params, plain_cache, jnp.asarray(token))
    held, kept = (jax.tree.leaves(cache.prompt) for cache in (shared_cache, plain_cache))
    assert [2 * a.size for a in held] == [b.size for b in kept]


@pytest.mark.parametrize("name", ["windowed", "learned", "t5"])
def test_an_integer_cache_is_a_quarter_as_large_and_nearly_as_exact(name: str) -> None:
    plain = tiny.MODELS[name]
    lm, params = type(plain)(dataclasses.replace(plain.config, cache_dtype="int8")), tiny.params(plain)
    prompts = tiny.prompts_of(tiny.batch([[one] for one in tiny.EXAMPLES], 6, 5, references=2))
    found, cache = jax.jit(lm.prefill, static_argnums=(2, 3))(params, prompts, 4, 2)
    expected, whole = jax.jit(plain.prefill, static_argnums=(2, 3))(params, prompts, 4, 2)
    step, exact = jax.jit(lm.step), jax.jit(plain.step)
    for token in np.random.default_rng(0).integers(1, 20, (3, 8)).astype(np.int32):
        found, cache = step(params, cache, jnp.asarray(token))
        expected, whole = exact(params, whole, jnp.asarray(token))
    difference = np.abs(jax.nn.log_softmax(found) - jax.nn.log_softmax(expected))
    assert 0 < difference.max() < 0.1 and difference.mean() < 0.02
    size, before = (sum(leaf.nbytes for leaf in jax.tree.leaves((c.prompt, c.own))) for c in (cache, whole))
    # A byte a number, and four for each head and position.
    assert size == before * (8 + 4) / (4 * 8)
