"""Test-only: the smallest models that have every feature, and batches written as lists."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.types import Conditional, Hidden, Params, Prompts, TokenScores
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import RopeScaling
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

VOCABULARY = 48
_SHAPE = dict(vocab_size=VOCABULARY, width=16, heads=2, head_dim=8, mlp=24, role_embedding=True, tied=False)
_DECODER = _SHAPE | dict(layers=2, kv_heads=1)

ROTARY = DecoderOnlyConfig(**_DECODER)
LEARNED = DecoderOnlyConfig(**_DECODER, position="learned", max_positions=32, qkv_bias=True, scan_layers=False)
WINDOWED = DecoderOnlyConfig(
    **_DECODER, window=3, global_every=2, post_norms=True, norm_offset=1.0, attention_softcap=5.0, logit_softcap=6.0
)
T5 = EncoderDecoderConfig(**_SHAPE, encoder_layers=2, decoder_layers=2, relative_buckets=8, relative_max_distance=16)

QWEN3 = DecoderOnlyConfig(
    **_DECODER,
    qk_norm=True,
    out_bias=True,
    mlp_bias=True,
    activation="gelu",
    rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=4, beta_fast=2.0, beta_slow=0.1),
)
GEMMA3 = DecoderOnlyConfig(
    **_DECODER | dict(layers=3),
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    window=3,
    global_layers=(1,),
    local_rope_base=100.0,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
)
T5X_DECODER = DecoderOnlyConfig(
    **_DECODER,
    position="relative",
    relative_buckets=8,
    relative_max_distance=16,
    attention_scale=1.0,
    scale_logits=True,
    prefix_lm=True,
)
UMT5 = dataclasses.replace(T5, relative_per_layer=True, scale_logits=True, scan_layers=False)

DECODERS = {
    "rotary": DecoderOnly(ROTARY),
    "learned": DecoderOnly(LEARNED),
    "windowed": DecoderOnly(WINDOWED),
    "qwen3": DecoderOnly(QWEN3),
    "gemma3": DecoderOnly(GEMMA3),
    "t5x_decoder": DecoderOnly(T5X_DECODER),
}
MODELS = DECODERS | {"t5": EncoderDecoder(T5), "umt5": EncoderDecoder(UMT5)}
FAMILIES = ["rotary", "t5"]


def slow_but(names: Iterable[str], *kept: str) -> list[Any]:
    """Return the parameters of a test; all but the kept ones, which take the same paths through the code, are slow."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Compiled once per model and shapes, for all tests of a process.
@functools.partial(jax.jit, static_argnums=0)
def everything(lm: ConditionalLM, params: Params, x: Conditional) -> tuple[TokenScores, Hidden, Hidden]:
    """Return `logprobs`, and `hidden` causal and bidirectional."""
    causal, bidirectional = (lm.hidden(params, x, attention=how) for how in ("causal", "bidirectional"))
    return lm.logprobs(params, x), causal, bidirectional


@functools.partial(jax.jit, static_argnums=0)
def logp(lm: ConditionalLM, params: Params, x: Conditional, key: jax.Array | None = None) -> jax.Array:
    """Return the log-probabilities of `lm.logprobs`."""
    return lm.logprobs(params, x, key).logp


def params(lm: ConditionalLM) -> Params:
    """Return random parameters, norm scales and biases too; arrays of its own for every caller, who may delete them."""
    return jax.tree.map(jnp.array, _drawn(lm))


@functools.cache
def _drawn(lm: ConditionalLM) -> Params:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(leaf.dtype), lm.abstract())


Example = tuple[list[int], list[int]]
"""Prompt and response."""


def batch(rows: list[list[Example]], prompts: int, responses: int, *, references: int = 0) -> Conditional:
    """Return rows of one or more examples, padded to the given widths.

    The last `references` tokens of every prompt are its reference.
    """
    shape, other = (len(rows), prompts), (len(rows), responses)
    prompt, prompt_segments, response, response_segments = (np.zeros(s, np.int32) for s in (shape, shape, other, other))
    reference = np.zeros(shape, bool)
    for row, examples in enumerate(rows):
        at, to = 0, 0
        for segment, (x, y) in enumerate(examples, start=1):
            prompt[row, at : at + len(x)], prompt_segments[row, at : at + len(x)] = x, segment
            response[row, to : to + len(y)], response_segments[row, to : to + len(y)] = y, segment
            at, to = at + len(x), to + len(y)
            reference[row, at - min(references, len(x)) : at] = True
    return Conditional(
        prompt=jnp.asarray(prompt),
        prompt_segments=jnp.asarray(prompt_segments),
        prompt_reference=jnp.asarray(reference),
        response=jnp.asarray(response),
        response_segments=jnp.asarray(response_segments),
    )


def prompts_of(x: Conditional) -> Prompts:
    """Return the prompts of an unpacked batch."""
    return Prompts(tokens=x.prompt, mask=x.prompt_segments > 0, reference=x.prompt_reference)


EXAMPLES: list[Example] = [
    ([1, 2, 3, 4, 5], [6, 7, 8]),
    ([9, 10], [11]),
    ([12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22]),
    ([23, 24, 25], [26, 27]),
]


def plain() -> Conditional:
    """Return `EXAMPLES`, one a row."""
    return batch([[example] for example in EXAMPLES], 6, 5, references=2)
