"""Logits equal those of transformers and T5X for the same weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.types import Conditional, Prompts
from pit_jax.models.convert.hf_load import load_hf
from pit_jax.models.encoder_decoder import EncoderDecoder

from . import hf_mapping

DATA = Path(__file__).parent.parent / "data"
WEIGHTS, RECORDED = DATA / "weights", DATA / "hf"
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma2"])
def test_scores_equal_transformers(name: str) -> None:
    lm, params = load_hf(RECORDED / name)
    reference = dict(np.load(RECORDED / name / "reference.npz"))
    ids, seen = jnp.asarray(reference["input_ids"]), reference["attention_mask"]
    split = 3
    segments = jnp.asarray(seen, jnp.int32)
    x = Conditional(
        prompt=ids[:, :split],
        prompt_segments=segments[:, :split],
        prompt_reference=jnp.zeros((len(ids), split), bool),
        response=ids[:, split:],
        response_segments=segments[:, split:],
    )
    scores = jax.jit(lm.logprobs)(params, x)
    expected = jax.nn.log_softmax(reference["logits"])[:, split - 1 : -1]
    expected = np.take_along_axis(expected, np.asarray(x.response)[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(scores.logp, np.where(seen[:, split:], expected, 0), atol=TOLERANCE, rtol=0)


def test_decoding_gives_transformers_logits() -> None:
    lm, params = load_hf(RECORDED / "llama3")
    reference = dict(np.load(RECORDED / "llama3" / "reference.npz"))
    ids, split = jnp.asarray(reference["input_ids"])[:1], 5
    prompt = ids[:, :split]
    prompts = Prompts(tokens=prompt, mask=jnp.ones_like(prompt, bool), reference=jnp.zeros_like(prompt, bool))
    logits, cache = lm.prefill(params, prompts, ids.shape[1] - split)
    step = jax.jit(lm.step)
    for column in range(split, ids.shape[1]):
        np.testing.assert_allclose(logits[0], reference["logits"][0, column - 1], atol=TOLERANCE, rtol=0)
        logits, cache = step(params, cache, ids[:, column])
    np.testing.assert_allclose(logits[0], reference["logits"][0, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prefix", ["", "packed_"])
def test_encoder_decoder_equals_t5x(prefix: str) -> None:
    hf, weights, reference = hf_mapping.load(WEIGHTS / "t5_1_1")
    config = hf_mapping.encoder_decoder_config(hf)
    lm, params = EncoderDecoder(config), hf_mapping.encoder_decoder_params(config, weights)
    prompt = jnp.asarray(reference[f"{prefix}encoder_input_tokens"])
    response = jnp.asarray(reference[f"{prefix}decoder_target_tokens"])
    if prefix:
        prompt_segments = jnp.asarray(reference["packed_encoder_segment_ids"])
        response_segments = jnp.asarray(reference["packed_decoder_segment_ids"])
    else:
        prompt_segments = jnp.asarray(prompt > 0, jnp.int32)
        response_segments = jnp.asarray(reference["decoder_loss_weights"], jnp.int32)
    x = Conditional(
        prompt=prompt,
        prompt_segments=prompt_segments,
        prompt_reference=jnp.zeros_like(prompt, bool),
        response=response,
        response_segments=response_segments,
    )
    hidden = jax.jit(lambda p, x: lm.hidden(p, x, attention="causal"))(params, x)
    trained = np.asarray(response_segments) > 0
    logits = np.asarray(hidden.response @ params["head"])
    np.testing.assert_allclose(logits[trained], reference[f"{prefix}logits"][trained], atol=TOLERANCE, rtol=0)
    if not prefix:
        seen = np.asarray(prompt) > 0
        np.testing.assert_allclose(hidden.prompt[seen], reference["encoded"][seen], atol=TOLERANCE, rtol=0)
