"""What every conditional language model must keep: padding, packing, causality, and its settings' invariances."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.types import Conditional, Params
from pit_jax.models.api import ConditionalLM

from . import tiny

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_neither_padding_nor_packing_changes_anything(name: str) -> None:
    lm, plain = tiny.MODELS[name], tiny.plain()
    params, one = tiny.params(lm), tiny.EXAMPLES
    wide = tiny.batch([one[:3], [one[3], one[0]], [one[2]], [one[1]]], 16, 13, references=2)
    # What stands at padding must not matter either.
    wide = dataclasses.replace(
        wide,
        prompt=jnp.where(wide.prompt_segments > 0, wide.prompt, 7),
        response=jnp.where(wide.response_segments > 0, wide.response, 9),
    )
    expected, found = tiny.everything(lm, params, plain), tiny.everything(lm, params, wide)
    places = {(0, 1): 0, (0, 2): 1, (0, 3): 2, (1, 1): 3, (1, 2): 0, (2, 1): 2, (3, 1): 1}
    for (row, segment), number in places.items():
        here, there = wide.response_segments[row] == segment, plain.response_segments[number] > 0
        for one, other in zip(found[0], expected[0], strict=True):
            np.testing.assert_allclose(one[row, here], other[number, there], atol=1e-5)
        for one, other in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(one.response[row, here], other.response[number, there], atol=1e-5)
        here, there = wide.prompt_segments[row] == segment, plain.prompt_segments[number] > 0
        for one, other in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(one.prompt[row, here], other.prompt[number, there], atol=1e-5)
    assert all(not np.any(score[wide.response_segments == 0]) for score in found[0])
    assert np.all(expected[0].logp[plain.response_segments > 0] < 0)


def reach(lm: ConditionalLM, x: Conditional, read) -> np.ndarray:
    """Return whether read(...)[t] depends on the embedding of token id v, as [t, v], by its gradient."""
    params = tiny.params(lm)

    def outputs(table: jax.Array) -> jax.Array:
        return read(params | {"embedding": params["embedding"] | {"token": table}}, x)

    return np.any(jax.jit(jax.jacrev(outputs))(params["embedding"]["token"]) != 0, axis=-1)


@pytest.mark.parametrize("name", ["rotary", "learned", "qwen3", "t5x_decoder", "t5", "umt5"])
def test_a_token_is_predicted_from_all_before_it_and_nothing_else(name: str) -> None:
    # Every id occurs once, so the gradient of an id's embedding is that of its place.
    packed = tiny.batch([[([1, 2, 3], [11, 12, 13, 14]), ([4, 5], [21, 22])]], 7, 8)
    lm = tiny.MODELS[name]
    found = reach(lm, packed, lambda params, x: lm.logprobs(params, x).logp[0])
    first = {t: {1, 2, 3} | set(range(11, 11 + t)) for t in range(4)}
    second = {4: {4, 5}, 5: {4, 5, 21}, 6: set(), 7: set()}
    start = {0} if name in ("t5", "umt5") else set()
    for t, expected in (first | second).items():
        assert set(np.flatnonzero(found[t])) == (expected | start if expected else set()), t


def test_a_window_hides_what_is_far() -> None:
    lm = type(tiny.MODELS["windowed"])(dataclasses.replace(tiny.WINDOWED, global_every=0))
    x = tiny.batch([[([1, 2, 3, 4, 5, 6], [11, 12])]], 7, 2)
    found = reach(lm, x, lambda params, x: lm.logprobs(params, x).logp[0])
    # Two layers of a window of 3 see 2 x 2 tokens before the last of the prompt.
    assert set(np.flatnonzero(found[0])) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", ["rotary", "t5x_decoder", "t5"])
def test_bidirectional_sees_the_whole_segment(name: str) -> None:
    lm = tiny.MODELS[name]
    packed = tiny.batch([[([1, 2], [11, 12]), ([4], [21, 22])]], 4, 5)

    def read(params: Params, x: Conditional) -> jax.Array:
        return jnp.concatenate(lm.hidden(params, x, attention="bidirectional"), axis=1)[0, :, 0]

    found = reach(lm, packed, read)
    for t, segment in enumerate([1, 1, 2, 0, 1, 1, 2, 2, 0]):
        expected = {1: {1, 2, 11, 12}, 2: {4, 21, 22}, 0: {0}}[segment]
        assert set(np.flatnonzero(found[t])) == expected, t


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_references_are_told_from_prompts(name: str) -> None:
    lm, x = tiny.MODELS[name], tiny.plain()
    other = dataclasses.replace(x, prompt_reference=jnp.zeros_like(x.prompt_reference))
    params = tiny.params(lm)
    assert not np.allclose(tiny.logp(lm, params, x), tiny.logp(lm, params, other), atol=1e-3)


def test_the_first_token_without_a_prompt_is_uniform() -> None:
    lm, x = tiny.MODELS["rotary"], tiny.batch([[([], [3, 4])]], 2, 3)
    np.testing.assert_allclose(tiny.logp(lm, tiny.params(lm), x)[0, 0], -np.log(tiny.VOCABULARY), rtol=1e-6)
    logits, _ = jax.jit(lm.prefill, static_argnums=2)(tiny.params(lm), tiny.prompts_of(x), 2)
    np.testing.assert_array_equal(logits, 0)


def grads_of(lm: ConditionalLM, x: Conditional, key: jax.Array | None) -> tuple[jax.Array, Params]:
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(lm.logprobs(p, x, key).logp)))(tiny.params(lm))


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_scan_remat_and_chunks_change_nothing(name: str) -> None:
    model, x, key = type(tiny.MODELS[name]), tiny.plain(), jax.random.key(1)
    config = dataclasses.replace(tiny.MODELS[name].config, dropout=0.2)
    expected, expected_grads = grads_of(model(config), x, key)
    for change in (
        {"scan_layers": False, "remat": "dots"},
        {"remat": "full", "logprob_chunk": 20},
    ):
        changed = model(dataclasses.replace(config, **change))
        value, grads = grads_of(changed, x, key)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected_grads), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-6, err_msg=path)


def test_remat_recomputes() -> None:
    lm, x = tiny.MODELS["rotary"], tiny.plain()
    products = {}
    for policy in ("none", "dots", "dots_with_no_batch_dims", "full"):
        model = type(lm)(dataclasses.replace(lm.config, remat=policy))
        program = jax.make_jaxpr(jax.grad(lambda p, m=model: jnp.sum(m.logprobs(p, x).logp)))(lm.abstract())
        products[policy] = str(program).count("dot_general")
    assert products["none"] == products["dots"] < products["dots_with_no_batch_dims"] < products["full"]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_bfloat16_compute_is_close_and_keeps_float32_where_it_must(name: str) -> None:
    plain, x = tiny.MODELS[name], tiny.plain()
    half, params = type(plain)(dataclasses.replace(plain.config, dtype="bfloat16")), tiny.params(plain)
    scores, hidden, _ = jax.eval_shape(lambda p: tiny.everything(half, p, x), params)
    assert hidden.response.dtype == jnp.bfloat16
    assert {score.dtype for score in scores} == {jnp.dtype("float32")}
    grads = jax.eval_shape(jax.grad(lambda p: jnp.sum(half.logprobs(p, x).logp)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    mean_error = np.mean(np.abs(tiny.logp(half, params, x) - tiny.logp(plain, params, x)))
    assert 0 < mean_error < 0.05


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_dropout_needs_a_rate_and_a_key(name: str) -> None:
    plain, x = tiny.MODELS[name], tiny.plain()
    dropping, params = type(plain)(dataclasses.replace(plain.config, dropout=0.3)), tiny.params(plain)
    expected = tiny.logp(plain, params, x)
    np.testing.assert_array_equal(tiny.logp(dropping, params, x), expected)
    np.testing.assert_array_equal(tiny.logp(plain, params, x, KEY), expected)
    one, same, other = (tiny.logp(dropping, params, x, jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other) and not np.allclose(one, expected)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_equal_configs_share_a_compiled_program(name: str) -> None:
    lm, x, traces = tiny.MODELS[name], tiny.plain(), []

    def score(model: ConditionalLM, params: Params, x: Conditional) -> jax.Array:
        traces.append(model)
        return jax.tree.leaves(params)[0].sum() + model.config.width

    jitted = jax.jit(score, static_argnums=0)
    for config in (lm.config, dataclasses.replace(lm.config), dataclasses.replace(lm.config, norm_eps=1e-5)):
        jitted(type(lm)(config), tiny.params(lm), x)
    assert len(traces) == 2


@pytest.mark.parametrize("name", tiny.MODELS)
def test_abstract_and_axes_describe_the_parameters(name: str) -> None:
    lm = tiny.MODELS[name]
    made, shapes = jax.eval_shape(lm.init, KEY), lm.abstract()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    axes = dict(tree.named_leaves(jax.tree.map("|".join, lm.axes(), is_leaf=lambda node: isinstance(node, tuple))))
    for path, leaf in tree.named_leaves(shapes):
        names = axes[path].split("|")
        assert len(names) == leaf.ndim, path
        assert ("layers" in path.split("/")) == (names[0] == "layers"), path
        assert leaf.shape[names.index("mlp")] == lm.config.mlp if "mlp" in names else True, path
        assert leaf.shape[names.index("embed")] == lm.config.width if "embed" in names else True, path


def test_shapes_do_not_remember_the_mesh_they_were_made_under() -> None:
    fresh = tiny.DecoderOnly(dataclasses.replace(tiny.ROTARY, mlp=40))  # nobody has asked for its shapes before
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        shapes = fresh.abstract()
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(shapes))


def test_layers_start_different_and_as_documented() -> None:
    config = dataclasses.replace(tiny.ROTARY, width=64, mlp=64)
    layers = jax.jit(tiny.DECODERS["rotary"].__class__(config).init)(KEY)["layers"]
    up, down = layers["mlp"]["up"]["kernel"], layers["mlp"]["down"]["kernel"]
    assert not np.allclose(up[0], up[1])
    np.testing.assert_allclose(np.std(up), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(down), 64**-0.5 / 2, rtol=0.05)
    np.testing.assert_array_equal(layers["mlp_norms"]["before"]["scale"], 1)
