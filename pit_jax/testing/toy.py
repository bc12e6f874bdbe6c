"""A language model and two reward models so small that every response can be enumerated."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.core.types import Conditional, Params, Prompts, TokenScores
from pit_jax.models.output import Output
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates

PAD, EOS, OTHER_EOS, VOCAB = 0, 1, 2, 6


class ToyCache(NamedTuple):
    """What a step needs: the logits that the prompt adds to every position."""

    context: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyLM:
    """p(y_t | x, y_<t) = softmax(table[y_{t-1}] + sum over x of prompt[x_s] / |x|); y_{-1} is the last prompt token."""

    vocab: int = VOCAB

    def init(self, key: jax.Array) -> Params:
        """Return random tables."""
        table, prompt = jax.random.split(key)
        shape = (self.vocab, self.vocab)
        return {"table": jax.random.normal(table, shape), "prompt": 2.0 * jax.random.normal(prompt, shape)}

    def _context(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        weight = mask.astype(jnp.float32)
        total = jnp.einsum("bs,bsv->bv", weight, params["prompt"][tokens])
        return total / jnp.sum(weight, axis=1, keepdims=True)

    def _last(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        index = jnp.sum(mask, axis=1) - 1
        return jnp.take_along_axis(tokens, index[:, None], axis=1)[:, 0]

    def prefill(
        self, params: Params, prompts: Prompts, max_new: int, samples: int = 1, tried: int = 0
    ) -> tuple[jax.Array, ToyCache]:
        """Return the logits of the first response token and the cache, for `samples` rows a prompt."""
        context = self._context(params, prompts.tokens, prompts.mask)
        logits = params["table"][self._last(prompts.tokens, prompts.mask)] + context
        return jnp.repeat(logits, samples, axis=0), ToyCache(jnp.repeat(context, samples, axis=0))

    def admit(self, cache: ToyCache, new: ToyCache, rows: jax.Array) -> ToyCache:
        """Return the cache with the rows of another in the place of some of its own."""
        return ToyCache(cache.context.at[rows].set(new.context, mode="drop"))

    def ready(self, params: Params) -> Params:
        """Return the parameters."""
        return params

    def step(self, params: Params, cache: ToyCache, token: jax.Array) -> tuple[jax.Array, ToyCache]:
        """Return the logits after `token`."""
        return params["table"][token] + cache.context, cache

    def extend(self, params: Params, cache: ToyCache, tokens: jax.Array) -> tuple[jax.Array, ToyCache]:
        """Return the logits after each token; the cache knows nothing of them."""
        return params["table"][tokens] + cache.context[:, None, :], cache

    def keep(self, cache: ToyCache, kept: jax.Array) -> ToyCache:
        """Return the cache."""
        return cache

    def predictors(self, params: Params, x: Conditional, key: jax.Array | None = None) -> jax.Array:
        """Return the logits of every response token, which are the states of this model."""
        context = self._context(params, x.prompt, x.prompt_segments > 0)
        last = self._last(x.prompt, x.prompt_segments > 0)
        before = jnp.concatenate([last[:, None], x.response[:, :-1]], axis=1)
        return params["table"][before] + context[:, None, :]

    def output(self, params: Params) -> Output:
        """Return a head that leaves states as they are."""
        return Output(jnp.eye(self.vocab), self.vocab, None, 1.0)

    def logprobs(self, params: Params, x: Conditional, key: jax.Array | None = None) -> TokenScores:
        """Return the scores of every response token, by the textbook."""
        mask, logits = x.response_segments > 0, self.predictors(params, x)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        logp = jnp.take_along_axis(logits, x.response[..., None], axis=-1)[..., 0] - log_z
        every = jax.nn.log_softmax(logits, axis=-1)
        entropy = jax.lax.stop_gradient(-jnp.sum(jnp.exp(every) * every, axis=-1))
        correct = (jnp.argmax(logits, axis=-1) == x.response).astype(jnp.float32)
        return TokenScores(*(jnp.where(mask, part, 0.0) for part in (logp, log_z, entropy, correct)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyReward:
    """Mean worth of the response's tokens, minus that of the reference's where the prompt has one."""

    def scores(self, params: Params, x: Conditional, count: int) -> jax.Array:
        """Return f32[B, 1]."""
        reference = self._mean(params, x.prompt, x.prompt_reference)
        return (self._mean(params, x.response, x.response_segments > 0) - reference)[:, None]

    def _mean(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        weight = mask.astype(jnp.float32)
        return jnp.sum(params["worth"][tokens] * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


def worth(seed: int) -> Params:
    """Return parameters of `ToyReward`."""
    return {"worth": jax.random.normal(jax.random.key(seed), (VOCAB,))}


@dataclasses.dataclass(frozen=True)
class ToyTokenizer:
    """Digits are tokens."""

    bos_id: int | None = None
    vocab_size: int = VOCAB
    pad_id: int = PAD
    eos_ids: tuple[int, ...] = (EOS, OTHER_EOS)

    def encode(self, text: str) -> list[int]:
        """Return the digits."""
        return [int(digit) for digit in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the digits as text."""
        return "".join(str(token) for token in ids)

    def fingerprint(self) -> str:
        """Return a constant."""
        return "toy"

    def save(self, directory: object) -> None:
        """Write nothing: there is nothing to load."""


def toy_codec(*, inputs: int, targets: int, bos_id: int | None = None) -> Codec:
    """Return a codec whose templates are the prompt, the token 3 and the reference, without BOS."""
    templates = Templates(policy="{prompt}", improver="{prompt}3{reference}", gap="{prompt}3{reference}", bos=False)
    return Codec(ToyTokenizer(bos_id), templates, Lengths(inputs=inputs, targets=targets))


def all_responses(length: int, eos_ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return every response of at most `length` tokens: those an EOS ends, and those cut off."""
    plain = [token for token in range(VOCAB) if token not in eos_ids]
    ended = [(*body, eos) for n in range(length) for body in itertools.product(plain, repeat=n) for eos in eos_ids]
    return ended + list(itertools.product(plain, repeat=length))


def conditional(prompt: list[int], rows: list[tuple[int, ...]], width: int, length: int) -> Conditional:
    """Return the rows as responses to one prompt."""
    tokens = np.full((len(rows), length), PAD, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = 1
    padded = np.array(prompt + [PAD] * (width - len(prompt)), np.int32)
    present = np.array([1] * len(prompt) + [0] * (width - len(prompt)), np.int32)
    return Conditional(
        prompt=jnp.tile(padded, (len(rows), 1)),
        prompt_segments=jnp.tile(present, (len(rows), 1)),
        prompt_reference=jnp.zeros((len(rows), width), bool),
        response=jnp.asarray(tokens),
        response_segments=jnp.asarray(mask),
    )
