"""Tiny models of transformers, drawn anew, against ours with the same parameters: logits, scores, greedy decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from pit_jax.core.types import Conditional, Params, Prompts
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder

from ..models import hf_mapping

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
VOCABULARY, PAD, START = 60, 0, 0
NEW = 32
PROMPTS, RESPONSES = (11, 7, 3), (13, 5, 9)
"""Lengths of the rows: longer than the windows, padded on the right in both halves."""

SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    pad_token_id=PAD,
    eos_token_id=None,
)
WINDOW = 5
ROPE = dict(rope_type="default", rope_theta=500.0)
GEMMA2 = dict(
    num_hidden_layers=4,
    sliding_window=WINDOW,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)
T5_SHAPE = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=12,
    d_ff=40,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    decoder_start_token_id=START,
    pad_token_id=PAD,
    eos_token_id=None,
)
QWEN2 = SHAPE | dict(head_dim=8)
"""Its head width is always hidden_size / num_attention_heads."""

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**QWEN2, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE | dict(num_key_value_heads=1)),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE | GEMMA2),
    "t5_1_0": lambda: transformers.T5Config(**T5_SHAPE, feed_forward_proj="relu"),
    "t5_1_1": lambda: transformers.T5Config(**T5_SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
WRITERS = ("o_proj.weight", "down_proj.weight", ".o.weight", ".wo.weight")
"""Matrices whose products are added to the residual stream."""
MODELS = pytest.mark.parametrize("name", CONFIGS)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers, and ours with its parameters."""

    theirs: transformers.PreTrainedModel
    lm: DecoderOnly | EncoderDecoder
    params: Params

    @property
    def encodes(self) -> bool:
        """Whether the prompt has an encoder of its own."""
        return isinstance(self.lm, EncoderDecoder)


@functools.cache
def _pair(name: str) -> Pair:
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    encodes = config.is_encoder_decoder
    theirs = (transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM).from_config(config)
    if encodes and not config.scale_decoder_outputs:
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    _randomise(theirs)
    hf = config.to_dict()
    weights = {key: value.numpy() for key, value in theirs.eval().state_dict().items()}
    if encodes:
        ours = dataclasses.replace(hf_mapping.encoder_decoder_config(hf), logprob_chunk=16)
        return Pair(theirs, EncoderDecoder(ours), hf_mapping.encoder_decoder_params(ours, weights))
    ours = dataclasses.replace(hf_mapping.decoder_only_config(hf), logprob_chunk=16)
    return Pair(theirs, DecoderOnly(ours), hf_mapping.decoder_only_params(ours, weights))


def _randomise(model: transformers.PreTrainedModel) -> None:
    """Move norms and biases away from where they start, and draw matrices at the scale of their input.

    Embeddings are smaller and what layers write into the residual stream is larger, or else tied models only repeat
    the token they read. T5 scales the logits instead of the embeddings.
    """
    source = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            scale = parameter.shape[-1] ** -0.5
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            elif parameter is embedding:
                parameter.copy_(noise * (0.4 if model.config.is_encoder_decoder else 0.4 * scale))
            else:
                parameter.copy_(noise * (2 * scale if name.endswith(WRITERS) else scale))


