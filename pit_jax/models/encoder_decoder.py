"""Encoder-decoder language models in the manner of T5 1.1."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.types import Conditional, Hidden, Params, Prompts, TokenScores
from pit_jax.models import functional, layers
from pit_jax.models.api import Attention
from pit_jax.models.config import ModelConfig
from pit_jax.ops import logprob, mask, relative_bias
from pit_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ModelConfig):
    """Architecture of an encoder-decoder model; the defaults are those of T5 1.1.

    encoder_layers, decoder_layers: N of each stack.
    relative_buckets, relative_max_distance: of T5's relative position bias, one table per stack.
    start_id: the token the decoder starts from (T5: the padding id).

    With `tied`, logits are scaled by D^-1/2 (T5 1.0); T5 1.1 has an output matrix of its own.
    """

    encoder_layers: int
    decoder_layers: int
    activation: str = "gelu_tanh"
    tied: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    start_id: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range, or contradicts another.
        """
        super().__post_init__()
        self.check_at_least("encoder_layers", 1)
        self.check_at_least("decoder_layers", 1)
        self.check_at_least("relative_buckets", 4)
        if self.relative_buckets % 4:
            raise self.bad("relative_buckets", "be a multiple of 4", "Half are for each side, half of those exact.")
        if self.relative_max_distance <= self.relative_buckets // 2:
            rule = f"be more than relative_buckets / 2 = {self.relative_buckets // 2}"
            raise self.bad("relative_max_distance", rule, "Nearer positions have buckets of their own.")
        if not 0 <= self.start_id < self.vocab_size:
            raise self.bad("start_id", f"lie in [0, {self.vocab_size})", "The padding id is usual.")

    def block(self, *, cross: bool) -> layers.BlockConfig:
        """The layers' settings: no scale on dot products, made up for by a smaller query projection."""
        return layers.BlockConfig(
            kv_heads=self.heads,
            norm_offset=0.0,
            qkv_bias=False,
            post_norms=False,
            cross=cross,
            attention_scale=1.0,
            softcap=None,
            query_std=(self.width * self.head_dim) ** -0.5,
            output_scale=1.0,
        )

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return self.width**-0.5 if self.tied else 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderCache:
    """The decoder's keys and values, a slot per position, and those of the encoder's states."""

    keys: Float[Array, "N B C H E"]
    values: Float[Array, "N B C H E"]
    prompt_keys: Float[Array, "N B S H E"]
    prompt_values: Float[Array, "N B S H E"]
    prompt_mask: Bool[Array, "B S"]
    slot: Int[Array, ""]


class RelativeBias(nnx.Module):
    """One learned number per bucket of relative position and head, added to the attention scores."""

    def __init__(self, key: jax.Array, config: EncoderDecoderConfig):
        """Draw the table with std D^-1/2."""
        shape = (config.relative_buckets, config.heads)
        self.table = layers.normal(key, shape, ("buckets", "heads"), config.width**-0.5, config)
        self.config = config

    def __call__(self, relative: Int[Array, "#B Q K"], *, bidirectional: bool) -> Float[Array, "#B H Q K"]:
        """Return the bias for relative positions = key position - query position."""
        buckets, distance = self.config.relative_buckets, self.config.relative_max_distance
        index = relative_bias.bucket(relative, bidirectional, buckets, distance)
        return jnp.moveaxis(jnp.take(self.table[...].astype(jnp.float32), index, axis=0), 3, 1)


