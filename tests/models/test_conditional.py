"""What every conditional language model must keep: padding, packing, causality, and its settings' invariances."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.types import Conditional

from . import tiny

KEY = jax.random.key(0)


def unpacked(examples: list[tiny.Example], prompts: int = 6, responses: int = 5) -> Conditional:
    return tiny.batch([[example] for example in examples], prompts, responses, references=2)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_padding_changes_nothing(name: str) -> None:
    lm, examples = tiny.MODELS[name], tiny.examples(3)
    near, far = unpacked(examples), unpacked(examples, 9, 7)
    garbage = dataclasses.replace(far, prompt=jnp.where(far.prompt_segments > 0, far.prompt, 7))
    expected = lm.logprobs(tiny.params(lm), near).logp
    for padded in (far, garbage):
        scores = lm.logprobs(tiny.params(lm), padded)
        np.testing.assert_allclose(scores.logp[:, :5], expected, atol=1e-5)
        assert all(not np.any(score[padded.response_segments == 0]) for score in scores)
    assert np.all(expected[near.response_segments > 0] < 0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_packed_equals_unpacked(name: str, attention: str) -> None:
    lm, examples = tiny.MODELS[name], tiny.examples(4, seed=1)
    packed = tiny.batch([examples[:3], examples[3:]], 16, 16, references=2)
    plain = unpacked(examples)
    states = lm.hidden(tiny.params(lm), packed, attention=attention)
    expected = lm.hidden(tiny.params(lm), plain, attention=attention)
    packed_logp, plain_logp = lm.logprobs(tiny.params(lm), packed).logp, lm.logprobs(tiny.params(lm), plain).logp
    for number, (row, segment) in enumerate([(0, 1), (0, 2), (0, 3), (1, 1)]):
        here, there = packed.prompt_segments[row] == segment, plain.prompt_segments[number] > 0
        np.testing.assert_allclose(states.prompt[row, here], expected.prompt[number, there], atol=1e-5)
        here, there = packed.response_segments[row] == segment, plain.response_segments[number] > 0
        np.testing.assert_allclose(states.response[row, here], expected.response[number, there], atol=1e-5)
        np.testing.assert_allclose(packed_logp[row, here], plain_logp[number, there], atol=1e-5)


def reach(lm, params: dict, x: Conditional, read) -> np.ndarray:
    """Return |d read(...)[t] / d embedding of token id v| as [t, v]."""

    def outputs(table: jax.Array) -> jax.Array:
        return read(params | {"embedding": params["embedding"] | {"token": table}}, x)

    return np.abs(jax.jacrev(outputs)(params["embedding"]["token"])).sum(axis=-1)


@pytest.mark.parametrize("name", ["rotary", "learned", "t5"])
def test_a_token_is_predicted_from_all_before_it_and_nothing_else(name: str) -> None:
    # Every id occurs once, so the gradient of an id's embedding is that of its place.
    packed = tiny.batch([[([1, 2, 3], [11, 12, 13, 14]), ([4, 5], [21, 22])]], 7, 8)
    lm = tiny.MODELS[name]
    found = reach(lm, tiny.params(lm), packed, lambda p, x: lm.logprobs(p, x).logp[0]) > 0
    first = {t: {1, 2, 3} | set(range(11, 11 + t)) for t in range(4)}
    second = {4: {4, 5}, 5: {4, 5, 21}, 6: set(), 7: set()}
    start = {0} if name == "t5" else set()
    for t, expected in (first | second).items():
        assert set(np.flatnonzero(found[t])) == (expected | start if expected else set()), t


def test_window_hides_what_is_far() -> None:
    lm = dataclasses.replace(tiny.MODELS["windowed"], config=dataclasses.replace(tiny.WINDOWED, global_every=0))
    x = tiny.batch([[([1, 2, 3, 4, 5, 6], [11, 12])]], 7, 2)
    found = reach(lm, tiny.params(tiny.MODELS["windowed"]), x, lambda p, x: lm.logprobs(p, x).logp[0]) > 0
    # Two layers of a window of 3 see 2 * 2 tokens before the predecessor.
    assert set(np.flatnonzero(found[0])) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_bidirectional_sees_the_whole_segment(name: str) -> None:
    lm = tiny.MODELS[name]
    packed = tiny.batch([[([1, 2], [11, 12]), ([4], [21, 22])]], 4, 5)

    def read(p: dict, x: Conditional) -> jax.Array:
        states = lm.hidden(p, x, attention="bidirectional")
        return jnp.concatenate(states, axis=1)[0, :, 0]

    found = reach(lm, tiny.params(lm), packed, read) > 0
    for t, segment in enumerate([1, 1, 2, 0, 1, 1, 2, 2, 0]):
        expected = {1: {1, 2, 11, 12}, 2: {4, 21, 22}, 0: {0}}[segment]
        assert set(np.flatnonzero(found[t])) == expected, t


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_roles_and_references_are_told_apart(name: str) -> None:
    lm, x = tiny.MODELS[name], unpacked(tiny.examples(2))
    other = dataclasses.replace(x, prompt_reference=jnp.zeros_like(x.prompt_reference))
    assert not np.allclose(tiny.logprobs(lm, tiny.params(lm), x).logp, tiny.logprobs(tiny.params(lm), other).logp, atol=1e-3)


def test_first_token_without_a_prompt_is_uniform() -> None:
    lm, x = tiny.MODELS["rotary"], tiny.batch([[([], [3, 4])]], 2, 3)
    scores = lm.logprobs(tiny.params(lm), x)
    np.testing.assert_allclose(scores.logp[0, 0], -np.log(tiny.VOCABULARY), rtol=1e-6)
    logits, _ = lm.prefill(tiny.params(lm), tiny.prompts_of(x), 2)
    np.testing.assert_allclose(logits, 0)


def loss_and_grads(lm, params: dict, x: Conditional, key: jax.Array | None = None) -> tuple[jax.Array, dict]:
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(lm.logprobs(p, x, key).logp)))(params)


@pytest.mark.parametrize("change", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots", "scan_layers": False}])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_scan_and_remat_change_nothing(name: str, change: dict) -> None:
    plain, x = tiny.MODELS[name], unpacked(tiny.examples(2))
    changed = type(plain)(dataclasses.replace(plain.config, **change))
    expected, expected_grads = loss_and_grads(plain, tiny.params(lm), x, jax.random.key(1))
    value, grads = loss_and_grads(changed, tiny.params(lm), x, jax.random.key(1))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, err_msg=path)


def test_remat_recomputes() -> None:
    lm, x = tiny.MODELS["rotary"], unpacked(tiny.examples(1))
    again = type(lm)(dataclasses.replace(lm.config, remat="full"))
    abstract = lm.abstract()

    def program(model) -> str:
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.logprobs(p, x).logp)))(abstract))

    assert "remat" in program(again) and "remat" not in program(lm)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_bfloat16_compute_is_close_and_keeps_float32_where_it_must(name: str) -> None:
    plain, x = tiny.MODELS[name], unpacked(tiny.examples(3))
    half = type(plain)(dataclasses.replace(plain.config, dtype="bfloat16"))
    scores, expected = half.logprobs(tiny.params(lm), x), plain.logprobs(tiny.params(lm), x)
    assert half.hidden(tiny.params(lm), x, attention="causal").response.dtype == jnp.bfloat16
    assert scores.logp.dtype == jnp.float32
    np.testing.assert_allclose(scores.logp, expected.logp, atol=0.15)
    _, grads = loss_and_grads(half, tiny.params(lm), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_dropout_needs_a_rate_and_a_key(name: str) -> None:
    plain, x = tiny.MODELS[name], unpacked(tiny.examples(2))
    dropping = type(plain)(dataclasses.replace(plain.config, dropout=0.3))
    expected = plain.logprobs(tiny.params(lm), x).logp
    np.testing.assert_array_equal(dropping.logprobs(tiny.params(lm), x).logp, expected)
    np.testing.assert_array_equal(plain.logprobs(tiny.params(lm), x, KEY).logp, expected)
    one, same, other = (dropping.logprobs(tiny.params(lm), x, jax.random.key(n)).logp for n in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other) and not np.allclose(one, expected)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_equal_configs_share_a_compiled_program(name: str) -> None:
    lm, x = tiny.MODELS[name], unpacked(tiny.examples(2))
    traces = []


    def score(model, p: dict, x: Conditional) -> jax.Array:
        traces.append(model)
        return model.predictors(p, x)

    jitted = jax.jit(score, static_argnums=0)
    jitted(lm, tiny.params(lm), x)
    jitted(type(lm)(dataclasses.replace(lm.config)), tiny.params(lm), x)
    assert len(traces) == 1
    jitted(type(lm)(dataclasses.replace(lm.config, norm_eps=1e-5)), tiny.params(lm), x)
    assert len(traces) == 2


@pytest.mark.parametrize("name", tiny.MODELS)
def test_abstract_and_axes_describe_the_parameters(name: str) -> None:
    lm = tiny.MODELS[name]
    shapes, axes = lm.abstract(), lm.axes()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tiny.params(lm)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    named = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    assert [len(names) for names in named] == [leaf.ndim for leaf in jax.tree.leaves(shapes)]
    assert all(names[0] == "layers" for names in jax.tree.leaves(_layers(axes), is_leaf=_is_names))


def _is_names(node: object) -> bool:
    return isinstance(node, tuple)


def _layers(axes: dict) -> list:
    return [axes["layers"]] if "layers" in axes else [axes[side]["layers"] for side in ("encoder", "decoder")]


def test_stacked_layers_differ() -> None:
    params = tiny.MODELS["rotary"].init(KEY)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    down, up = params["layers"]["mlp"]["down"]["kernel"], tiny.ROTARY.mlp**-0.5 / 2
    np.testing.assert_allclose(np.std(down), up, rtol=0.15)
