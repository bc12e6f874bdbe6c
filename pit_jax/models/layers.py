"""The parts both model families are built from: embedding, attention, feed-forward layer, block."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.types import Conditional, TokenScores
from pit_jax.models import attending, products
from pit_jax.models.attending import KeysValues, Pieces, Scene, Scores
from pit_jax.models.config import ModelConfig
from pit_jax.models.quantised import Quantised, product, quantise_kernel
from pit_jax.ops import norm, rotary, segment
from pit_jax.ops.sight import Tokens
from pit_jax.sharding.rules import constrain

PROMPT, REFERENCE, RESPONSE = range(3)
"""Roles of tokens, the rows of the role embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the families' blocks differ in, beyond `ModelConfig`.

    kv_heads: key/value heads. norm_offset: added to the stored weights of norms. qkv_bias: biases on query, key and
    value; out_bias, mlp_bias: on the other projections. post_norms: norms on each sublayer's output as well. cross:
    width of the encoder's states that the layer attends to as well, None where it does not. attention_scale: factor of
    the dot products. softcap: bound of the attention scores.
    qk_norm: RMS norms of each head's queries and keys. relative_buckets: size of a relative position bias of each
    layer's own. query_std: standard deviation of the query projection at the start. output_scale: factor on that of
    the projections back into the residual stream.
    """

    kv_heads: int
    norm_offset: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    post_norms: bool
    cross: int | None
    attention_scale: float
    softcap: float | None
    qk_norm: bool
    relative_buckets: int | None
    query_std: float
    output_scale: float


class Sight(NamedTuple):
    """What a layer's queries see: the scene, whether this layer has its window, and the bias `[#B, H, Q, K]`."""

    scene: Scene
    windowed: Bool[Array, ""] | None = None
    bias: Float[Array, "#B H Q K"] | None = None


class Bias(NamedTuple):
    """Relative position bias of a stack: the same for all layers, or the buckets that each looks up in its own table.

    Both are None where positions are known otherwise.
    """

    shared: Float[Array, "#B H Q K"] | None
    buckets: Int[Array, "#B Q K"] | None


class Row(NamedTuple):
    """Tokens `[B, L]` with what the model must know of them; segment 0 is padding, positions count per segment."""

    tokens: Int[Array, "B L"]
    segments: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    roles: Int[Array, "B L"]


class Rotary(NamedTuple):
    """Cosine and sine of the rotary angles, `[B, L, E / 2]` each."""

    cosine: Float[Array, "B L half"]
    sine: Float[Array, "B L half"]


class View(NamedTuple):
    """What all layers of a decoder know of their queries, in two kinds where some layers have a window.

    scene: what they see; turn, near_turn: rotary angles of layers that see everything and of those with a window, None
    for `near_turn`: as the others. Which kind a layer is of is an array, as in a scan over layers.
    """

    scene: Scene
    turn: Rotary | None
    near_turn: Rotary | None
    bias: Bias

    def turn_of(self, windowed: Bool[Array, ""]) -> Rotary | None:
        """Return one layer's rotary angles."""
        if self.turn is None or self.near_turn is None:
            return self.turn
        return Rotary(*(jnp.where(windowed, near, far) for near, far in zip(self.near_turn, self.turn, strict=True)))


def prompt_row(tokens: Int[Array, "B S"], segments: Int[Array, "B S"], reference: Bool[Array, "B S"]) -> Row:
    """Return prompts alone, as a row."""
    roles = jnp.where(reference, REFERENCE, PROMPT)
    return Row(tokens, segments, jnp.where(segments > 0, segment.positions(segments), 0), roles)


