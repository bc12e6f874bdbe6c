"""Several tokens tried at once, of which rows keep different numbers, equal the full forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.types import Conditional, Params
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use

from . import tiny
from .test_t5gemma import MODELS as T5GEMMAS

MODELS = tiny.MODELS | {f"t5gemma_{name}": lm for name, lm in T5GEMMAS.items()}
TRIED, LENGTH = 2, 9
KEPT = np.array([[1, 3, 2, 1], [3, 1, 0, 2], [2, 2, 3, 0], [2, 1, 2, 3], [1, 2, 1, 2]])
"""How many tokens each of four rows keeps of each try; altogether at most LENGTH."""


def _responses() -> Conditional:
    random = np.random.default_rng(0)
    return tiny.batch(
        [[(prompt, random.integers(1, 30, LENGTH).tolist())] for prompt, _ in tiny.EXAMPLES], 6, LENGTH, references=2
    )


def _check(lm: ConditionalLM, params: Params, x: Conditional, atol: float, samples: int = 1) -> None:
    """Try right and wrong tokens in turn, and compare the logits of the right ones with `logprobs`."""
    expected = jax.jit(lm.logprobs)(params, x)
    logp, log_z = np.asarray(expected.logp), np.asarray(expected.log_z)
    response, rows = np.asarray(x.response), np.arange(len(x.response))
    prompts = jax.tree.map(lambda leaf: leaf[::samples], tiny.prompts_of(x))
    first, cache = jax.jit(lm.prefill, static_argnums=(2, 3, 4))(params, prompts, LENGTH, samples, TRIED)
    extend, keep = jax.jit(lm.extend), jax.jit(lm.keep)

    def compare(logits: jax.Array, at: np.ndarray, those: np.ndarray) -> None:
        found = np.asarray(jax.nn.log_softmax(logits))
        np.testing.assert_allclose(found[those, response[those, at[those]]], logp[those, at[those]], atol=atol)
        np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1)[those], log_z[those, at[those]], atol=atol)

    compare(first, np.zeros_like(rows), rows)
    count = np.zeros_like(rows)
    for kept in KEPT:
        at = count[:, None] + np.arange(TRIED + 1)[None, :]
        right = np.take_along_axis(response, np.minimum(at, LENGTH - 1), axis=1)
        tried = np.where(np.arange(TRIED + 1)[None, :] < kept[:, None], right, (right + 7) % 30)
        logits, cache = extend(params, cache, jnp.asarray(tried, jnp.int32))
        for place in range(TRIED + 1):
            compare(logits[:, place], at[:, place] + 1, rows[(place < kept) & (at[:, place] + 1 < LENGTH)])
        cache, count = keep(cache, jnp.asarray(kept, jnp.int32)), count + kept
    assert count.max() == LENGTH


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "rotary", "windowed", "umt5", "t5gemma_two"))
def test_tried_tokens_equal_the_full_pass(name: str) -> None:
    _check(MODELS[name], tiny.params(MODELS[name]), _responses(), 1e-5)


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "learned"))
def test_rows_that_share_a_prompt_try_tokens_of_their_own(name: str) -> None:
    x = _responses()
    prompts = {part: jnp.repeat(vars(x)[part][::2], 2, axis=0) for part in vars(x) if part.startswith("prompt")}
    _check(MODELS[name], tiny.params(MODELS[name]), dataclasses.replace(x, **prompts), 1e-5, samples=2)


def test_an_integer_cache_is_nearly_as_exact() -> None:
    lm = type(MODELS["learned"])(dataclasses.replace(tiny.LEARNED, cache_dtype="int8"))
    _check(lm, tiny.params(lm), _responses(), 0.15)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("learned", MeshConfig(data=2, tensor=2)),
        pytest.param("rotary", MeshConfig(fsdp=2, sequence=2), marks=pytest.mark.slow),
        pytest.param("t5gemma_two", MeshConfig(fsdp=4), marks=pytest.mark.slow),
    ],
)
def test_devices_share_the_rows(name: str, mesh: MeshConfig) -> None:
    lm = MODELS[name]
    devices = make_mesh(mesh, jax.devices()[:4])
    with use(devices, DEFAULT_RULES):
        params = jax.device_put(tiny.params(lm), specs(lm.axes(), lm.abstract(), DEFAULT_RULES, devices))
        _check(lm, params, put_batch(_responses(), devices, row_axis=0), 1e-5)
