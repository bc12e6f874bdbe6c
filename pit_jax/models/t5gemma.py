"""Encoder-decoders made of Gemmas: T5Gemma (of Gemma 2, arXiv 2504.06225) and T5Gemma 2 (of Gemma 3), text only."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.errors import invalid
from pit_jax.models import attending, caches, functional, layers, sharing
from pit_jax.models.caches import Cache
from pit_jax.models.config import ModelConfig, RopeScaling
from pit_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from pit_jax.ops import mask, rotary
from pit_jax.ops.sight import Order
from pit_jax.sharding.rules import constrain

_NORM_OFFSET = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """Shape of an encoder's layers: D, H, Kh (a divisor of H), E and F."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range.
        """
        for name, value in vars(self).items():
            if value < 1:
                raise invalid(f"EncoderSize.{name}", value, "be at least 1", "Give a larger number.")
        _check_heads("EncoderSize", self.heads, self.kv_heads, self.head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5GemmaConfig(Seq2SeqConfig):
    """Architecture of a T5Gemma; sizes are the decoder's, and the encoder's too unless `encoder` says otherwise.

    All have norms before and after each sublayer whose weight is 1 + scale, rotary positions (not between decoder and
    encoder), embeddings multiplied by D^1/2, and no biases.

    kv_heads: Kh, a divisor of `heads`. encoder: shape of an encoder that differs (9B-2B).
    rope_base, rope_scaling, local_rope_base: as in `DecoderOnlyConfig`.
    qk_norm: RMS norms of each head's queries and keys, before they are turned (T5Gemma 2).
    merged_attention: the decoder attends to itself and to the encoder's states in one softmax, with the same matrices
      (T5Gemma 2), instead of in two sublayers.
    shared_embedding: both stacks read one table (T5Gemma 2); `tied` is about the output matrix and the decoder's.
    attention_scale: factor of the dot products, by default E^-1/2 of each stack.
    attention_softcap, logit_softcap: bounds of attention scores and of output logits (T5Gemma).
    window: decoder layers see only keys less than so many positions back, except that every `global_every`-th sees
      all (T5Gemma: 2, T5Gemma 2: 6; 0: none does).
    encoder_window: how many positions before and after its own an encoder layer sees, in the same layers. A published
      window w means (w, w) in transformers' T5Gemma (its authors' own code has (w - 1, w - 1)), and
      ((w - 1) // 2, w // 2), half of it on each side, in T5Gemma 2.
    """

    kv_heads: int
    encoder: EncoderSize | None = None
    activation: str = "gelu_tanh"
    start_id: int = 2
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None
    qk_norm: bool = False
    merged_attention: bool = False
    shared_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    encoder_window: tuple[int, int] | None = None
    global_every: int = 0

    def __post_init__(self) -> None:
        """Check every field; make lists from gin hashable.

        Raises:
          ConfigError: a field is out of range, or contradicts another.
        """
        super().__post_init__()
        self.check_at_least("kv_heads", 1)
        _check_heads("T5GemmaConfig", self.heads, self.kv_heads, self.head_dim)
        for name in ("rope_base", "local_rope_base", "attention_scale", "attention_softcap", "logit_softcap"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise self.bad(name, "be positive", "Give a positive number, or leave it out.")
        own_width = self.encoder is not None and self.encoder.width != self.width
        for name in ("merged_attention", "shared_embedding"):
            if own_width and vars(self)[name]:
                raise self.bad(name, "be False where the encoder has a width of its own", "Leave out either.")
        self._check_window()

    def _check_window(self) -> None:
        self.check_at_least("global_every", 0)
        if self.window is None:
            for name in ("encoder_window", "global_every", "local_rope_base"):
                if vars(self)[name]:
                    raise self.bad(name, "be left out without a window", "Set window, or leave it out.")
            return
        self.check_at_least("window", 1)
        if self.encoder_window is None:
            raise self.bad("encoder_window", "be given with window", "Give how far it reaches before and after.")
        object.__setattr__(self, "encoder_window", tuple(self.encoder_window))
        if len(self.encoder_window) != 2 or min(self.encoder_window) < 0:
            raise self.bad("encoder_window", "be two numbers, at least 0", "Give how far it reaches before and after.")

    @property
    def encoder_config(self) -> ModelConfig:
        """What the encoder's layers need to know."""
        shared = {field.name: vars(self)[field.name] for field in dataclasses.fields(ModelConfig)}
        own = {} if self.encoder is None else vars(self.encoder)
        return ModelConfig(**shared | {name: value for name, value in own.items() if name in shared})

    @property
    def prompt_width(self) -> int:
        """Width of the encoder's final states."""
        return self.width if self.encoder is None else self.encoder.width

    @property
    def logit_cap(self) -> float | None:
        """Bound of the logits."""
        return self.logit_softcap

    def block(self, *, decoder: bool) -> layers.BlockConfig:
        """The layers' settings; initialisation as in `DecoderOnlyConfig.block`."""
        size = self if decoder or self.encoder is None else self.encoder
        scale = self.attention_scale or size.head_dim**-0.5
        return layers.BlockConfig(
            kv_heads=size.kv_heads,
            norm_offset=_NORM_OFFSET,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            post_norms=True,
            cross=self.prompt_width if decoder and not self.merged_attention else None,
            attention_scale=scale,
            softcap=self.attention_softcap,
            qk_norm=self.qk_norm,
            relative_buckets=None,
            query_std=size.width**-0.5 * (size.head_dim**-0.5 / scale),
            output_scale=(2 * (self.decoder_layers if decoder else self.encoder_layers)) ** -0.5,
        )


def _check_heads(config: str, heads: int, kv_heads: int, head_dim: int) -> None:
    if heads % kv_heads:
        raise invalid(f"{config}.kv_heads", kv_heads, f"divide heads = {heads}", "Change either number.")
    if head_dim % 2:
        raise invalid(f"{config}.head_dim", head_dim, "be even with rotary positions", "Change it.")


class Encoded(NamedTuple):
    """The encoder's final states, and what the decoder sees of them; None where its own scene says so (merged)."""

    states: Float[Array, "B S De"]
    scene: attending.Scene | None


class Stack(nnx.Module):
    """Encoder or decoder: blocks and a final norm."""

    def __init__(self, key: jax.Array, config: T5GemmaConfig, *, decoder: bool):
        """Create the layers."""
        self.config, self.size = config, config if decoder else config.encoder_config
        self.count = config.decoder_layers if decoder else config.encoder_layers
        # Causality bounds the decoder's window on the other side.
        self.reach = config.encoder_window
        if decoder and config.window is not None:
            self.reach = (config.window - 1, 0)
        block = config.block(decoder=decoder)
        self.layers = functional.stacked(lambda one: layers.Block(one, self.size, block), key, self.count)
        self.final_norm = layers.RMSNorm(self.size.width, self.size, _NORM_OFFSET)

    @property
    def windowed(self) -> np.ndarray:
        """Which layers see only the window, `bool[N]`."""
        every, number = self.config.global_every, np.arange(1, self.count + 1)
        return (number % every != 0 if every else number > 0) & (self.reach is not None)

    def near(self, seen: Order) -> Order | None:
        """Return the order of layers with a window, None where there are none."""
        return None if self.reach is None else dataclasses.replace(seen, before=self.reach[0], after=self.reach[1])

    def form(self, keys: int) -> attending.Form:
        """Return the form of attention over so many keys."""
        return attending.form(self.size, keys, softcap=self.config.attention_softcap, bias=False)

    def view(self, scene: attending.Scene, queries: Int[Array, "B Q"]) -> layers.View:
        """Return what all layers know of their queries, but for what they see of the encoder."""
        config, near_turn = self.config, None
        turn = layers.Rotary(*rotary.table(queries, self.size.head_dim, config.rope_base, config.rope_scaling))
        if config.local_rope_base is not None:
            near_turn = layers.Rotary(*rotary.table(queries, self.size.head_dim, config.local_rope_base))
        return layers.View(scene=scene, turn=turn, near_turn=near_turn, bias=layers.Bias(None, None))

    def run(
        self,
        x: Float[Array, "B L D"],
        view: layers.View,
        encoded: Encoded | None,
        key: jax.Array | None,
    ) -> Float[Array, "B L D"]:
        """Return the final states of whole rows; a decoder gets the encoder's states and what it sees of them."""

        def body(block: layers.Block, x: Array, inputs: tuple) -> tuple[Array, None]:
            (windowed, key), cross = inputs, None
            queries, known = block.look(x, view.turn_of(windowed))
            if encoded is not None and encoded.scene is None:
                prompt = self.recall(block, encoded.states)
                known = sharing.lineage([prompt, known])
            elif encoded is not None and encoded.scene is not None:
                cross = layers.Cross(self.recall(block, encoded.states), layers.Sight(encoded.scene))
            x = block.finish(x, queries, known, layers.Sight(view.scene, windowed), cross, key)
            return constrain(x, ("batch", "length", None)), None

        inputs = (self.windowed, layers.layer_keys(key, self.count))
        return self.final_norm(self.each(body, x, inputs)[0])

    def recall(self, block: layers.Block, states: Float[Array, "B S De"]) -> layers.KeysValues:
        """Return one layer's keys and values of the encoder's states, which are not turned."""
        attention = block.attention if self.config.merged_attention else block.cross
        return attention.keys_values(states, None)

    def prompt_memory(self, states: Float[Array, "B S De"]) -> layers.KeysValues:
        """Return every layer's keys and values of the encoder's states, `[N, B, S, Kh, E]`."""

        def body(block: layers.Block, carry: None, inputs: None) -> tuple[None, layers.KeysValues]:
            return None, self.recall(block, states)

        return self.each(body, None, None)[1]

    def extend(self, cache: Cache, x: Float[Array, "B Q D"]) -> tuple[Float[Array, "B Q D"], Cache]:
        """Return the final states of each row's next tokens, and the cache in which they are written."""
        merged, new = self.config.merged_attention, x.shape[1]
        here, there = cache.here(new), cache.own_places(new)
        prompt_mask = (cache.prompt_places < caches.NEVER)[:, None, None, :]
        seen = mask.causal(here, there)
        near = None if self.reach is None else seen & mask.reach(here, there, *self.reach)
        if merged:
            seen, near = _beside(prompt_mask, seen), None if near is None else _beside(prompt_mask, near)
        view = self.view(attending.Masks(seen, near), here)
        across = layers.Sight(attending.Masks(prompt_mask))

        def body(block: layers.Block, carry: tuple, layer: tuple) -> tuple:
            (x, own), (index, windowed, prompt) = carry, layer
            queries, new = block.look(x, view.turn_of(windowed))
            own, known = caches.remember(own, new, index, cache.slot)
            cross, pieces = (None, (prompt, known)) if merged else (layers.Cross((prompt,), across), (known,))
            return block.finish(x, queries, pieces, layers.Sight(view.scene, windowed), cross, None), own

        scan, parts = self.config.scan_layers, cache.layers(self.windowed)
        x, own = functional.walk_layers(self.layers, body, (x, cache.own), parts, scan=scan)
        return self.final_norm(x), dataclasses.replace(cache, own=own)

    def each(self, body, carry, inputs):
        """Call `body` for each layer."""
        config = self.config
        return functional.run_layers(self.layers, body, carry, inputs, scan=config.scan_layers, remat=config.remat)


def _beside(prompt: Bool[Array, "B 1 1 S"], own: Bool[Array, "B 1 Q K"]) -> Bool[Array, "B 1 Q S+K"]:
    """Return the mask of queries that see the encoder's states beside their own stack's, and before them."""
    return jnp.concatenate([jnp.broadcast_to(prompt, (*own.shape[:3], prompt.shape[3])), own], axis=3)


class T5GemmaNet(nnx.Module):
    """Embedding, encoder, decoder, and the output matrix unless it is tied; the encoder may have its own embedding."""

    def __init__(self, key: jax.Array, config: T5GemmaConfig):
        """Draw embeddings and output matrix with std D^-1/2 (of the scaled embeddings, 1)."""
        keys, size = jax.random.split(key, 5), config.encoder_config
        self.config = config
        self.embedding = layers.Embedding(keys[0], config, config.width**-0.5, None)
        if not config.shared_embedding:
            self.encoder_embedding = layers.Embedding(keys[1], size, size.width**-0.5, None)
        self.encoder = Stack(keys[2], config, decoder=False)
        self.decoder = Stack(keys[3], config, decoder=True)
        if not config.tied:
            self.head = layers.output_head(keys[4], config)

    def output_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix from hidden states to logits; with an adapter W + s A B, one product `[D, V]`."""
        return self.embedding.token[...].T if self.config.tied else layers.output_matrix(self.head)

    def embed(self, embedding: layers.Embedding, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the input of a stack's first layer."""
        return constrain(embedding(row, embedding.config.width**0.5, key), ("batch", "length", None))

    def encode(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L De"]:
        """Return the encoder's states of a row whose segments are runs of columns."""
        keys, stack, tokens = (None, None) if key is None else jax.random.split(key), self.encoder, layers.tokens(row)
        seen = Order(causal=False)
        scene = attending.scene(stack.form(row.tokens.shape[1]), tokens, tokens, seen, stack.near(seen))
        embedding = self.embedding if self.config.shared_embedding else self.encoder_embedding
        return stack.run(self.embed(embedding, row, keys[0]), stack.view(scene, row.positions), None, keys[1])

    def decode(
        self, prompt: layers.Row, encoded: Float[Array, "B S De"], inputs: layers.Row, key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """Return the decoder's states of its inputs (`layers.shift_right` makes them of responses)."""
        keys, stack = (None, None) if key is None else jax.random.split(key), self.decoder
        queries, prompts = layers.tokens(inputs), prompt.tokens.shape[1]
        if self.config.merged_attention:
            known = sharing.seen([prompt, inputs]).tokens
            seen, across = Order(causal=True, memory=prompts), None
        else:
            known, seen = queries, Order(causal=True)
            looking = sharing.gathered(queries, prompt.tokens.shape[0])
            across = attending.scene(stack.form(prompts), looking, layers.tokens(prompt), Order(causal=False))
        form = stack.form(known.segments.shape[1])
        view = stack.view(attending.scene(form, queries, known, seen, stack.near(seen)), inputs.positions)
        return stack.run(self.embed(self.embedding, inputs, keys[0]), view, Encoded(encoded, across), keys[1])

    def recall(self, encoded: Float[Array, "B S De"]) -> layers.KeysValues:
        """Return every decoder layer's keys and values of the encoder's states, `[N, B, S, Kh, E]`."""
        return self.decoder.prompt_memory(encoded)

    def extend(self, cache: Cache, tokens: Int[Array, "B Q"]) -> tuple[Float[Array, "B Q D"], Cache]:
        """Return the states of each row's next tokens, and the cache in which they are written."""
        # Segments and positions are the cache's business here.
        row = layers.Row(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens), jnp.full_like(tokens, layers.RESPONSE))
        return self.decoder.extend(cache, self.embed(self.embedding, row, None))


@dataclasses.dataclass(frozen=True)
class T5Gemma(Seq2Seq):
    """A T5Gemma or T5Gemma 2 as a `ConditionalLM`."""

    config: T5GemmaConfig
    net = T5GemmaNet
