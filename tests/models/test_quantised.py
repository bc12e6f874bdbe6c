"""Int8 kernels under adapters: nearest integers, the same network as with q s for weights, no float copy kept."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Params
from pit_jax.models import lora
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import ScalarModel
from pit_jax.models.lora import Lora
from pit_jax.models.quantised import SCALE, dequantise, product, quantise, quantise_kernel
from pit_jax.models.trained import divide
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.rules import DEFAULT_RULES, specs

from . import tiny

SOME = Lora(rank=3, alpha=6.0, targets=("query", "out", "up", "down", "head"))


def pair(name: str, **changes: object) -> tuple[ConditionalLM, ConditionalLM]:
    """Return a model with adapters on float kernels, and the same on integers."""
    lm = tiny.MODELS[name]
    config = dataclasses.replace(lm.config, lora=SOME, **changes)
    return type(lm)(config), type(lm)(dataclasses.replace(config, quantised="int8"))


@functools.cache
def stored(name: str) -> Params:
    """Return the quantised parameters of `tiny.params`."""
    plain, lm = pair(name)
    return quantise(tiny.params(plain), lm, donate=False)


def test_kernels_become_the_nearest_integers() -> None:
    kernel = np.random.default_rng(0).normal(0, 0.3, (3, 8, 2, 4)).astype(np.float32)
    kernel[0, :, 1, 2] = 0
    q, scale = (np.asarray(part) for part in quantise_kernel(jnp.asarray(kernel), (1,)))
    assert q.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (3, 1, 2, 4)
    expected = np.abs(kernel.astype(np.float64)).max(axis=1, keepdims=True) / 127
    expected[0, 0, 1, 2] = 1
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    np.testing.assert_array_equal(q, np.rint(kernel / expected))
    assert np.abs(kernel - q * expected).max() <= 0.5001 * expected.max()
    again = quantise_kernel(jnp.asarray(q * scale), (1,))
    np.testing.assert_array_equal(again.values, q)


@pytest.mark.parametrize("size", [2.0**-9, 0.0031])
def test_what_integers_can_say_is_kept(size: float) -> None:
    values = np.random.default_rng(1).integers(-127, 128, (8, 3, 5))
    values[2, 1], values[4] = 127, -127
    kernel = (values * np.float32(size)).astype(np.float32)
    stored = quantise_kernel(jnp.asarray(kernel), (0, 1))
    np.testing.assert_array_equal(stored.values, values)
    back = dequantise({"kernel": stored.values, SCALE: stored.scale, "bias": jnp.ones(5)})
    assert back.keys() == {"kernel", "bias"}
    np.testing.assert_allclose(back["kernel"], kernel, rtol=0 if size == 2.0**-9 else 2e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_weight_stays_visible(bad: float) -> None:
    kernel = jnp.ones((4, 2)).at[1, 1].set(bad)
    q, scale = quantise_kernel(kernel, (0,))
    assert not np.isfinite(scale[0, 1])
    np.testing.assert_allclose(q[:, 0] * scale[0, 0], 1, rtol=1e-6)


def test_products_in_bfloat16_lose_two_roundings() -> None:
    random = np.random.default_rng(2)
    kernel = quantise_kernel(jnp.asarray(random.normal(size=(64, 2, 32)), jnp.float32), (0,))
    x = jnp.asarray(random.normal(size=(3, 5, 64)), jnp.bfloat16)
    exact = np.einsum(
        "bld,dhe->blhe",
        *(np.asarray(a, np.float64) for a in (x, kernel.values.astype(jnp.float32) * kernel.scale)),
    )
    y = product(x, kernel, 1)
    assert y.dtype == jnp.bfloat16
    # To 8 bits each: of x q, and of its multiple.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2.01 * 2.0**-8, atol=1e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_tree_is_that_of_the_network(name: str) -> None:
    plain, lm = pair(name)
    floats, abstract = tiny.params(plain), lm.abstract()
    params = quantise(floats, lm, donate=False)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for (path, leaf), (_, wanted) in zip(tree.named_leaves(params), tree.named_leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype), path
    before = dict(tree.named_leaves(floats))
    changed = {path for path, leaf in tree.named_leaves(params) if leaf is not before.get(path)}
    kernels = {path for path in before if path.endswith("/kernel") and not path.startswith("head")}
    assert changed == kernels | {f"{path.removesuffix('kernel')}{SCALE}" for path in kernels}
    frozen, trained = divide(lm, params)
    assert frozen is not None
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int8)}


def test_fresh_parameters_are_the_quantised_fresh_ones() -> None:
    plain, lm = pair("rotary")
    expected = quantise(jax.jit(plain.init)(jax.random.key(3)), lm, donate=True)
    params = jax.jit(lm.init)(jax.random.key(3))
    for (path, one), (_, other) in zip(tree.named_leaves(params), tree.named_leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["rotary", "gemma3", "umt5"])
def test_scores_are_close_to_those_of_the_float_model(name: str) -> None:
    plain, lm = pair(name)
    x = tiny.plain()
    exact, found = (np.asarray(tiny.logp(*one, x)) for one in ((plain, tiny.params(plain)), (lm, stored(name))))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan"), [("rotary", True), ("rotary", False), ("t5", True)])
def test_scores_and_gradients_are_those_of_the_weights_that_are_stored(name: str, scan: bool) -> None:
    plain, lm = pair(name, scan_layers=scan)
    params, x = stored(name), tiny.plain()

    def gradient(lm: ConditionalLM, params: Params) -> tuple[jax.Array, Params]:
        base, adapters = lora.split(params)

        def loss(adapters: Params, base: Params) -> jax.Array:
            return jnp.sum(lm.logprobs(lora.join(base, adapters), x).logp)

        return jax.jit(jax.value_and_grad(loss))(adapters, base)

    value, grads = gradient(lm, params)
    expected, others = gradient(plain, dequantise(params))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(others), strict=True):
        assert np.any(one), path
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), err_msg=path)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_backward_pass_keeps_no_float_kernel(name: str, scan: bool) -> None:
    plain, lm = pair(name, scan_layers=scan)
    # Seven columns: as many tokens as a kernel has rows would look like one.
    x = tiny.batch([[example] for example in tiny.EXAMPLES], 7, 5, references=2)

    def kept(lm: ConditionalLM, params: Params) -> set[tuple[int, ...]]:
        base, adapters = lora.split(params)

        def loss(adapters: Params) -> jax.Array:
            return jnp.sum(lm.logprobs(lora.join(base, adapters), x).logp)

        back = jax.eval_shape(lambda adapters: jax.vjp(loss, adapters)[1], adapters)
        return {leaf.shape for leaf in jax.tree.leaves(back) if jnp.issubdtype(leaf.dtype, jnp.floating)}

    kernels = {leaf.shape for path, leaf in tree.named_leaves(stored(name)) if leaf.dtype == jnp.int8}
    kernels |= {shape[1:] for shape in kernels}
    assert kept(plain, dequantise(stored(name))) & kernels
    assert not kept(lm, stored(name)) & kernels


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_decoding_reads_the_weights_that_are_stored(name: str) -> None:
    plain, lm = pair(name)
    x = tiny.plain()
    answers = []
    for model, params in ((lm, stored(name)), (plain, dequantise(stored(name)))):
        logits, cache = jax.jit(model.prefill, static_argnums=2)(params, tiny.prompts_of(x), 3)
        answers.append([logits])
        answers[-1].append(jax.jit(model.step)(params, cache, x.response[:, 0])[0])
    np.testing.assert_allclose(*map(np.stack, answers), atol=2e-5)


def test_four_devices_store_their_parts_and_give_the_same() -> None:
    plain, lm = pair("rotary")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    spread = jax.device_put(tiny.params(plain), specs(plain.axes(), plain.abstract(), DEFAULT_RULES, mesh))
    params, x = quantise(spread, lm, donate=True), tiny.plain()
    places = specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh)
    named = zip(tree.named_leaves(params), jax.tree.leaves(places), jax.tree.leaves(stored("rotary")), strict=True)
    for (path, leaf), place, one in named:
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
        np.testing.assert_array_equal(leaf, one, err_msg=path)
    base, adapters = lora.split(params)
    alone, adapters_alone = lora.split(stored("rotary"))

    def loss(adapters: Params, base: Params) -> jax.Array:
        return jnp.sum(lm.logprobs(lora.join(base, adapters), x).logp)

    expected = jax.jit(jax.grad(loss))(adapters_alone, alone)
    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(loss))(adapters, base)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), err_msg=path)


def test_floats_are_deleted_one_by_one_only_where_asked() -> None:
    plain, lm = pair("rotary")
    network = ScalarModel(lm)
    params = ScalarModel(plain).init(jax.random.key(0))
    kept = quantise(params, network, donate=False)
    done = quantise(params, network, donate=True)
    gone = {path for path, leaf in tree.named_leaves(params) if leaf.is_deleted()}
    assert gone == {path for path, leaf in tree.named_leaves(done) if leaf.dtype == jnp.int8}
    for (path, one), (_, other) in zip(tree.named_leaves(done), tree.named_leaves(kept), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)


def test_parts_of_a_tree_and_quantised_trees() -> None:
    plain, lm = pair("rotary")
    whole = DecoderOnly(dataclasses.replace(plain.config, lora=None))
    base = tiny.params(whole)
    part = quantise({"layers": {"mlp": base["layers"]["mlp"]}}, lm, donate=False)
    both = quantise(base | {"layers": base["layers"] | part["layers"]}, lm, donate=True)
    assert both["layers"]["mlp"]["up"]["kernel"] is part["layers"]["mlp"]["up"]["kernel"]
    assert both["head"] is base["head"]
    assert both["layers"]["attention"]["out"]["kernel"].dtype == jnp.int8


def test_only_frozen_kernels_can_be_quantised() -> None:
    with pytest.raises(ConfigError, match="DecoderOnlyConfig.quantised = 'int8' must be None without lora"):
        dataclasses.replace(tiny.ROTARY, quantised="int8")
    with pytest.raises(ConfigError, match="EncoderDecoderConfig.quantised = 'int4' must be one of int8"):
        EncoderDecoder(dataclasses.replace(tiny.T5, lora=SOME, quantised="int4"))