class Stack(nnx.Module):
    """Encoder or decoder: blocks that share a relative position bias, and a final norm."""

    def __init__(self, key: jax.Array, config: EncoderDecoderConfig, *, decoder: bool):
        """Create the layers."""
        keys = jax.random.split(key, 2)
        self.config, self.decoder = config, decoder
        self.count = config.decoder_layers if decoder else config.encoder_layers
        self.relative_bias = RelativeBias(keys[0], config)
        block = config.block(cross=decoder)
        self.layers = functional.stacked(lambda one: layers.Block(one, config, block), keys[1], self.count)
        self.final_norm = layers.RMSNorm(config, 0.0)

    def bias(self, queries: Int[Array, "#B Q"], keys: Int[Array, "#B K"]) -> Float[Array, "#B H Q K"]:
        """Return the bias between positions; one row will do where all rows have the same differences."""
        relative = keys[:, None, :] - queries[:, :, None]
        return self.relative_bias(relative, bidirectional=not self.decoder)

    def run(
        self,
        x: Float[Array, "B L D"],
        sight: layers.Sight,
        encoded: tuple[Float[Array, "B S D"], layers.Sight] | None,
        key: jax.Array | None,
    ) -> Float[Array, "B L D"]:
        """Return the final states of whole rows; a decoder gets the encoder's states and what it sees of them."""

        def body(block: layers.Block, x: Array, key: jax.Array | None) -> tuple[Array, None]:
            queries, known = block.look(x, None)
            cross = None
            if encoded is not None:
                cross = layers.Cross(block.cross.keys_values(encoded[0], None), encoded[1])
            x = block.finish(x, queries, known, sight, cross, key)
            return constrain(x, ("batch", "length", None)), None

        return self.final_norm(self.each(body, x, layers.layer_keys(key, self.count))[0])

    def prompt_memory(self, encoded: Float[Array, "B S D"]) -> layers.KeysValues:
        """Return every layer's keys and values of the encoder's states, `[N, B, S, H, E]`."""

        def body(block: layers.Block, carry: None, inputs: None) -> tuple[None, layers.KeysValues]:
            return None, block.cross.keys_values(encoded, None)

        return self.each(body, None, None)[1]

    def extend(
        self, cache: EncoderDecoderCache, x: Float[Array, "B 1 D"]
    ) -> tuple[Float[Array, "B D"], EncoderDecoderCache]:
        """Return the final states of one new token per row, and the cache that knows it."""
        slots = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)[None, :]
        here = cache.slot[None, None]
        sight = layers.Sight(mask.causal(here, slots), self.bias(here, slots))
        prompt_sight = layers.Sight(cache.prompt_mask[:, None, None, :], None)

        def body(block: layers.Block, carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, keys, values), (index, prompt) = carry, inputs
            queries, new = block.look(x, None)
            # The whole cache is carried and written in place: one slot is written, one layer read.
            keys = jax.lax.dynamic_update_slice(keys, new.keys[None], (index, 0, cache.slot, 0, 0))
            values = jax.lax.dynamic_update_slice(values, new.values[None], (index, 0, cache.slot, 0, 0))
            known = layers.KeysValues(*(jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (keys, values)))
            x = block.finish(x, queries, known, sight, layers.Cross(prompt, prompt_sight), None)
            return (x, keys, values), None

        index = np.arange(self.count, dtype=np.int32)
        inputs = (index, layers.KeysValues(cache.prompt_keys, cache.prompt_values))
        (x, keys, values), _ = self.each(body, (x, cache.keys, cache.values), inputs)
        return self.final_norm(x)[:, 0], dataclasses.replace(cache, keys=keys, values=values, slot=cache.slot + 1)

    def each(self, body, carry, inputs):
        """Call `body` for each layer."""
        config = self.config
        return functional.run_layers(self.layers, body, carry, inputs, scan=config.scan_layers, remat=config.remat)