def response_row(tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Row:
    """Return responses alone, as a row."""
    positions = jnp.where(segments > 0, segment.positions(segments), 0)
    return Row(tokens, segments, positions, jnp.full_like(tokens, RESPONSE))


def joint_row(x: Conditional) -> Row:
    """Return `[prompt | response]` with positions running on from prompt to response within each segment.

    Padding between the two is jumped over, so a row means the same whatever the padding.
    """
    prompt = prompt_row(x.prompt, x.prompt_segments, x.prompt_reference)
    response = response_row(x.response, x.response_segments)
    before = jnp.sum(_own_prompt(x), axis=2, dtype=jnp.int32)
    response = response._replace(positions=response.positions + before)
    return Row(*(jnp.concatenate(parts, axis=1) for parts in zip(prompt, response, strict=True)))


def tokens(row: Row) -> Tokens:
    """Return what attention must know of a row."""
    return Tokens(row.segments, row.positions)


def compact(row: Row) -> tuple[Row, Int[Array, "B L"]]:
    """Return the row with each segment a run of columns and padding at the end, and where each token went.

    Then distances between columns of a segment are distances of positions, the same in all rows.
    """
    order = jnp.argsort(jnp.where(row.segments > 0, row.segments, jnp.iinfo(jnp.int32).max), axis=1, stable=True)
    moved = Row(*(jnp.take_along_axis(part, order, axis=1) for part in row))
    return moved, jnp.argsort(order, axis=1)


def gather(states: Float[Array, "B L D"], index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the states at the indices of each row, and 0 where an index is -1."""
    found = jnp.take_along_axis(states, jnp.maximum(index, 0)[:, :, None], axis=1)
    return constrain(jnp.where((index >= 0)[:, :, None], found, jnp.zeros_like(found)), ("batch", "length", None))


def predecessors(x: Conditional) -> Int[Array, "B T"]:
    """Return where in `[prompt | response]` the token before each response token stands, -1 where there is none.

    That is the previous response token of the segment, or for its first one the last token of its prompt.
    """
    prompts, responses = x.prompt.shape[1], x.response.shape[1]
    last = jnp.max(jnp.where(_own_prompt(x), jnp.arange(prompts)[None, None, :], -1), axis=2)
    previous = prompts - 1 + jnp.arange(responses)[None, :]
    return jnp.where(segment.positions(x.response_segments) == 0, last, previous)


def shift_right(response: Row, start: int) -> Row:
    """Return the decoder's input: each token replaced by the one before it in its segment, the first by `start`."""
    shifted = jnp.pad(response.tokens, ((0, 0), (1, 0)))[:, :-1]
    return response._replace(tokens=jnp.where(response.positions == 0, start, shifted))


def _own_prompt(x: Conditional) -> Bool[Array, "B T S"]:
    """Return which prompt tokens belong to the segment of each response token."""
    own = x.response_segments[:, :, None] == x.prompt_segments[:, None, :]
    return own & (x.prompt_segments > 0)[:, None, :]


def dropout(x: Float[Array, ...], rate: float, key: jax.Array | None) -> Float[Array, ...]:
    """Return `x` with entries dropped at the given rate and the others scaled up; as it is without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def layer_keys(key: jax.Array | None, count: int) -> jax.Array | None:
    """Return one dropout key per layer, or None without dropout."""
    return None if key is None else jax.random.split(key, count)


def normal(
    key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float, config: ModelConfig
) -> nnx.Param[Array]:
    """Return a parameter drawn from a normal distribution."""
    value = std * jax.random.normal(key, shape, jnp.float32)
    return nnx.Param(value.astype(config.param_dtype), axes=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear map and how it starts.

    name: one of `lora.TARGETS`. shape, axes: of the kernel, its inputs first, of which there are `inputs` axes.
    std: standard deviation of the kernel at the start. bias: whether it has one, which starts at 0.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int
    std: float
    bias: bool


class Projection(nnx.Module):
    """y = x W + bias, and where the config has an adapter for it, + s (x A) B; in the compute dtype.

    The adapter's matrices lie beside the kernel as `lora_a` and `lora_b`: A is uniform in +- fan_in^-1/2 at the start,
    B is 0. W + s A B never exists, nor does its gradient. A frozen kernel may be stored as integers, with a leaf
    `kernel_scale` beside it (`models/quantised.py`).
    """

    def __init__(self, key: jax.Array, linear: Linear, config: ModelConfig):
        """Draw the kernel; an adapter has a key of its own, so that the kernel is the same with and without."""
        shape, axes, inputs = linear.shape, linear.axes, linear.inputs
        self.kernel = normal(key, shape, axes, linear.std, config)
        self.quantised = config.quantises(linear.name)
        if self.quantised:
            values, scale = quantise_kernel(self.kernel[...], tuple(range(inputs)))
            self.kernel, self.kernel_scale = nnx.Param(values, axes=axes), nnx.Param(scale, axes=axes)
        self.inputs, self.dtype, self.has_bias = inputs, config.dtype, linear.bias
        if linear.bias:
            self.bias = nnx.Param(jnp.zeros(shape[inputs:], config.param_dtype), axes=axes[inputs:])
        lora = config.lora if config.adapts(linear.name) else None
        self.scale = None if lora is None else lora.scale
        if lora is not None:
            bound = math.prod(shape[:inputs]) ** -0.5
            a_key, a_shape = jax.random.fold_in(key, 1), (*shape[:inputs], lora.rank)
            a = jax.random.uniform(a_key, a_shape, jnp.float32, -bound, bound)
            b = jnp.zeros((lora.rank, *shape[inputs:]), jnp.float32)
            self.lora_a = nnx.Param(a, axes=(*axes[:inputs], "lora"))
            self.lora_b = nnx.Param(b, axes=("lora", *axes[inputs:]))

    def __call__(self, x: Float[Array, "B L ..."]) -> Float[Array, "B L ..."]:
        """Project."""
        if self.quantised:
            y = product(x.astype(self.dtype), Quantised(self.kernel[...], self.kernel_scale[...]), self.inputs)
        else:
            y = products.product(x, self.kernel[...].astype(self.dtype), self.inputs)
        if self.has_bias:
            y = y + self.bias[...].astype(self.dtype)[None, None]
        if self.scale is None:
            return y
        low = products.product(x, self.lora_a[...].astype(self.dtype), self.inputs)
        return y + self.scale * products.product(low, self.lora_b[...].astype(self.dtype), 1)

    def merged(self) -> Float[Array, "..."]:
        """Return W + s A B, as large as W, in the parameters' dtype."""
        kernel = self.kernel[...]
        if self.scale is None:
            return kernel
        update = jnp.tensordot(self.lora_a[...], self.lora_b[...], 1, preferred_element_type=jnp.float32)
        return (kernel + self.scale * update).astype(kernel.dtype)


def output_head(key: jax.Array, config: ModelConfig) -> nnx.Param[Array] | Projection:
    """Return the output matrix of an untied model, drawn with std D^-1/2: with an adapter, a projection."""
    shape, axes, std = (config.width, config.vocab_size), ("embed", "vocab"), config.width**-0.5
    if not config.adapts("head"):
        return normal(key, shape, axes, std, config)
    return Projection(key, Linear(name="head", shape=shape, axes=axes, inputs=1, std=std, bias=False), config)


def output_matrix(head: nnx.Param[Array] | Projection) -> Float[Array, "D V"]:
    """Return the matrix from hidden states to logits; with an adapter that is W + s A B, one product `[D, V]`."""
    return head.merged() if isinstance(head, Projection) else head[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm whose weight is `scale + offset` and 1 at the start."""

    def __init__(self, width: int, config: ModelConfig, offset: float):
        """Create the weights."""
        value = jnp.full((width,), 1.0 - offset, config.param_dtype)
        self.scale = nnx.Param(value, axes=("norm",))
        self.offset, self.eps = offset, config.norm_eps

    def __call__(self, x: Float[Array, "B L ..."]) -> Float[Array, "B L ..."]:
        """Normalise the last axis."""
        return norm.rms_norm(x, self.scale[...].astype(jnp.float32) + self.offset, self.eps)


class Embedding(nnx.Module):
    """Token vectors, plus learned vectors for roles and for positions where the config has them."""

    def __init__(self, key: jax.Array, config: ModelConfig, std: float, max_positions: int | None):
        """Draw the tables; roles and positions start at the tokens' scale."""
        keys = jax.random.split(key, 3)
        width = config.width
        self.token = normal(keys[0], (config.vocab_size, width), ("vocab", "embed"), std, config)
        if config.role_embedding:
            self.role = normal(keys[1], (3, width), ("roles", "embed"), std, config)
        if max_positions is not None:
            self.position = normal(keys[2], (max_positions, width), ("positions", "embed"), std, config)
        self.config, self.has_positions = config, max_positions is not None

    def __call__(self, row: Row, scale: float, key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return the vectors of a row's tokens.

        A token or position beyond its table gives NaN, which stops training, rather than a wrong vector.
        """
        x = scale * jnp.take(self.token[...], row.tokens, axis=0)
        if self.config.role_embedding:
            x = x + jnp.take(self.role[...], row.roles, axis=0)
        if self.has_positions:
            x = x + jnp.take(self.position[...], row.positions, axis=0)
        return dropout(x.astype(self.config.dtype), self.config.dropout, key)


class Attention(nnx.Module):
    """Multi-head attention with grouped key/value heads, in three steps so that a cache can come in between."""

    def __init__(self, key: jax.Array, config: ModelConfig, block: BlockConfig, source: int):
        """Draw query (std `query_std`), key and value (std D^-1/2) and out (std (H E)^-1/2 `output_scale`).

        `source` is the width of what keys and values are made of.
        """
        keys = jax.random.split(key, 4)
        self.block = block
        shape, known = (config.width, config.heads, config.head_dim), (source, block.kv_heads, config.head_dim)
        self.query = self._input("query", keys[0], config, shape, block.query_std)
        self.key = self._input("key", keys[1], config, known, source**-0.5)
        self.value = self._input("value", keys[2], config, known, source**-0.5)
        out = Linear(
            name="out",
            shape=(config.heads, config.head_dim, config.width),
            axes=("heads", "head_dim", "embed"),
            inputs=2,
            std=block.output_scale * (config.heads * config.head_dim) ** -0.5,
            bias=block.out_bias,
        )
        self.out = Projection(keys[3], out, config)
        if block.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config, block.norm_offset)
            self.key_norm = RMSNorm(config.head_dim, config, block.norm_offset)

    def _input(self, name: str, key: jax.Array, config: ModelConfig, shape: tuple[int, ...], std: float) -> Projection:
        axes = ("embed", "heads" if name == "query" else "kv_heads", "head_dim")
        linear = Linear(name=name, shape=shape, axes=axes, inputs=1, std=std, bias=self.block.qkv_bias)
        return Projection(key, linear, config)

    def queries(self, x: Float[Array, "B Q D"], turn: Rotary | None) -> Float[Array, "B Q H E"]:
        """Return the queries, normalised where that is done, turned to their positions."""
        queries = self.query_norm(self.query(x)) if self.block.qk_norm else self.query(x)
        return constrain(queries if turn is None else rotary.apply(queries, *turn), attending.QUERIES)

    def keys_values(self, x: Float[Array, "B K D"], turn: Rotary | None) -> KeysValues:
        """Return keys, normalised and turned like queries, and values."""
        keys = self.key_norm(self.key(x)) if self.block.qk_norm else self.key(x)
        return attending.cut(KeysValues(keys if turn is None else rotary.apply(keys, *turn), self.value(x)))

    def read(self, queries: Float[Array, "B Q H E"], known: KeysValues | Pieces, sight: Sight) -> Float[Array, "B Q D"]:
        """Return what the queries find among keys and values."""
        scores = Scores(self.block.attention_scale, self.block.softcap, sight.bias)
        return self.out(attending.attend(queries, known, sight.scene, sight.windowed, scores))


class RelativeBias(nnx.Module):
    """One learned number per bucket of relative position and head, added to the attention scores."""

    def __init__(self, key: jax.Array, config: ModelConfig, buckets: int):
        """Draw the table with std D^-1/2."""
        self.table = normal(key, (buckets, config.heads), ("buckets", "heads"), config.width**-0.5, config)

    def __call__(self, buckets: Int[Array, "#B Q K"]) -> Float[Array, "#B H Q K"]:
        """Return the bias, of which `ops.relative_bias.bucket` gave the buckets."""
        bias = jnp.moveaxis(jnp.take(self.table[...].astype(jnp.float32), buckets, axis=0), 3, 1)
        return constrain(bias, ("batch", "heads", "length", None))


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated."""

    def __init__(self, key: jax.Array, config: ModelConfig, block: BlockConfig):
        """Draw gate and up (std D^-1/2) and down (std F^-1/2 `output_scale`)."""
        keys = jax.random.split(key, 3)
        shape, axes, bias = (config.width, config.mlp), ("embed", "mlp"), block.mlp_bias
        inner = Linear(name="up", shape=shape, axes=axes, inputs=1, std=config.width**-0.5, bias=bias)
        if config.gated:
            self.gate = Projection(keys[0], dataclasses.replace(inner, name="gate"), config)
        self.up = Projection(keys[1], inner, config)
        std = block.output_scale * config.mlp**-0.5
        down = Linear(name="down", shape=shape[::-1], axes=axes[::-1], inputs=1, std=std, bias=bias)
        self.down = Projection(keys[2], down, config)
        self.config = config

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Apply the layer."""
        if self.config.gated:
            return self.down(_activate(self.config.activation, self.gate(x)) * self.up(x))
        return self.down(_activate(self.config.activation, self.up(x)))


def _activate(name: str, x: Array) -> Array:
    if name in ("gelu", "gelu_tanh"):
        return jax.nn.gelu(x, approximate=name == "gelu_tanh")
    return jax.nn.silu(x) if name == "silu" else jax.nn.relu(x)


class Sublayer(nnx.Module):
    """The norms around a sublayer, and the way back into the residual stream."""

    def __init__(self, config: ModelConfig, block: BlockConfig):
        """Create the norms."""
        self.before = RMSNorm(config.width, config, block.norm_offset)
        if block.post_norms:
            self.after = RMSNorm(config.width, config, block.norm_offset)
        self.rate, self.has_after = config.dropout, block.post_norms

    def add(self, x: Float[Array, "B L D"], y: Float[Array, "B L D"], key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return x + dropout(after(y))."""
        return x + dropout(self.after(y) if self.has_after else y, self.rate, key)


class Cross(NamedTuple):
    """What the decoder sees of the encoder in one layer."""

    known: KeysValues | Pieces
    sight: Sight


class Block(nnx.Module):
    """One transformer layer: self-attention, cross-attention where there is an encoder, feed-forward."""

    def __init__(self, key: jax.Array, config: ModelConfig, block: BlockConfig):
        """Create the sublayers."""
        keys = jax.random.split(key, 4)
        self.attention_norms = Sublayer(config, block)
        self.attention = Attention(keys[0], config, block, config.width)
        if block.cross is not None:
            self.cross_norms = Sublayer(config, block)
            self.cross = Attention(keys[1], config, block, block.cross)
        self.mlp_norms = Sublayer(config, block)
        self.mlp = FeedForward(keys[2], config, block)
        if block.relative_buckets is not None:
            self.relative_bias = RelativeBias(keys[3], config, block.relative_buckets)

    def sight(self, scene: Scene, windowed: Bool[Array, ""] | None, bias: Bias) -> Sight:
        """Return what the layer's queries see, with the bias of this layer's own table where it has one."""
        return Sight(scene, windowed, bias.shared if bias.buckets is None else self.relative_bias(bias.buckets))

    def look(self, x: Float[Array, "B L D"], turn: Rotary | None) -> tuple[Float[Array, "B L H E"], KeysValues]:
        """Return the queries, and the keys and values, of the layer's inputs."""
        normed = self.attention_norms.before(x)
        return self.attention.queries(normed, turn), self.attention.keys_values(normed, turn)

    def finish(
        self,
        x: Float[Array, "B L D"],
        queries: Float[Array, "B L H E"],
        known: KeysValues | Pieces,
        sight: Sight,
        cross: Cross | None,
        key: jax.Array | None,
    ) -> Float[Array, "B L D"]:
        """Return the layer's outputs, given what `look` returned (or a cache of it)."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.attention_norms.add(x, self.attention.read(queries, known, sight), keys[0])
        if cross is not None:
            queries = self.cross.queries(self.cross_norms.before(x), None)
            x = self.cross_norms.add(x, self.cross.read(queries, cross.known, cross.sight), keys[1])
        return self.mlp_norms.add(x, self.mlp(self.mlp_norms.before(x)), keys[2])


def zero_padding(scores: TokenScores, segments: Int[Array, "B T"]) -> TokenScores:
    """Return the scores with 0 where there is no token."""
    return TokenScores(*(jnp.where(segments > 0, score, 0.0) for score in scores))
