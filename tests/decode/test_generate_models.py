"""Sampling from both model families."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.types import Prompts, Samples
from pit_jax.decode.batches import with_samples
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.text.codec import PromptRow, rows_to_prompts

SIZES = {"nano": {"layers": 2, "kv_heads": 1}, "t5-nano": {"encoder_layers": 1, "decoder_layers": 2}}
ROWS = [
    PromptRow(ids=(5, 6, 7), reference=(1, 3)),
    PromptRow(ids=(8,), reference=(0, 0)),
    PromptRow(ids=(4, 9, 6, 3, 7), reference=(2, 5)),
]
LENGTH = 6


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> tuple[ConditionalLM, dict]:
    config = preset(request.param, vocab_size=12, width=16, heads=2, head_dim=8, mlp=24, **SIZES[request.param])
    lm = language_model(config)
    # Larger than at the start, so that distributions are far from uniform and depend on what was said before.
    return lm, jax.tree.map(lambda leaf: 1.4 * leaf, lm.init(jax.random.key(1)))


def _sample(model: tuple[ConditionalLM, dict], prompts: Prompts, keys: jax.Array, temperature: float) -> Samples:
    sampling = Sampling(temperature=temperature)
    return generate(*model, prompts, keys, sampling, max_new=LENGTH, eos_ids=(1, 2), pad_id=0)


def test_sampler_and_trainer_agree_on_logp(model: tuple[ConditionalLM, dict]) -> None:
    lm, params = model
    prompts, keys = rows_to_prompts(ROWS, 5, 0), jax.random.split(jax.random.key(2), 3)
    for temperature in (0.0, 1.0):
        samples = _sample(model, prompts, keys, temperature)
        scores = lm.logprobs(params, jax.tree.map(jnp.asarray, with_samples(prompts, samples)))
        np.testing.assert_allclose(samples.logp, scores.logp, atol=1e-5)
        if temperature == 0.0:
            np.testing.assert_array_equal(scores.correct, np.asarray(samples.mask, np.float32))


def test_a_sample_depends_neither_on_its_mates_nor_on_padding(model: tuple[ConditionalLM, dict]) -> None:
    keys = jax.random.split(jax.random.key(3), 3)
    together = _sample(model, rows_to_prompts(ROWS, 5, 0), keys, 1.0)
    other = _sample(model, rows_to_prompts(ROWS[:0:-1], 8, 0), keys[:0:-1], 1.0)
    for row in (1, 2):
        np.testing.assert_array_equal(other.tokens[2 - row], together.tokens[row])
        np.testing.assert_allclose(other.logp[2 - row], together.logp[row], atol=1e-5)