class EncoderDecoderNet(nnx.Module):
    """Shared embedding, encoder, decoder, and the output matrix unless it is tied."""

    def __init__(self, key: jax.Array, config: EncoderDecoderConfig):
        """Draw embeddings with std 1 and the output matrix with std D^-1/2, as T5X does."""
        keys = jax.random.split(key, 4)
        self.config = config
        self.embedding = layers.Embedding(keys[0], config, 1.0, None)
        self.encoder = Stack(keys[1], config, decoder=False)
        self.decoder = Stack(keys[2], config, decoder=True)
        if not config.tied:
            shape, std = (config.width, config.vocab_size), config.width**-0.5
            self.head = layers.normal(keys[3], shape, ("embed", "vocab"), std, config)

    def output_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix from hidden states to logits."""
        return self.embedding.token[...].T if self.config.tied else self.head[...]

    def embed(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the input of the first layer."""
        return constrain(self.embedding(row, 1.0, key), ("batch", "length", None))

    def encode(self, row: layers.Row, key: jax.Array | None, *, contiguous: bool) -> Float[Array, "B L D"]:
        """Return the encoder's states of a row.

        Where segments are contiguous runs, differences of positions are differences of columns, so that one bias
        serves all rows; it is a B-th of the size.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        columns = jnp.arange(row.tokens.shape[1], dtype=jnp.int32)[None, :]
        positions = columns if contiguous else row.positions
        sight = layers.Sight(mask.same_segment(row.segments, row.segments), self.encoder.bias(positions, positions))
        return self.encoder.run(self.embed(row, keys[0]), sight, None, keys[1])

    def decode(
        self, prompt: layers.Row, encoded: Float[Array, "B S D"], response: layers.Row, key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """Return the decoder's states: at each response token, of the tokens before it."""
        keys = (None, None) if key is None else jax.random.split(key)
        columns = jnp.arange(response.tokens.shape[1], dtype=jnp.int32)[None, :]
        seen = mask.same_segment(response.segments, response.segments) & mask.causal(columns, columns)
        sight = layers.Sight(seen, self.decoder.bias(columns, columns))
        across = layers.Sight(mask.same_segment(response.segments, prompt.segments), None)
        x = self.embed(layers.shift_right(response, self.config.start_id), keys[0])
        return self.decoder.run(x, sight, (encoded, across), keys[1])


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder model as a `ConditionalLM`: it encodes the prompt and decodes the response."""

    config: EncoderDecoderConfig

    def init(self, key: jax.Array) -> Params:
        """Return fresh parameters."""
        return functional.initialise(EncoderDecoderNet, self.config, key)

    def abstract(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return functional.definition(EncoderDecoderNet, self.config).shapes

    def axes(self) -> Params:
        """Return the parameters' logical axis names."""
        return functional.definition(EncoderDecoderNet, self.config).axes

    def hidden(self, params: Params, x: Conditional, key: jax.Array | None = None, *, attention: Attention) -> Hidden:
        """Return final states: the encoder's of `[prompt | response]` when bidirectional, else of both stacks.

        Causal: the encoder's states of the prompt, which see no response, and the decoder's states of the
        response, each of which has seen the tokens before its own.
        """
        net = self._bind(params)
        if attention == "bidirectional":
            states = net.encode(layers.joint_row(x), key, contiguous=False)
            return Hidden(states[:, : x.prompt.shape[1]], states[:, x.prompt.shape[1] :])
        keys = (None, None) if key is None else jax.random.split(key)
        prompt = layers.prompt_row(x.prompt, x.prompt_segments, x.prompt_reference)
        encoded = net.encode(prompt, keys[0], contiguous=True)
        response = layers.response_row(x.response, x.response_segments)
        return Hidden(encoded, net.decode(prompt, encoded, response, keys[1]))

    def predictors(self, params: Params, x: Conditional, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Return the decoder's states, each of which predicts the token at its place."""
        return self.hidden(params, x, key, attention="causal").response

    def logprobs(self, params: Params, x: Conditional, key: jax.Array | None = None) -> TokenScores:
        """Return the scores of each response token."""
        scores = logprob.token_scores(
            self.predictors(params, x, key),
            self._bind(params).output_matrix(),
            x.response,
            chunk=self.config.logprob_chunk,
            scale=self.config.logit_scale,
        )
        return layers.zero_padding(scores, x.response_segments)

    def prefill(
        self, params: Params, prompts: Prompts, max_new: int
    ) -> tuple[Float[Array, "B V"], EncoderDecoderCache]:
        """Return the logits of the first new token, and the cache."""
        net = self._bind(params)
        row = layers.prompt_row(prompts.tokens, prompts.mask.astype(jnp.int32), prompts.reference)
        memory = net.decoder.prompt_memory(net.encode(row, None, contiguous=True))
        layer, rows, _, heads, width = memory.keys.shape
        # One slot more than new tokens: the start token takes the first.
        empty = jnp.zeros((layer, rows, max_new + 1, heads, width), memory.keys.dtype)
        cache = EncoderDecoderCache(
            keys=empty,
            values=empty,
            prompt_keys=memory.keys,
            prompt_values=memory.values,
            prompt_mask=prompts.mask,
            slot=jnp.zeros((), jnp.int32),
        )
        return self.step(params, cache, jnp.full((rows,), self.config.start_id, jnp.int32))

    def step(
        self, params: Params, cache: EncoderDecoderCache, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], EncoderDecoderCache]:
        """Append one token to every row and return the logits of the next; the work is linear in the cache."""
        net = self._bind(params)
        tokens = token[:, None]
        # The decoder knows places by relative bias alone; segments and positions are the cache's business here.
        row = layers.Row(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens), jnp.full_like(tokens, layers.RESPONSE))
        state, cache = net.decoder.extend(cache, net.embed(row, None))
        return layers.logits(state, net.output_matrix(), self.config.logit_scale, None), cache

    def _bind(self, params: Params) -> EncoderDecoderNet:
        return functional.bind(EncoderDecoderNet, self.config, params)
