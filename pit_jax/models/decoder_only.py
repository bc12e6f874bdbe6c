"""Decoder-only language models in the manner of Llama, Mistral, Qwen, Gemma and T5X's decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.types import Conditional, Hidden, Params, Prompts, TokenScores
from pit_jax.models import attending, caches, functional, layers, sharing
from pit_jax.models.api import Attention
from pit_jax.models.caches import Cache
from pit_jax.models.config import ModelConfig, RopeScaling
from pit_jax.models.output import Output
from pit_jax.ops import logprob, mask, relative_bias, rotary, shared
from pit_jax.ops.sight import Order, Tokens
from pit_jax.sharding.rules import constrain

POSITIONS = ("rotary", "learned", "relative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig(ModelConfig):
    """Architecture of a decoder-only model; the defaults are Llama's.

    layers: N. kv_heads: Kh, a divisor of `heads`.
    position: "rotary", with base `rope_base`; "learned", a table of `max_positions` vectors; or "relative", T5's bias
      with `relative_buckets` up to `relative_max_distance` (T5X), one table for all layers or `relative_per_layer`.
    rope_scaling: stretches the rotary angles (Llama 3.1). local_rope_base: base of layers with a window, whose angles
      are not stretched (Gemma 3); by default they are like the others.
    norm_offset: added to the stored norm weights (Gemma: 1). post_norms: norms on sublayer outputs too (Gemma 2).
    qk_norm: RMS norms of each head's queries and keys, before they are turned (Qwen 3, Gemma 3).
    scale_embedding: multiply embeddings by D^1/2 (Gemma). scale_logits: multiply logits by D^-1/2 (T5X, tied).
    qkv_bias, out_bias, mlp_bias: biases on query, key and value (Qwen 2), on the attention's output, and in the
      feed-forward layers (Llama has all of them or none).
    attention_scale: factor of the dot products, by default E^-1/2.
    attention_softcap, logit_softcap: bounds of attention scores and of output logits (Gemma 2).
    window: layers see only keys less than so many positions away, except that every `global_every`-th layer sees
      all (Gemma 2: 2; 0: none does), or those that `global_layers` lists, counted from 0.
    prefix_lm: tokens of a prompt see each other in both directions; responses are causal in any case.
    """

    layers: int
    kv_heads: int
    position: str = "rotary"
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None
    max_positions: int | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    scale_embedding: bool = False
    scale_logits: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    global_every: int = 0
    global_layers: tuple[int, ...] | None = None
    prefix_lm: bool = False

    def __post_init__(self) -> None:
        """Check every field; make lists from gin hashable.

        Raises:
          ConfigError: a field is out of range, or contradicts another.
        """
        super().__post_init__()
        if self.global_layers is not None:
            object.__setattr__(self, "global_layers", tuple(self.global_layers))
        self.check_at_least("layers", 1)
        self.check_at_least("kv_heads", 1)
        if self.heads % self.kv_heads:
            raise self.bad("kv_heads", f"divide heads = {self.heads}", "Change either number.")
        for name in ("rope_base", "local_rope_base", "attention_scale", "attention_softcap", "logit_softcap"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise self.bad(name, "be positive", "Give a positive number, or leave it out.")
        self._check_positions()
        self._check_window()

    def _check_positions(self) -> None:
        if self.position not in POSITIONS:
            raise self.bad("position", "be 'rotary', 'learned' or 'relative'", "Use one of them.")
        if self.position == "rotary" and self.head_dim % 2:
            raise self.bad("head_dim", "be even with rotary positions", "Change it, or use learned positions.")
        if (self.position == "learned") != (self.max_positions is not None):
            raise self.bad("max_positions", "be given with learned positions and only then", "Set or unset it.")
        if self.max_positions is not None:
            self.check_at_least("max_positions", 1)
        for name in ("rope_scaling", "local_rope_base"):
            if vars(self)[name] is not None and self.position != "rotary":
                raise self.bad(name, "be None without rotary positions", "Leave it out.")
        if self.position != "relative":
            if self.relative_per_layer:
                raise self.bad("relative_per_layer", "be False without relative positions", "Leave it out.")
            return
        self.check_at_least("relative_buckets", 2)
        if self.relative_buckets % 2:
            raise self.bad("relative_buckets", "be even", "Half of the buckets are exact.")
        if self.relative_max_distance <= self.relative_buckets // 2:
            rule = f"be more than relative_buckets / 2 = {self.relative_buckets // 2}"
            raise self.bad("relative_max_distance", rule, "Nearer positions have buckets of their own.")

    def _check_window(self) -> None:
        self.check_at_least("global_every", 0)
        if self.window is not None:
            self.check_at_least("window", 1)
        else:
            for name in ("global_every", "global_layers", "local_rope_base"):
                if vars(self)[name]:
                    raise self.bad(name, "be left out without a window", "Set window, or leave it out.")
        if self.global_layers is not None:
            if self.global_every:
                raise self.bad("global_layers", "be None with global_every", "Use one of the two.")
            if list(self.global_layers) != sorted(set(self.global_layers) & set(range(self.layers))):
                rule = f"be different layers among 0, ..., {self.layers - 1}, in their order"
                raise self.bad("global_layers", rule, "Mend the list.")

    @property
    def block(self) -> layers.BlockConfig:
        """The layers' settings.

        Projections into the residual stream start (2 N)^-1/2 smaller (GPT-2); scores start with a variance of about 1
        whatever their scale.
        """
        scale = self.attention_scale or self.head_dim**-0.5
        own_bias = self.position == "relative" and self.relative_per_layer
        return layers.BlockConfig(
            kv_heads=self.kv_heads,
            norm_offset=self.norm_offset,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            mlp_bias=self.mlp_bias,
            post_norms=self.post_norms,
            cross=None,
            attention_scale=scale,
            softcap=self.attention_softcap,
            qk_norm=self.qk_norm,
            relative_buckets=self.relative_buckets if own_bias else None,
            query_std=self.width**-0.5 * (self.head_dim**-0.5 / scale),
            output_scale=(2 * self.layers) ** -0.5,
        )

    @property
    def embedding_factor(self) -> float:
        """Factor on the embeddings."""
        return self.width**0.5 if self.scale_embedding else 1.0

    @property
    def logit_scale(self) -> float:
        """Factor of the logits, before they are capped."""
        return self.width**-0.5 if self.scale_logits else 1.0

    @property
    def windowed(self) -> np.ndarray:
        """Which layers see only the window, `bool[N]`."""
        index = np.arange(self.layers)
        everywhere = np.isin(index, self.global_layers or ())
        if self.global_every:
            everywhere = (index + 1) % self.global_every == 0
        return ~everywhere & (self.window is not None)


class DecoderNet(nnx.Module):
    """Embedding, a stack of blocks, a final norm, and the output matrix unless it is tied."""

    def __init__(self, key: jax.Array, config: DecoderOnlyConfig):
        """Draw embeddings and output matrix with std D^-1/2 (of the scaled embedding, 1), the blocks as they say."""
        keys = jax.random.split(key, 4)
        std = config.width**-0.5
        self.config = config
        self.embedding = layers.Embedding(keys[0], config, std, config.max_positions)
        self.layers = functional.stacked(lambda one: layers.Block(one, config, config.block), keys[1], config.layers)
        self.final_norm = layers.RMSNorm(config.width, config, config.norm_offset)
        if config.position == "relative" and not config.relative_per_layer:
            self.relative_bias = layers.RelativeBias(keys[3], config, config.relative_buckets)
        if not config.tied:
            self.head = layers.output_head(keys[2], config)

    def output_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix from hidden states to logits; with an adapter W + s A B, one product `[D, V]`."""
        return self.embedding.token[...].T if self.config.tied else layers.output_matrix(self.head)

    def embed(self, row: layers.Row, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the input of the first layer."""
        x = self.embedding(row, self.config.embedding_factor, key)
        return constrain(x, ("batch", "length", None))

    def scene(self, row: layers.Row, attention: Attention, prefix: int) -> attending.Scene:
        """Return what the tokens of whole rows see; those of the first `prefix` columns see each other both ways."""
        seen, tokens = Order(causal=attention == "causal", prefix=prefix), layers.tokens(row)
        return attending.scene(self.form(row, prefix), tokens, tokens, seen, self._near(seen))

    def form(self, row: layers.Row, prefix: int) -> attending.Form:
        """Return the form of attention of whole rows; a prefix and a window together are XLA's."""
        if prefix and self.config.window is not None:
            return "xla"
        return self._form(row.tokens.shape[1])

    def _form(self, keys: int) -> attending.Form:
        config = self.config
        relative = config.position == "relative"
        return attending.form(config, keys, softcap=config.attention_softcap, bias=relative)

    def scenes(self, rows: Sequence[layers.Row], prefix: int) -> list[attending.Scene]:
        """Return what the tokens of every level of rows see, prompts first (`models/sharing.py`)."""
        return [self.scene(rows[0], "causal", prefix), *(self._beneath(rows[: end + 1]) for end in range(1, len(rows)))]

    def _beneath(self, rows: Sequence[layers.Row]) -> attending.Scene:
        own, known = layers.tokens(rows[-1]), sharing.seen(rows)
        if self.config.window is not None:
            # A window counts positions, and from a row to those above it columns do not.
            seen = mask.same_segment(own.segments, known.tokens.segments)
            return self.masks(seen & mask.causal(own.positions, known.tokens.positions), own, known.tokens)
        form = self._form(known.tokens.segments.shape[1])
        return attending.scene(form, own, known.tokens, Order(causal=True, memory=known.above))

    def masks(self, seen: Bool[Array, "B 1 Q K"], queries: Tokens, keys: Tokens) -> attending.Masks:
        """Return what layers without and with the window see, of what is seen without."""
        window = self.config.window
        near = None if window is None else seen & mask.reach(queries.positions, keys.positions, window - 1, window - 1)
        return attending.Masks(seen, near)

    def _near(self, seen: Order) -> Order | None:
        window = self.config.window
        return None if window is None else dataclasses.replace(seen, before=window - 1, after=window - 1)

    def view(self, scene: attending.Scene, queries: Int[Array, "B Q"], keys: Int[Array, "B K"]) -> layers.View:
        """Return what all layers know of their queries: what they see, how they are turned, and the bias."""
        config, turn, near_turn, bias = self.config, None, None, layers.Bias(None, None)
        if config.position == "rotary":
            turn = layers.Rotary(*rotary.table(queries, config.head_dim, config.rope_base, config.rope_scaling))
        if config.local_rope_base is not None:
            near_turn = layers.Rotary(*rotary.table(queries, config.head_dim, config.local_rope_base))
        if config.position == "relative":
            relative = keys[:, None, :] - queries[:, :, None]
            buckets = relative_bias.bucket(relative, False, config.relative_buckets, config.relative_max_distance)
            own = config.relative_per_layer
            bias = layers.Bias(None, buckets) if own else layers.Bias(self.relative_bias(buckets), None)
        return layers.View(scene=scene, turn=turn, near_turn=near_turn, bias=bias)

    def run(self, row: layers.Row, scene: attending.Scene, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the final states of whole rows."""
        return self.descend([row], [scene], key)[0]

    def descend(
        self, rows: Sequence[layers.Row], scenes: Sequence[attending.Scene], key: jax.Array | None
    ) -> list[Float[Array, "B L D"]]:
        """Return the final states of rows in levels, prompts first."""
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        views = [
            self.view(scene, row.positions, sharing.seen(rows[: end + 1]).tokens.positions)
            for end, (row, scene) in enumerate(zip(rows, scenes, strict=True))
        ]

        def body(block: layers.Block, states: tuple, inputs: tuple) -> tuple[tuple, tuple[()]]:
            (windowed, key), known, after = inputs, [], []
            for level, (x, view) in enumerate(zip(states, views, strict=True)):
                queries, own = block.look(x, view.turn_of(windowed))
                known.append(own)
                sight = block.sight(view.scene, windowed, view.bias)
                x = block.finish(x, queries, sharing.lineage(known), sight, None, sharing.level_key(key, level))
                after.append(constrain(x, ("batch", "length", None)))
            return tuple(after), ()

        inputs = (self.config.windowed, layers.layer_keys(layer_key, self.config.layers))
        embedded = tuple(self.embed(row, sharing.level_key(embed_key, level)) for level, row in enumerate(rows))
        states, _ = self._layers(body, embedded, inputs)
        return [self.final_norm(x) for x in states]

    def read(
        self, row: layers.Row, scene: attending.Scene, last: Int[Array, "B 1"]
    ) -> tuple[Float[Array, "B 1 D"], layers.KeysValues]:
        """Return the final state of each row's last token (0 where `last` is -1), and all layers' keys and values.

        Of unrolled layers the last one computes no other states.
        """
        view, end, scan = self.view(scene, row.positions, row.positions), self._end(row, last), self.config.scan_layers

        def body(block: layers.Block, x: Array, windowed: Array) -> tuple[Array, layers.KeysValues]:
            queries, own = block.look(x, view.turn_of(windowed))
            x = block.finish(x, queries, own, block.sight(view.scene, windowed, view.bias), None, None)
            return constrain(x, ("batch", "length", None)), own

        def final(block: layers.Block, x: Array, windowed: Array) -> tuple[Array, layers.KeysValues]:
            _, own = block.look(x, view.turn_of(windowed))
            x = layers.gather(x, last)
            queries, _ = block.look(x, end.turn_of(windowed))
            return block.finish(x, queries, own, block.sight(end.scene, windowed, end.bias), None, None), own

        x, known = self._layers(body, self.embed(row, None), self.config.windowed, None if scan else final)
        x = self.final_norm(layers.gather(x, last) if scan else x)
        return jnp.where(last[:, :, None] >= 0, x, jnp.zeros_like(x)), known

    def _end(self, row: layers.Row, last: Int[Array, "B 1"]) -> layers.View:
        """Return what the last tokens see: their whole rows."""
        one = layers.Row(*(jnp.take_along_axis(part, jnp.maximum(last, 0), axis=1) for part in row))
        own, known = layers.tokens(one), layers.tokens(row)
        masks = self.masks(mask.same_segment(own.segments, known.segments), own, known)
        return self.view(masks, own.positions, known.positions)

    def extend(self, cache: Cache, row: layers.Row) -> tuple[Float[Array, "B Q D"], Cache]:
        """Return the final states of each row's next tokens, and the cache in which they are written."""
        here, window = row.positions, self.config.window
        there = jnp.concatenate([cache.prompt_places, cache.own_places(here.shape[1])], axis=1)
        seen = mask.causal(here, there)
        near = None if window is None else seen & mask.reach(here, there, window - 1, window - 1)
        view = self.view(attending.Masks(seen, near), here, there)

        def body(block: layers.Block, carry: tuple, layer: tuple) -> tuple:
            (x, own), (index, windowed, prompt) = carry, layer
            queries, new = block.look(x, view.turn_of(windowed))
            own, known = caches.remember(own, new, index, cache.slot)
            sight = block.sight(view.scene, windowed, view.bias)
            return block.finish(x, queries, (prompt, known), sight, None, None), own

        scan, carry = self.config.scan_layers, (self.embed(row, None), cache.own)
        x, own = functional.walk_layers(self.layers, body, carry, cache.layers(self.config.windowed), scan=scan)
        return self.final_norm(x), dataclasses.replace(cache, own=own)

    def _layers(self, body, carry, inputs, final=None):
        config = self.config
        return functional.run_layers(
            self.layers, body, carry, inputs, scan=config.scan_layers, remat=config.remat, final=final
        )


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
        # Prompts whose tokens see each other in both directions have no beginning that others share.
        x, places = shared.whole(x) if attention == "bidirectional" or self.config.prefix_lm else (x, None)
        if attention == "causal" and shared.is_shared(x):
            return sharing.laid_out(self._levels(params, x, key), places)
        x = shared.apart(x)
        states = self._states(params, x, attention, key)
        return sharing.laid_out(Hidden(states[:, : x.prompt.shape[1]], states[:, x.prompt.shape[1] :]), places)

    def predictors(self, params: Params, x: Conditional, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Return the states of the tokens before the response tokens.

        The first token of a response without any prompt has none: its state is 0, hence its distribution uniform.
        """
        if shared.is_shared(x):
            return sharing.predictors(x, self.hidden(params, x, key, attention="causal"))
        return layers.gather(self._states(params, x, "causal", key), layers.predecessors(x))

    def logprobs(self, params: Params, x: Conditional, key: jax.Array | None = None) -> TokenScores:
        """Return the scores of each response token."""
        return self.output(params).scores(self.predictors(params, x, key), x)

    def output(self, params: Params) -> Output:
        """Return the head that scores tokens."""
        config, matrix = self.config, self._bind(params).output_matrix()
        return Output(matrix, config.logprob_chunk, config.logit_softcap, config.logit_scale)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        prefix: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Return the float32 logits after each token, all of V at once: for inspection and parity.

        Args:
          params: the parameters.
          tokens: one text a row, padded on either side.
          mask: true where there is a token; only those have positions.
          prefix: true at tokens that see each other in both directions, whatever `prefix_lm` is; for a role embedding
            they are prompts, and all others responses.
        """
        net, segments = self._bind(params), mask.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1, dtype=jnp.int32) - 1, 0)
        roles = jnp.full_like(segments, layers.RESPONSE)
        if prefix is not None:
            roles = jnp.where(prefix, layers.PROMPT, roles)
        row = layers.Row(tokens, segments, positions, roles)
        scene = net.scene(row, "causal", 0) if prefix is None else self._anywhere(net, row, prefix)
        return self._logits(net, net.run(row, scene, None))

    def prefill(
        self, params: Params, prompts: Prompts, max_new: int, samples: int = 1, tried: int = 0
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Return the logits of the first new token of `samples` rows a prompt, and the cache.

        Raises:
          ConfigError: prompts and new tokens need more positions than are learned.
        """
        net, width = self._bind(params), prompts.tokens.shape[1]
        most = self.config.max_positions
        if most is not None and width + max_new > most:
            rule = f"be at least {width} prompt tokens + {max_new} new ones"
            raise self.config.bad("max_positions", rule, "Shorten either, or train a model with more positions.")
        row = layers.prompt_row(prompts.tokens, prompts.mask.astype(jnp.int32), prompts.reference)
        lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
        last, known = net.read(row, net.scene(row, "causal", self._prefix(width)), lengths[:, None] - 1)
        places = jnp.where(prompts.mask, row.positions, caches.NEVER)
        cache = caches.begin(known, places, lengths, samples=samples, slots=max_new, tried=tried, config=self.config)
        return jnp.repeat(self._logits(net, last[:, 0]), samples, axis=0), cache

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
        net, positions = self._bind(params), cache.here(tokens.shape[1])
        if self.config.max_positions is not None:
            # Only tokens that nobody reads any more can get there.
            positions = jnp.minimum(positions, self.config.max_positions - 1)
        row = layers.Row(tokens, jnp.ones_like(positions), positions, jnp.full_like(positions, layers.RESPONSE))
        states, cache = net.extend(cache, row)
        return self._logits(net, states), cache

    def keep(self, cache: Cache, kept: Int[Array, " B"]) -> Cache:
        """Return the cache that goes on after so many of the tokens that each row has tried."""
        return cache.keep(kept)

    def _bind(self, params: Params) -> DecoderNet:
        return functional.bind(DecoderNet, self.config, params)

    def _prefix(self, prompts: int) -> int:
        return prompts if self.config.prefix_lm else 0

    def _anywhere(self, net: DecoderNet, row: layers.Row, prefix: Bool[Array, "B L"]) -> attending.Masks:
        """Return what tokens see where those of a prefix may stand anywhere."""
        tokens = layers.tokens(row)
        causal = mask.causal(row.positions, row.positions) | mask.prefix(prefix, prefix)
        return net.masks(mask.same_segment(row.segments, row.segments) & causal, tokens, tokens)

    def _states(
        self, params: Params, x: Conditional, attention: Attention, key: jax.Array | None
    ) -> Float[Array, "B L D"]:
        """Return the final states of `[prompt | response]`.

        A kernel's window counts columns: padding between prompt and response must go first.
        """
        net, row = self._bind(params), layers.joint_row(x)
        prefix = self._prefix(x.prompt.shape[1]) if attention == "causal" else 0
        if self.config.window is None or net.form(row, prefix) != "splash":
            return net.run(row, net.scene(row, attention, prefix), key)
        row, places = layers.compact(row)
        return layers.gather(net.run(row, net.scene(row, attention, prefix), key), places)

    def _levels(self, params: Params, x: Conditional, key: jax.Array | None) -> Hidden:
        """Return the final states of prompts and of the responses that share them."""
        net, rows = self._bind(params), sharing.levels(x)
        scenes = net.scenes(rows, self._prefix(x.prompt.shape[1]))
        return sharing.hidden(net.descend(rows, scenes, key))

    def _logits(self, net: DecoderNet, states: Float[Array, "B *L D"]) -> Float[Array, "B *L V"]:
        head, config = net.output_matrix(), self.config
        return logprob.logits(states, head, softcap=config.logit_softcap, scale=config.logit_scale)
