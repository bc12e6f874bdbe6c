"""Prompts that are computed once for several responses give what a prompt for each gives: values and gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.types import Conditional, Params, Rest
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.heads import READOUTS, ScalarModel, ValueModel
from pit_jax.models.lora import Lora
from pit_jax.ops.shared import apart, is_shared, repeated, share
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use

from . import test_t5gemma as gemmas
from . import tiny

MODELS: Mapping[str, ConditionalLM] = tiny.MODELS | {
    "adapters": DecoderOnly(dataclasses.replace(tiny.ROTARY, lora=Lora(rank=2, alpha=4.0, targets=("query", "up")))),
    "t5gemma": gemmas.MODELS["one"],
    "t5gemma 2": gemmas.MODELS["two"],
}
SAMPLES = 3


def shared(prompts: int = 4) -> Conditional:
    """Return prompts of different lengths with `SAMPLES` responses each, one of them empty."""
    random = np.random.default_rng(1)
    examples = []
    for number in range(prompts):
        x = random.integers(1, tiny.VOCABULARY, 2 + number % 4).tolist()
        for sample in range(SAMPLES):
            length = 0 if (number, sample) == (1, 2) else 1 + (number + sample) % 5
            examples.append((x, random.integers(1, tiny.VOCABULARY, length).tolist()))
    x = tiny.batch([[example] for example in examples], 7, 6, references=2)
    return share(x, SAMPLES)


def begun_alike() -> Conditional:
    """Return four prompts of two beginnings, of different lengths, with two responses each; half of them references."""
    random = np.random.default_rng(3)

    def table(rows: int, lengths: list[int], width: int) -> tuple[jax.Array, jax.Array]:
        there = np.array(lengths)[:, None] > np.arange(width)[None, :]
        return jnp.asarray(np.where(there, random.integers(1, tiny.VOCABULARY, (rows, width)), 0)), jnp.asarray(there)

    (prompt, first), (rest, second), (response, third) = (
        table(2, [5, 2], 6), table(4, [3, 1, 4, 2], 5), table(8, [4, 2, 1, 3, 5, 5, 0, 2], 6)
    )  # fmt: skip
    ends = Rest(tokens=rest, segments=second.astype(jnp.int32), reference=second & (jnp.arange(5)[None, :] > 0))
    return Conditional(
        prompt=prompt,
        prompt_segments=first.astype(jnp.int32),
        prompt_reference=jnp.zeros_like(first),
        response=response,
        response_segments=third.astype(jnp.int32),
        rest=ends,
    )


@functools.partial(jax.jit, static_argnums=0)
def rewarded(model: ScalarModel, params: Params, x: Conditional) -> tuple[Params, tuple]:
    """Return the gradient of a function of scores and of log-probabilities, and both."""

    def total(params: Params) -> tuple[jax.Array, tuple]:
        scores, logp = model.scores(params, x, 1), model.lm.logprobs(params["trunk"], x).logp
        return jnp.sum(jnp.sin(scores)) + jnp.sum(logp), (scores, logp)

    return jax.grad(total, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def scored(lm: ConditionalLM, params: Params, x: Conditional) -> tuple[jax.Array, tuple]:
    """Return the scores of tokens, causal states, and the gradient of a function of both."""

    def total(params: Params) -> tuple[jax.Array, tuple]:
        hidden, scores = lm.hidden(params, x, attention="causal"), lm.logprobs(params, x)
        prompt, response = (
            jnp.where(there[:, :, None] > 0, states, 0.0)
            for states, there in ((hidden.prompt, x.prompt_segments), (hidden.response, x.response_segments))
        )
        # Of a prompt that is there several times, each counts in part.
        value = jnp.sum(jnp.sin(response)) + jnp.sum(jnp.sin(prompt)) / len(x.prompt) + jnp.sum(scores.logp)
        return value, (scores, response, repeated(prompt, len(x.response)))

    return jax.grad(total, has_aux=True)(params)


def with_changes(lm: ConditionalLM, **changes: Any) -> ConditionalLM:
    family: Any = type(lm)
    return family(dataclasses.replace(lm.config, **changes))


def assert_same(found: tuple, expected: tuple, atol: float = 1e-5) -> None:
    for (path, one), (_, other) in zip(
        tree.named_leaves({"g": found[0]}), tree.named_leaves({"g": expected[0]}), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=atol * (1 + np.abs(other).max()), err_msg=path)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "t5"))
def test_shared_prompts_give_what_a_prompt_for_each_response_gives(name: str) -> None:
    lm, x = MODELS[name], shared()
    params = tiny.params(lm)
    assert is_shared(x) and not is_shared(apart(x))
    assert_same(scored(lm, params, x), scored(lm, params, apart(x)))


READ = {"t5gemma": "last"}
"""Readouts of models whose stacks have different widths."""


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "rotary"))
def test_prompts_that_begin_alike_give_what_whole_prompts_give(name: str) -> None:
    x = begun_alike()
    model = ScalarModel(MODELS[name], READ.get(name, "mean_difference"), "causal")  # pyright: ignore[reportArgumentType]
    params = model.with_trunk(tiny.params(model.lm), jax.random.key(2))
    assert is_shared(x) and apart(x).prompt.shape == (8, 11)
    found, expected = rewarded(model, params, x), rewarded(model, params, apart(x))
    assert np.std(expected[1][0]) > 1e-3
    assert_same(found, expected)


@pytest.mark.slow
def test_shared_prompts_over_four_devices_give_what_one_device_gives() -> None:
    lm, x = MODELS["rotary"], shared()
    params = tiny.params(lm)
    expected = scored(lm, params, apart(x))
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
    with use(mesh, DEFAULT_RULES):
        assert_same(jax.block_until_ready(scored(lm, placed, put_batch(x, mesh, row_axis=0))), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "t5", "t5gemma 2"])
def test_shared_prompts_through_flash_kernels(name: str) -> None:
    lm, x = MODELS[name], shared()
    flash, params = with_changes(lm, attention="splash"), tiny.params(lm)
    assert_same(scored(flash, params, x), scored(lm, params, apart(x)), atol=3e-5)


@pytest.mark.parametrize("readout", tiny.slow_but(READOUTS, "mean"))
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_heads_read_shared_prompts(readout: str, attention: str) -> None:
    model = ScalarModel(MODELS["rotary"], readout, attention)  # pyright: ignore[reportArgumentType]
    params = model.with_trunk(tiny.params(model.lm), jax.random.key(2))
    for x in (shared(), begun_alike()):
        found, expected = (jax.jit(model.scores, static_argnums=2)(params, part, 1) for part in (x, apart(x)))
        assert found.shape == (len(x.response), 1) and np.std(expected) > 1e-3
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_values_of_shared_prompts() -> None:
    model, x = ValueModel(MODELS["rotary"]), shared()
    params = model.with_trunk(tiny.params(model.lm), jax.random.key(2))
    found, expected = (jax.jit(model.values)(params, part) for part in (x, apart(x)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.any(expected[:, 0] != 0)


def test_dropout_of_shared_prompts_needs_a_key() -> None:
    lm, x = MODELS["rotary"], shared()
    dropping, params = with_changes(lm, dropout=0.3), tiny.params(lm)
    np.testing.assert_array_equal(tiny.logp(dropping, params, x), tiny.logp(lm, params, x))
    one, other = (tiny.logp(dropping, params, x, jax.random.key(n)) for n in (1, 2))
    assert not np.allclose(one, other)


def test_a_shared_prompt_is_computed_once() -> None:
    lm, x = MODELS["rotary"], shared(8)
    wide = dataclasses.replace(
        x, **{name: jnp.pad(vars(x)[name], ((0, 0), (0, 121))) for name in vars(x) if name.startswith("prompt")}
    )

    def flops(x: Conditional) -> float:
        program = jax.jit(lambda params: lm.logprobs(params, x).logp).lower(lm.abstract()).compile()
        return (program.cost_analysis() or {})["flops"]

    # 128 + 3 x 6 columns instead of 3 x (128 + 6).
    assert flops(apart(wide)) > 2 * flops(wide)