def _rows(lengths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(2, VOCABULARY, length, dtype=np.int32) for length in lengths]


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask), padded on the right."""
    width = max(map(len, rows))
    mask = np.arange(width)[None, :] < np.array([len(row) for row in rows])[:, None]
    ids = np.full(mask.shape, PAD, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def _their_logits(pair: Pair, prompts: list[np.ndarray], responses: list[np.ndarray]) -> list[np.ndarray]:
    """Return, for each row, the logits at every token it knows (encoder-decoder: at every response token)."""
    if pair.encodes:
        inputs, seen = _padded(prompts)
        decoded, kept = _padded([np.concatenate([[START], row[:-1]]).astype(np.int32) for row in responses])
        more = {"decoder_input_ids": torch.from_numpy(decoded).long()}
    else:
        inputs, seen = _padded([np.concatenate(row) for row in zip(prompts, responses, strict=True)])
        kept, more = seen, {}
    with torch.no_grad():
        out = pair.theirs(torch.from_numpy(inputs).long(), attention_mask=torch.from_numpy(seen).long(), **more)
    return [row[mask] for row, mask in zip(out.logits.numpy(), kept, strict=True)]


def _conditional(prompts: list[np.ndarray], responses: list[np.ndarray]) -> Conditional:
    (prompt, seen), (response, trained) = _padded(prompts), _padded(responses)
    return Conditional(
        prompt=jnp.asarray(prompt),
        prompt_segments=jnp.asarray(seen, jnp.int32),
        prompt_reference=jnp.zeros(prompt.shape, bool),
        response=jnp.asarray(response),
        response_segments=jnp.asarray(trained, jnp.int32),
    )


def _our_logits(pair: Pair, x: Conditional) -> np.ndarray:
    """Return the logits at every column: prompt and response, or the response alone with an encoder."""
    prompt, response = jax.jit(lambda p, x: pair.lm.hidden(p, x, attention="causal"))(pair.params, x)
    states = np.asarray(response if pair.encodes else jnp.concatenate([prompt, response], axis=1))
    head = pair.params["embedding"]["token"].T if pair.lm.config.tied else pair.params["head"]
    logits = states @ np.asarray(head)
    if isinstance(pair.lm, EncoderDecoder):
        return logits * pair.lm.config.logit_scale
    cap = pair.lm.config.logit_softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


@MODELS
def test_logits_and_scores_equal(name: str) -> None:
    pair, prompts, responses = _pair(name), _rows(PROMPTS, 1), _rows(RESPONSES, 2)
    x = _conditional(prompts, responses)
    theirs = _their_logits(pair, prompts, responses)
    seen = np.asarray(x.response_segments if pair.encodes else np.hstack([x.prompt_segments, x.response_segments])) > 0
    ours = _our_logits(pair, x)[seen]
    assert np.std(ours) > 0.3
    np.testing.assert_allclose(ours, np.concatenate(theirs), atol=TOLERANCE, rtol=0)

    logp = jax.jit(pair.lm.logprobs)(pair.params, x).logp
    for row, (logits, response) in enumerate(zip(theirs, responses, strict=True)):
        # A decoder without an encoder predicts a token from the column before it.
        predicting = logits if pair.encodes else logits[len(prompts[row]) - 1 : -1]
        expected = torch.log_softmax(torch.from_numpy(predicting), -1).numpy()[np.arange(len(response)), response]
        np.testing.assert_allclose(logp[row, : len(response)], expected, atol=TOLERANCE, rtol=0)


@MODELS
def test_greedy_continuations_are_the_same(name: str) -> None:
    pair, prompts = _pair(name), _rows(PROMPTS, 3)
    ids, mask = _padded(prompts)
    samples = generate(
        pair.lm,
        pair.params,
        Prompts(tokens=jnp.asarray(ids), mask=jnp.asarray(mask), reference=jnp.zeros(mask.shape, bool)),
        jax.random.split(jax.random.key(0), len(prompts)),
        Sampling(temperature=0.0),
        max_new=NEW,
        # Beyond the vocabulary: never drawn, so that every row has its full length.
        eos_ids=(VOCABULARY,),
        pad_id=PAD,
    )
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, decoder_start_token_id=START
    )
    theirs = []
    for prompt in prompts:
        # Alone in its batch: transformers pads on the left to generate.
        row = torch.from_numpy(prompt)[None].long()
        out = pair.theirs.generate(row, attention_mask=torch.ones_like(row), generation_config=settings)
        theirs.append(out[0, -NEW:].numpy())
    assert len(np.unique(theirs)) > 4
    np.testing.assert_array_equal(samples.tokens, np.stack(theirs))
