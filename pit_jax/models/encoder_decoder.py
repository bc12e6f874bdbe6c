"""Encoder-decoder language models in the manner of T5 1.0, T5 1.1, mT5 and umT5."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pit_jax.models import attending, caches, functional, layers, sharing
from pit_jax.models.caches import Cache
from pit_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from pit_jax.ops import mask, relative_bias
from pit_jax.ops.sight import Order, Tokens
from pit_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Seq2SeqConfig):
    """Architecture of an encoder-decoder model; the defaults are those of T5 1.1.

    relative_buckets, relative_max_distance: of T5's relative position bias.
    relative_per_layer: each layer has a table of its own (umT5) instead of one per stack.
    scale_logits: scale the logits by D^-1/2; by default where they are `tied` (T5 1.0). T5 1.1 has an output matrix
      of its own.

    T5 1.0 is `activation = "relu"`, `gated = False`, `tied = True`.
    """

    activation: str = "gelu_tanh"
    tied: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    scale_logits: bool | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range, or contradicts another.
        """
        super().__post_init__()
        self.check_at_least("relative_buckets", 4)
        if self.relative_buckets % 4:
            raise self.bad("relative_buckets", "be a multiple of 4", "Half are for each side, half of those exact.")
        if self.relative_max_distance <= self.relative_buckets // 2:
            rule = f"be more than relative_buckets / 2 = {self.relative_buckets // 2}"
            raise self.bad("relative_max_distance", rule, "Nearer positions have buckets of their own.")

    def block(self, *, cross: bool) -> layers.BlockConfig:
        """The layers' settings: no scale on dot products, made up for by a smaller query projection."""
        return layers.BlockConfig(
            kv_heads=self.heads,
            norm_offset=0.0,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            post_norms=False,
            cross=self.width if cross else None,
            attention_scale=1.0,
            softcap=None,
            qk_norm=False,
            relative_buckets=self.relative_buckets if self.relative_per_layer else None,
            query_std=(self.width * self.head_dim) ** -0.5,
            output_scale=1.0,
        )

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        scaled = self.tied if self.scale_logits is None else self.scale_logits
        return self.width**-0.5 if scaled else 1.0


