"""The parts both model families are built from: embedding, attention, feed-forward layer, block."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.types import Conditional, TokenScores
from pit_jax.models.config import ModelConfig
from pit_jax.ops import attention, norm, rotary, segment

PROMPT, REFERENCE, RESPONSE = range(3)
"""Roles of tokens, the rows of the role embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the families' blocks differ in, beyond `ModelConfig`.

    kv_heads: key/value heads. norm_offset: added to the stored weights of norms. qkv_bias: biases on query, key and
    value. post_norms: norms on each sublayer's output as well. cross: attend to an encoder too. attention_scale:
    factor of the dot products. softcap: bound of the attention scores. query_std: standard deviation of the query
    projection at the start. output_scale: factor on that of the projections back into the residual stream.
    """

    kv_heads: int
    norm_offset: float
    qkv_bias: bool
    post_norms: bool
    cross: bool
    attention_scale: float
    softcap: float | None
    query_std: float
    output_scale: float


class Sight(NamedTuple):
    """What queries see: `mask[#B, 1, Q, K]`, and `bias[#B, H, Q, K]` on the scores where there is one."""

    mask: Bool[Array, "#B 1 Q K"]
    bias: Float[Array, "#B H Q K"] | None


class KeysValues(NamedTuple):
    """Keys and values of one layer, `[B, K, Kh, E]` each."""

    keys: Float[Array, "B K Kh E"]
    values: Float[Array, "B K Kh E"]


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


class Projection(nnx.Module):
    """y = einsum(equation, x, kernel) + bias, in the compute dtype."""

    def __init__(self, equation: str, kernel: nnx.Param[Array], bias: nnx.Param[Array] | None, config: ModelConfig):
        """Take over the parameters."""
        self.kernel = kernel
        self.equation = equation
        self.dtype = config.dtype
        if bias is not None:
            self.bias = bias
        self.has_bias = bias is not None

    def __call__(self, x: Float[Array, "B L ..."]) -> Float[Array, "B L ..."]:
        """Project."""
        y = jnp.einsum(self.equation, x, self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)[None, None] if self.has_bias else y


class RMSNorm(nnx.Module):
    """Root-mean-square norm whose weight is `scale + offset` and 1 at the start."""

    def __init__(self, config: ModelConfig, offset: float):
        """Create the weights."""
        value = jnp.full((config.width,), 1.0 - offset, config.param_dtype)
        self.scale = nnx.Param(value, axes=("norm",))
        self.offset, self.eps = offset, config.norm_eps

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
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

    def __init__(self, key: jax.Array, config: ModelConfig, block: BlockConfig):
        """Draw query (std `query_std`), key and value (std D^-1/2) and out (std (H E)^-1/2 `output_scale`)."""
        keys = jax.random.split(key, 4)
        self.block = block
        self.query = self._input(keys[0], config, "heads", config.heads, block.query_std)
        self.key = self._input(keys[1], config, "kv_heads", block.kv_heads, config.width**-0.5)
        self.value = self._input(keys[2], config, "kv_heads", block.kv_heads, config.width**-0.5)
        inner = config.heads * config.head_dim
        shape, axes = (config.heads, config.head_dim, config.width), ("heads", "head_dim", "embed")
        kernel = normal(keys[3], shape, axes, block.output_scale * inner**-0.5, config)
        self.out = Projection("blhe,hed->bld", kernel, None, config)

    def _input(self, key: jax.Array, config: ModelConfig, axis: str, heads: int, std: float) -> Projection:
        kernel = normal(key, (config.width, heads, config.head_dim), ("embed", axis, "head_dim"), std, config)
        zeros = jnp.zeros((heads, config.head_dim), config.param_dtype)
        bias = nnx.Param(zeros, axes=(axis, "head_dim")) if self.block.qkv_bias else None
        return Projection("bld,dhe->blhe", kernel, bias, config)

    def queries(self, x: Float[Array, "B Q D"], turn: Rotary | None) -> Float[Array, "B Q H E"]:
        """Return the queries, turned to their positions."""
        queries = self.query(x)
        return queries if turn is None else rotary.apply(queries, *turn)

    def keys_values(self, x: Float[Array, "B K D"], turn: Rotary | None) -> KeysValues:
        """Return keys, turned to their positions, and values."""
        keys = self.key(x)
        return KeysValues(keys if turn is None else rotary.apply(keys, *turn), self.value(x))

    def read(self, queries: Float[Array, "B Q H E"], known: KeysValues, sight: Sight) -> Float[Array, "B Q D"]:
        """Return what the queries find among keys and values."""
        found = attention.attend(
            queries,
            *known,
            mask=sight.mask,
            bias=sight.bias,
            scale=self.block.attention_scale,
            softcap=self.block.softcap,
        )
        return self.out(found)


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated."""

    def __init__(self, key: jax.Array, config: ModelConfig, block: BlockConfig):
        """Draw gate and up (std D^-1/2) and down (std F^-1/2 `output_scale`)."""
        keys = jax.random.split(key, 3)
        shape, axes, std = (config.width, config.mlp), ("embed", "mlp"), config.width**-0.5
        if config.gated:
            self.gate = Projection("bld,df->blf", normal(keys[0], shape, axes, std, config), None, config)
        self.up = Projection("bld,df->blf", normal(keys[1], shape, axes, std, config), None, config)
        down = normal(keys[2], shape[::-1], axes[::-1], block.output_scale * config.mlp**-0.5, config)
        self.down = Projection("blf,fd->bld", down, None, config)
        self.config = config

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Apply the layer."""
        if self.config.gated:
            return self.down(_activate(self.config.activation, self.gate(x)) * self.up(x))
        return self.down(_activate(self.config.activation, self.up(x)))


def _activate(name: str, x: Array) -> Array:
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    return jax.nn.silu(x) if name == "silu" else jax.nn.relu(x)


class Sublayer(nnx.Module):
    """The norms around a sublayer, and the way back into the residual stream."""

    def __init__(self, config: ModelConfig, block: BlockConfig):
        """Create the norms."""
        self.before = RMSNorm(config, block.norm_offset)
        if block.post_norms:
            self.after = RMSNorm(config, block.norm_offset)
        self.rate, self.has_after = config.dropout, block.post_norms

    def add(self, x: Float[Array, "B L D"], y: Float[Array, "B L D"], key: jax.Array | None) -> Float[Array, "B L D"]:
        """Return x + dropout(after(y))."""
        return x + dropout(self.after(y) if self.has_after else y, self.rate, key)


class Cross(NamedTuple):
    """What the decoder sees of the encoder in one layer."""

    known: KeysValues
    sight: Sight


class Block(nnx.Module):
    """One transformer layer: self-attention, cross-attention where there is an encoder, feed-forward."""

    def __init__(self, key: jax.Array, config: ModelConfig, block: BlockConfig):
        """Create the sublayers."""
        keys = jax.random.split(key, 3)
        self.attention_norms = Sublayer(config, block)
        self.attention = Attention(keys[0], config, block)
        if block.cross:
            self.cross_norms = Sublayer(config, block)
            self.cross = Attention(keys[1], config, block)
        self.mlp_norms = Sublayer(config, block)
        self.mlp = FeedForward(keys[2], config, block)

    def look(self, x: Float[Array, "B L D"], turn: Rotary | None) -> tuple[Float[Array, "B L H E"], KeysValues]:
        """Return the queries, and the keys and values, of the layer's inputs."""
        normed = self.attention_norms.before(x)
        return self.attention.queries(normed, turn), self.attention.keys_values(normed, turn)

    def finish(
        self,
        x: Float[Array, "B L D"],
        queries: Float[Array, "B L H E"],
        known: KeysValues,
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


def logits(
    hidden: Float[Array, "B D"], head: Float[Array, "D V"], scale: float, softcap: float | None
) -> Float[Array, "B V"]:
    """Return the float32 logits of a few positions (decoding); training uses `ops.logprob.token_scores`."""
    raw = scale * jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


def zero_padding(scores: TokenScores, segments: Int[Array, "B T"]) -> TokenScores:
    """Return the scores with 0 where there is no token."""
    return TokenScores(*(jnp.where(segments > 0, score, 0.0) for score in scores))
