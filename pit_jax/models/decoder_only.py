"""Decoder-only language models in the manner of Llama, Qwen 2 and Gemma."""

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
from pit_jax.ops import logprob, mask, rotary
from pit_jax.sharding.rules import constrain

_NEVER = 2**30
"""Position of a cache slot that no query reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig(ModelConfig):
    """Architecture of a decoder-only model; the defaults are Llama's.

    layers: N. kv_heads: Kh, a divisor of `heads`.
    position: "rotary", with base `rope_base`, or "learned", a table of `max_positions` vectors.
    norm_offset: added to the stored norm weights (Gemma: 1). post_norms: norms on sublayer outputs too (Gemma 2).
    scale_embedding: multiply embeddings by D^1/2 (Gemma). qkv_bias: biases on query, key, value (Qwen 2).
    attention_scale: factor of the dot products, by default E^-1/2.
    attention_softcap, logit_softcap: bounds of attention scores and of output logits (Gemma 2).
    window: layers see only keys less than so many positions away, except that every `global_every`-th layer sees
      all (Gemma 2: 2; 0: none does).
    """

    layers: int
    kv_heads: int
    position: str = "rotary"
    rope_base: float = 10_000.0
    max_positions: int | None = None
    norm_offset: float = 0.0
    post_norms: bool = False
    scale_embedding: bool = False
    qkv_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    global_every: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range, or contradicts another.
        """
        super().__post_init__()
        self.check_at_least("layers", 1)
        self.check_at_least("kv_heads", 1)
        self.check_at_least("global_every", 0)
        if self.heads % self.kv_heads:
            raise self.bad("kv_heads", f"divide heads = {self.heads}", "Change either number.")
        if self.position not in ("rotary", "learned"):
            raise self.bad("position", "be 'rotary' or 'learned'", "Use one of them.")
        if self.position == "rotary" and self.head_dim % 2:
            raise self.bad("head_dim", "be even with rotary positions", "Change it, or use learned positions.")
        if (self.position == "learned") != (self.max_positions is not None):
            raise self.bad("max_positions", "be given with learned positions and only then", "Set or unset it.")
        for name in ("max_positions", "window"):
            if vars(self)[name] is not None:
                self.check_at_least(name, 1)
        for name in ("rope_base", "attention_scale", "attention_softcap", "logit_softcap"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise self.bad(name, "be positive", "Give a positive number, or leave it out.")
        if self.global_every and self.window is None:
            raise self.bad("global_every", "be 0 without a window", "Set window, or leave it out.")

    @property
    def block(self) -> layers.BlockConfig:
        """The layers' settings; projections into the residual stream start (2 N)^-1/2 smaller (GPT-2)."""
        return layers.BlockConfig(
            kv_heads=self.kv_heads,
            norm_offset=self.norm_offset,
            qkv_bias=self.qkv_bias,
            post_norms=self.post_norms,
            cross=False,
            attention_scale=self.attention_scale or self.head_dim**-0.5,
            softcap=self.attention_softcap,
            query_std=self.width**-0.5,
            output_scale=(2 * self.layers) ** -0.5,
        )

    @property
    def embedding_factor(self) -> float:
        """Factor on the embeddings."""
        return self.width**0.5 if self.scale_embedding else 1.0

    @property
    def windowed(self) -> np.ndarray:
        """Which layers see only the window, `bool[N]`."""
        index = np.arange(1, self.layers + 1)
        everywhere = index % self.global_every == 0 if self.global_every else np.zeros(self.layers, bool)
        return ~everywhere & (self.window is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderCache:
    """Keys and values of the prompt's S slots and `max_new` more.

    Generated tokens take the same slot in every row, whatever the row's prompt length. `positions` holds the
    position of each slot, beyond every query's for slots of padding, so that causality alone hides what must be.
    """

    keys: Float[Array, "N B C Kh E"]
    values: Float[Array, "N B C Kh E"]
    positions: Int[Array, "B C"]
    slot: Int[Array, ""]


class DecoderNet(nnx.Module):
    """Embedding, a stack of blocks, a final norm, and the output matrix unless it is tied."""

    def __init__(self, key: jax.Array, config: DecoderOnlyConfig):
        """Draw embeddings and output matrix with std D^-1/2 (of the scaled embedding, 1), the blocks as they say."""
        keys = jax.random.split(key, 3)
        std = config.width**-0.5
        self.config = config
        self.embedding = layers.Embedding(keys[0], config, std, config.max_positions)
        self.layers = functional.stacked(lambda one: layers.Block(one, config, config.block), keys[1], config.layers)
        self.final_norm = layers.RMSNorm(config, config.norm_offset)
        if not config.tied:
            self.head = layers.normal(keys[2], (config.width, config.vocab_size), ("embed", "vocab"), std, config)

    def output_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix from hidden states to logits."""
        return self.embedding.token[...].T if self.config.tied else self.head[...]

    def embed(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the input of the first layer."""
        x = self.embedding(row, self.config.embedding_factor, key)
        return constrain(x, ("batch", "length", None))

    def turn(self, positions: Int[Array, "B L"]) -> layers.Rotary | None:
        """Return the rotary angles of positions, shared by all layers."""
        if self.config.position != "rotary":
            return None
        return layers.Rotary(*rotary.table(positions, self.config.head_dim, self.config.rope_base))

    def near(self, seen: Bool[Array, "B 1 Q K"], queries: Int[Array, "B Q"], keys: Int[Array, "B K"]) -> Array:
        """Return what windowed layers see of what is seen at all."""
        return seen if self.config.window is None else seen & mask.window(queries, keys, self.config.window)

    def run(
        self, row: layers.Row, attention: Attention, key: jax.Array | None, *, keep: bool
    ) -> tuple[Float[Array, "B L D"], layers.KeysValues | tuple[()]]:
        """Return the final states of whole rows and, to `keep` for a cache, every layer's keys and values."""
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        seen = mask.same_segment(row.segments, row.segments)
        if attention == "causal":
            seen = seen & mask.causal(row.positions, row.positions)
        near, turn = self.near(seen, row.positions, row.positions), self.turn(row.positions)

        def body(block: layers.Block, x: Array, inputs: tuple) -> tuple[Array, layers.KeysValues | tuple[()]]:
            windowed, key = inputs
            queries, known = block.look(x, turn)
            sight = layers.Sight(jnp.where(windowed, near, seen), None)
            x = block.finish(x, queries, known, sight, None, key)
            return constrain(x, ("batch", "length", None)), known if keep else ()

        inputs = (self.config.windowed, layers.layer_keys(layer_key, self.config.layers))
        x, known = self._layers(body, self.embed(row, embed_key), inputs)
        return self.final_norm(x), known

    def extend(self, cache: DecoderCache, row: layers.Row) -> tuple[Float[Array, "B D"], DecoderCache]:
        """Return the final states of one new token per row, and the cache that knows it."""
        seen = mask.causal(row.positions, cache.positions)
        near, turn = self.near(seen, row.positions, cache.positions), self.turn(row.positions)

        def body(block: layers.Block, carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, keys, values), (index, windowed) = carry, inputs
            queries, new = block.look(x, turn)
            # The whole cache is carried and written in place: one slot is written, one layer read.
            keys = jax.lax.dynamic_update_slice(keys, new.keys[None], (index, 0, cache.slot, 0, 0))
            values = jax.lax.dynamic_update_slice(values, new.values[None], (index, 0, cache.slot, 0, 0))
            known = layers.KeysValues(*(jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (keys, values)))
            sight = layers.Sight(jnp.where(windowed, near, seen), None)
            return (block.finish(x, queries, known, sight, None, None), keys, values), None

        inputs = (np.arange(self.config.layers, dtype=np.int32), self.config.windowed)
        (x, keys, values), _ = self._layers(body, (self.embed(row, None), cache.keys, cache.values), inputs)
        cache = dataclasses.replace(cache, keys=keys, values=values, slot=cache.slot + 1)
        return self.final_norm(x)[:, 0], cache

    def _layers(self, body, carry, inputs):
        config = self.config
        return functional.run_layers(self.layers, body, carry, inputs, scan=config.scan_layers, remat=config.remat)


@dataclasses.dataclass(frozen=True)
class DecoderOnly:
    """A decoder-only model as a `ConditionalLM`: it reads `[prompt | response]` as one row."""

    config: DecoderOnlyConfig

    def init(self, key: jax.Array) -> Params:
        """Return fresh parameters."""
        return functional.initialise(DecoderNet, self.config, key)

    def abstract(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return functional.definition(DecoderNet, self.config).shapes

    def axes(self) -> Params:
        """Return the parameters' logical axis names."""
        return functional.definition(DecoderNet, self.config).axes

    def hidden(self, params: Params, x: Conditional, key: jax.Array | None = None, *, attention: Attention) -> Hidden:
        """Return the final states; `bidirectional` lets every token see its whole segment, prompt and response."""
        states, _ = self._bind(params).run(layers.joint_row(x), attention, key, keep=False)
        return Hidden(states[:, : x.prompt.shape[1]], states[:, x.prompt.shape[1] :])

    def predictors(self, params: Params, x: Conditional, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Return the states of the tokens before the response tokens.

        The first token of a response without any prompt has none: its state is 0, hence its distribution uniform.
        """
        states, _ = self._bind(params).run(layers.joint_row(x), "causal", key, keep=False)
        return _gather(states, layers.predecessors(x))

    def logprobs(self, params: Params, x: Conditional, key: jax.Array | None = None) -> TokenScores:
        """Return the scores of each response token."""
        states = self.predictors(params, x, key)
        scores = logprob.token_scores(
            states,
            self._bind(params).output_matrix(),
            x.response,
            chunk=self.config.logprob_chunk,
            softcap=self.config.logit_softcap,
        )
        return layers.zero_padding(scores, x.response_segments)

    def prefill(self, params: Params, prompts: Prompts, max_new: int) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Return the logits of the first new token, and the cache.

        Raises:
          ConfigError: prompts and new tokens need more positions than are learned.
        """
        net, width = self._bind(params), prompts.tokens.shape[1]
        most = self.config.max_positions
        if most is not None and width + max_new > most:
            rule = f"be at least {width} prompt tokens + {max_new} new ones"
            raise self.config.bad("max_positions", rule, "Shorten either, or train a model with more positions.")
        row = layers.prompt_row(prompts.tokens, prompts.mask.astype(jnp.int32), prompts.reference)
        states, known = net.run(row, "causal", None, keep=True)
        lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
        new = lengths[:, None] + jnp.arange(max_new, dtype=jnp.int32)[None, :]
        positions = jnp.concatenate([jnp.where(prompts.mask, row.positions, _NEVER), new], axis=1)
        keys, values = (jnp.pad(a, ((0, 0), (0, 0), (0, max_new), (0, 0), (0, 0))) for a in known)
        slot = jnp.asarray(width, jnp.int32)
        last = _gather(states, lengths[:, None] - 1)[:, 0]
        return self._logits(net, last), DecoderCache(keys=keys, values=values, positions=positions, slot=slot)

    def step(
        self, params: Params, cache: DecoderCache, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Append one token to every row and return the logits of the next; the work is linear in the cache."""
        net = self._bind(params)
        positions = jax.lax.dynamic_slice_in_dim(cache.positions, cache.slot, 1, axis=1)
        row = layers.Row(token[:, None], jnp.ones_like(positions), positions, jnp.full_like(positions, layers.RESPONSE))
        state, cache = net.extend(cache, row)
        return self._logits(net, state), cache

    def _bind(self, params: Params) -> DecoderNet:
        return functional.bind(DecoderNet, self.config, params)

    def _logits(self, net: DecoderNet, states: Float[Array, "B D"]) -> Float[Array, "B V"]:
        return layers.logits(states, net.output_matrix(), 1.0, self.config.logit_softcap)


def _gather(states: Float[Array, "B L D"], index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the states at the indices of each row, and 0 where an index is -1."""
    found = jnp.take_along_axis(states, jnp.maximum(index, 0)[:, :, None], axis=1)
    return jnp.where((index >= 0)[:, :, None], found, jnp.zeros_like(found))