class Stack(nnx.Module):
    """Encoder or decoder: blocks, the relative position bias that they share or have one each of, and a final norm."""

    def __init__(self, key: jax.Array, config: EncoderDecoderConfig, *, decoder: bool):
        """Create the layers."""
        keys = jax.random.split(key, 2)
        self.config, self.decoder = config, decoder
        self.count = config.decoder_layers if decoder else config.encoder_layers
        if not config.relative_per_layer:
            self.relative_bias = layers.RelativeBias(keys[0], config, config.relative_buckets)
        block = config.block(cross=decoder)
        self.layers = functional.stacked(lambda one: layers.Block(one, config, block), keys[1], self.count)
        self.final_norm = layers.RMSNorm(config.width, config, 0.0)

    def bias(self, queries: Int[Array, "#B Q"], keys: Int[Array, "#B K"]) -> layers.Bias:
        """Return the bias between positions; one row will do where all rows have the same differences."""
        relative = keys[:, None, :] - queries[:, :, None]
        settings = self.config.relative_buckets, self.config.relative_max_distance
        buckets = relative_bias.bucket(relative, not self.decoder, *settings)
        if self.config.relative_per_layer:
            return layers.Bias(None, buckets)
        return layers.Bias(self.relative_bias(buckets), None)

    def run(
        self,
        x: Float[Array, "B L D"],
        scene: attending.Scene,
        bias: layers.Bias,
        encoded: tuple[Float[Array, "B S D"], attending.Scene] | None,
        key: jax.Array | None,
    ) -> Float[Array, "B L D"]:
        """Return the final states of whole rows; a decoder gets the encoder's states and what it sees of them."""

        def body(block: layers.Block, x: Array, key: jax.Array | None) -> tuple[Array, None]:
            queries, known = block.look(x, None)
            cross = None
            if encoded is not None:
                cross = layers.Cross(block.cross.keys_values(encoded[0], None), layers.Sight(encoded[1]))
            x = block.finish(x, queries, known, block.sight(scene, None, bias), cross, key)
            return constrain(x, ("batch", "length", None)), None

        return self.final_norm(self.each(body, x, layers.layer_keys(key, self.count))[0])

    def prompt_memory(self, encoded: Float[Array, "B S D"]) -> layers.KeysValues:
        """Return every layer's keys and values of the encoder's states, `[N, B, S, H, E]`."""

        def body(block: layers.Block, carry: None, inputs: None) -> tuple[None, layers.KeysValues]:
            return None, block.cross.keys_values(encoded, None)

        return self.each(body, None, None)[1]

    def extend(self, cache: Cache, x: Float[Array, "B Q D"]) -> tuple[Float[Array, "B Q D"], Cache]:
        """Return the final states of each row's next tokens, and the cache in which they are written."""
        new = x.shape[1]
        # Places are counted from the next token. Where rows keep step they are the same in all: one bias serves them.
        here, there = jnp.arange(new, dtype=jnp.int32)[None, :], cache.ahead(new)
        scene = attending.Masks(cache.known(new)[:, None, None, :] & mask.causal(here, there))
        bias = self.bias(here, there)
        across = layers.Sight(attending.Masks((cache.prompt_places < caches.NEVER)[:, None, None, :]))

        def body(block: layers.Block, carry: tuple, layer: tuple) -> tuple:
            (x, own), (index, _, prompt) = carry, layer
            queries, new = block.look(x, None)
            own, known = caches.remember(own, new, index, cache.slot)
            cross = layers.Cross((prompt,), across)
            return block.finish(x, queries, (known,), block.sight(scene, None, bias), cross, None), own

        scan, parts = self.config.scan_layers, cache.layers(np.zeros(self.count, bool))
        x, own = functional.walk_layers(self.layers, body, (x, cache.own), parts, scan=scan)
        return self.final_norm(x), dataclasses.replace(cache, own=own)

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
            self.head = layers.output_head(keys[3], config)

    def output_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix from hidden states to logits; with an adapter W + s A B, one product `[D, V]`."""
        return self.embedding.token[...].T if self.config.tied else layers.output_matrix(self.head)

    def embed(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the input of the first layer."""
        return constrain(self.embedding(row, 1.0, key), ("batch", "length", None))

    def encode(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the encoder's states of a row whose segments are runs of columns.

        Differences of positions are then differences of columns: one bias, a B-th of the size, serves all rows.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        columns = jnp.arange(row.tokens.shape[1], dtype=jnp.int32)[None, :]
        tokens, order = layers.tokens(row), Order(causal=False)
        scene = attending.scene("xla", tokens, tokens, order)
        return self.encoder.run(self.embed(row, keys[0]), scene, self.encoder.bias(columns, columns), None, keys[1])

    def decode(
        self, prompt: layers.Row, encoded: Float[Array, "B S D"], inputs: layers.Row, key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """Return the decoder's states of its inputs (`layers.shift_right` makes them of responses)."""
        keys = (None, None) if key is None else jax.random.split(key)
        columns = jnp.arange(inputs.tokens.shape[1], dtype=jnp.int32)[None, :]
        tokens = Tokens(inputs.segments, columns)
        # Kernels know no relative position bias; where the decoder looks at the encoder's states there is none.
        scene = attending.scene("xla", tokens, tokens, Order(causal=True))
        form = attending.form(self.config, prompt.tokens.shape[1], softcap=None, bias=False)
        looking = sharing.gathered(tokens, prompt.tokens.shape[0])
        across = attending.scene(form, looking, layers.tokens(prompt), Order(causal=False))
        bias = self.decoder.bias(columns, columns)
        return self.decoder.run(self.embed(inputs, keys[0]), scene, bias, (encoded, across), keys[1])

    def recall(self, encoded: Float[Array, "B S D"]) -> layers.KeysValues:
        """Return every decoder layer's keys and values of the encoder's states, `[N, B, S, H, E]`."""
        return self.decoder.prompt_memory(encoded)

    def extend(self, cache: Cache, tokens: Int[Array, "B Q"]) -> tuple[Float[Array, "B Q D"], Cache]:
        """Return the states of each row's next tokens, and the cache in which they are written."""
        # The decoder knows places by relative bias alone; segments and positions are the cache's business here.
        row = layers.Row(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens), jnp.full_like(tokens, layers.RESPONSE))
        return self.decoder.extend(cache, self.embed(row, None))


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(Seq2Seq):
    """A T5 as a `ConditionalLM`."""

    config: EncoderDecoderConfig
    net = EncoderDecoderNet
