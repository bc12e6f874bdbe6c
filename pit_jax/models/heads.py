"""Scalar heads: reward and gap models, which score a response, and value models, which score each of its tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.errors import invalid
from pit_jax.core.types import Conditional, Params
from pit_jax.models.api import Attention, ConditionalLM
from pit_jax.ops import segment, shared

READOUTS = ("mean_difference", "mean", "last")
ATTENTIONS = ("bidirectional", "causal")

# Small, so that training starts from scores near 0; not 0, so that the trunk has a gradient from the first step.
_HEAD_SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class _WithHead:
    """A language model with a linear map D -> 1; parameters are `{"trunk": ..., "head": {"kernel", "bias"}}`."""

    lm: ConditionalLM

    @property
    def width(self) -> int:
        """Width D of the states that the head reads."""
        return self.lm.config.width

    def init(self, key: jax.Array) -> Params:
        """Return fresh parameters: the kernel with std 0.1 D^-1/2, the bias 0."""
        trunk_key, head_key = jax.random.split(key)
        return self.with_trunk(self.lm.init(trunk_key), head_key)

    def with_trunk(self, trunk: Params, key: jax.Array) -> Params:
        """Return parameters with a given trunk and a fresh head."""
        kernel = _HEAD_SCALE * self.width**-0.5 * jax.random.normal(key, (self.width,), jnp.float32)
        return {"trunk": trunk, "head": {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}}

    def abstract(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        head = jax.ShapeDtypeStruct((self.width,), jnp.float32)
        return {"trunk": self.lm.abstract(), "head": {"kernel": head, "bias": jax.ShapeDtypeStruct((), jnp.float32)}}

    def axes(self) -> Params:
        """Return the parameters' logical axis names."""
        return {"trunk": self.lm.axes(), "head": {"kernel": ("norm",), "bias": ()}}


@dataclasses.dataclass(frozen=True)
class ScalarModel(_WithHead):
    """Reward model R(x, y), or gap model r_gap(y, y_ref | x) where prompts contain a reference.

    readout: where the scalar is read, of final hidden states h (float32, per packed segment):

        mean_difference   w . (mean of h over the response - mean of h over the reference) + b
        mean              w . (mean of h over response and reference) + b
        last              w . (h of the last response token) + b

      A row without a reference has no second mean: the first two are then the mean over the response.
    attention: "bidirectional", so that reference and response see each other, or "causal", so that responses to one
      prompt can share it (`models/sharing.py`).
    """

    readout: str = "mean_difference"
    attention: Attention = "bidirectional"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
          ConfigError: one of them is unknown.
        """
        if self.readout not in READOUTS:
            raise invalid("ScalarModel.readout", self.readout, f"be one of {', '.join(READOUTS)}", "Use one of them.")
        if self.attention not in ATTENTIONS:
            rule = f"be one of {', '.join(ATTENTIONS)}"
            raise invalid("ScalarModel.attention", self.attention, rule, "Use one of them.")
        widths = (self.lm.config.prompt_width, self.lm.config.width)
        if self.attention == "causal" and self.readout != "last" and widths[0] != widths[1]:
            rule = f"be 'bidirectional' as encoder and decoder have different widths, {widths[0]} and {widths[1]}"
            raise invalid("ScalarModel.attention", self.attention, rule, "Or read 'last', of the decoder alone.")

    @property
    def width(self) -> int:
        """Width D of the states that the head reads: an encoder's when attention is bidirectional."""
        config = self.lm.config
        return config.prompt_width if self.attention == "bidirectional" else config.width

    def scores(self, params: Params, x: Conditional, count: int, key: jax.Array | None = None) -> Float[Array, "B M"]:
        """Return the score of each segment 1..count of each row of responses, the bias alone where there is none."""
        hidden = self.lm.hidden(params["trunk"], x, key, attention=self.attention)
        x, rows = shared.joined(x), x.response.shape[0]
        segments, reference = (shared.repeated(part, rows) for part in (x.prompt_segments, x.prompt_reference))
        # Losses compare scores, so none determines b. Training it would add up rounding errors: another b on each mesh.
        bias = jax.lax.stop_gradient(params["head"]["bias"])
        # A mean of products is the product of the mean, and this way nothing of size [B, M, D] exists.
        response = _project(params["head"], hidden.response)
        if self.readout == "last":
            weights = _is_last(x.response_segments).astype(jnp.float32)
            return segment.means(response, x.response_segments, weights, count) + bias
        prompt = shared.repeated(_project(params["head"], hidden.prompt), rows)
        ones, reference = jnp.ones(x.response.shape, jnp.float32), reference.astype(jnp.float32)
        if self.readout == "mean":
            values, segments, weights = (
                jnp.concatenate(parts, axis=1)
                for parts in ((prompt, response), (segments, x.response_segments), (reference, ones))
            )
            score = segment.means(values, segments, weights, count)
        else:
            score = segment.means(response, x.response_segments, ones, count)
            score = score - segment.means(prompt, segments, reference, count)
        return score + bias


@dataclasses.dataclass(frozen=True)
class ValueModel(_WithHead):
    """The value function of policy-gradient methods."""

    def values(self, params: Params, x: Conditional, key: jax.Array | None = None) -> Float[Array, "B T"]:
        """Return the value of the state before each response token, w . h + b in float32; 0 at padding."""
        states = self.lm.predictors(params["trunk"], x, key)
        values = _project(params["head"], states) + params["head"]["bias"]
        return jnp.where(x.response_segments > 0, values, 0.0)


def _project(head: Params, states: Float[Array, "B L D"]) -> Float[Array, "B L"]:
    kernel = head["kernel"]
    return jnp.einsum("bld,d->bl", states.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


def _is_last(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Return which tokens are the last of their segment."""
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments > 0) & (segments != after)
