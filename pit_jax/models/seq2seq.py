"""What all encoder-decoders are as conditional language models: they encode the prompt and decode the response."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.types import Conditional, Hidden, Params, Prompts, TokenScores
from pit_jax.models import caches, functional, layers, sharing
from pit_jax.models.api import Attention
from pit_jax.models.caches import Cache
from pit_jax.models.config import ModelConfig
from pit_jax.models.output import Output
from pit_jax.ops import logprob, shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(ModelConfig):
    """Fields of every encoder-decoder.

    encoder_layers, decoder_layers: N of each stack.
    start_id: the token the decoder starts from.
    """

    encoder_layers: int
    decoder_layers: int
    start_id: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range.
        """
        super().__post_init__()
        self.check_at_least("encoder_layers", 1)
        self.check_at_least("decoder_layers", 1)
        if not 0 <= self.start_id < self.vocab_size:
            raise self.bad("start_id", f"lie in [0, {self.vocab_size})", "T5 has the padding id, Gemma bos.")

    @property
    def logit_scale(self) -> float:
        """Factor of the logits, before they are capped."""
        return 1.0

    @property
    def logit_cap(self) -> float | None:
        """Bound of the logits."""
        return None


class Seq2SeqNet(Protocol):
    """The network behind a `Seq2Seq`."""

    def output_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix from hidden states to logits."""
        ...

    def encode(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L De"]:
        """Return the encoder's states of a row whose segments are runs of columns."""
        ...

    def decode(
        self, prompt: layers.Row, encoded: Float[Array, "B S De"], inputs: layers.Row, key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """Return the decoder's states of its inputs (`layers.shift_right` makes them of responses).

        Successive rows of inputs may share a prompt.
        """
        ...

    def recall(self, encoded: Float[Array, "B S De"]) -> layers.KeysValues:
        """Return every decoder layer's keys and values of the encoder's states, `[N, B, S, Kh, E]`."""
        ...

    def extend(self, cache: Cache, tokens: Int[Array, "B Q"]) -> tuple[Float[Array, "B Q D"], Cache]:
        """Return the states of each row's next tokens, and the cache with them; the encoder's are its prompts."""
        ...


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """An encoder-decoder model as a `ConditionalLM`; families say which network it is."""

    config: Seq2SeqConfig
    net: ClassVar[Callable[[jax.Array, Any], Any]]

    def init(self, key: jax.Array) -> Params:
        """Return fresh parameters."""
        return functional.initialise(self.net, self.config, key)

    def abstract(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return functional.definition(self.net, self.config).shapes

    def axes(self) -> Params:
        """Return the parameters' logical axis names."""
        return functional.definition(self.net, self.config).axes

    def hidden(self, params: Params, x: Conditional, key: jax.Array | None = None, *, attention: Attention) -> Hidden:
        """Return final states: the encoder's of `[prompt | response]` when bidirectional, else of both stacks.

        Causal: the encoder's states of the prompt, which see no response, and the decoder's states of the
        response, each of which has seen the tokens before its own.
        """
        net, (x, columns) = self._bind(params), shared.whole(x)
        if attention == "bidirectional":
            # Where prompts see their responses, nothing can be shared.
            x = shared.apart(x)
            row, places = layers.compact(layers.joint_row(x))
            states = layers.gather(net.encode(row, key), places)
            split = x.prompt.shape[1]
            return sharing.laid_out(Hidden(states[:, :split], states[:, split:]), columns)
        keys = (None, None) if key is None else jax.random.split(key)
        prompt = layers.prompt_row(x.prompt, x.prompt_segments, x.prompt_reference)
        encoded = net.encode(prompt, keys[0])
        response = layers.response_row(x.response, x.response_segments)
        inputs = layers.shift_right(response, self.config.start_id)
        return sharing.laid_out(Hidden(encoded, net.decode(prompt, encoded, inputs, keys[1])), columns)

    def predictors(self, params: Params, x: Conditional, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Return the decoder's states, each of which predicts the token at its place."""
        return self.hidden(params, x, key, attention="causal").response

    def logprobs(self, params: Params, x: Conditional, key: jax.Array | None = None) -> TokenScores:
        """Return the scores of each response token."""
        return self.output(params).scores(self.predictors(params, x, key), x)

    def output(self, params: Params) -> Output:
        """Return the head that scores tokens."""
        config, matrix = self.config, self._bind(params).output_matrix()
        return Output(matrix, config.logprob_chunk, config.logit_cap, config.logit_scale)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        decoder_tokens: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Return the float32 logits after each of the decoder's tokens, all of V at once: for inspection and parity.

        Args:
          params: the parameters.
          tokens: of the prompts, padded on either side.
          mask: true where there is one.
          decoder_tokens: what the decoder reads, its start token first; padding only at the end.
        """
        net = self._bind(params)
        prompt = layers.prompt_row(tokens, mask.astype(jnp.int32), jnp.zeros_like(mask))
        encoded = net.encode(prompt, None)
        inputs = layers.response_row(decoder_tokens, jnp.ones_like(decoder_tokens))
        return self._logits(net, net.decode(prompt, encoded, inputs, None))

    def prefill(
        self, params: Params, prompts: Prompts, max_new: int, samples: int = 1, tried: int = 0
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Return the logits of the first new token of `samples` rows a prompt, and the cache."""
        net, mask = self._bind(params), prompts.mask
        row = layers.prompt_row(prompts.tokens, mask.astype(jnp.int32), prompts.reference)
        known, places = net.recall(net.encode(row, None)), jnp.where(mask, 0, caches.NEVER)
        first = jnp.zeros(mask.shape[0], jnp.int32)
        # One slot more than new tokens: the start token takes the first.
        slots = max_new + 1
        cache = caches.begin(known, places, first, samples=samples, slots=slots, tried=tried, config=self.config)
        return self.step(params, cache, jnp.full(cache.count.shape, self.config.start_id, jnp.int32))

    def admit(self, cache: Cache, new: Cache, rows: Int[Array, " R"]) -> Cache:
        """Return the cache with the rows of another in the place of some of its own."""
        return caches.admit(cache, new, rows)

    def ready(self, params: Params) -> Params:
        """Return the parameters as a loop of `step` reads them fastest."""
        return functional.ready(params, dtype=self.config.dtype, scan=self.config.scan_layers)

    def step(self, params: Params, cache: Cache, token: Int[Array, " B"]) -> tuple[Float[Array, "B V"], Cache]:
        """Append one token to every row and return the logits of the next; the work is linear in the cache."""
        logits, cache = self.extend(params, cache, token[:, None])
        return logits[:, 0], cache.keep(1)

    def extend(self, params: Params, cache: Cache, tokens: Int[Array, "B Q"]) -> tuple[Float[Array, "B Q V"], Cache]:
        """Try the next tokens of every row: return the logits after each, and a cache that can `keep` them."""
        net = self._bind(params)
        states, cache = net.extend(cache, tokens)
        return self._logits(net, states), cache

    def keep(self, cache: Cache, kept: Int[Array, " B"]) -> Cache:
        """Return the cache that goes on after so many of the tokens that each row has tried."""
        return cache.keep(kept)

    def _bind(self, params: Params) -> Seq2SeqNet:
        return functional.bind(self.net, self.config, params)

    def _logits(self, net: Seq2SeqNet, states: Float[Array, "B *T D"]) -> Float[Array, "B *T V"]:
        config = self.config
        return logprob.logits(states, net.output_matrix(), softcap=config.logit_cap, scale=config.logit_scale)
