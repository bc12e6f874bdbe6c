"""Rotary position embedding in the half-split layout of Llama, Qwen and Gemma, and its stretching to longer texts."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pit_jax.core.errors import invalid, nearest

SCALINGS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the angles' frequencies f are lowered, so that texts longer than those of pretraining keep their meaning.

    With the wavelength w = 2 pi / f in tokens and P = `original_max_positions`, the length of pretraining:

        linear   f / factor
        llama3   f where w < P / high_freq_factor, f / factor where w > P / low_freq_factor, in between a mixture
                 that is linear in P / w
        yarn     f where the i-th pair turns more than `beta_fast` times in P tokens, f / factor where it turns less
                 than `beta_slow` times, in between a mixture that is linear in i

    attention_factor: yarn multiplies cosine and sine by it (attention scores by its square); by default
      1 + log(factor) / 10.

    Source: Chen et al. 2023 (arXiv 2306.15595); Llama 3.1 (arXiv 2407.21783); Peng et al. 2023 (arXiv 2309.00071).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range, missing for this kind, or belongs to another kind.
        """
        if self.kind not in SCALINGS:
            hint = f"Use one of them.{nearest(self.kind, SCALINGS)}"
            raise invalid("RopeScaling.kind", self.kind, f"be one of {', '.join(SCALINGS)}", hint)
        if not self.factor >= 1:
            raise invalid("RopeScaling.factor", self.factor, "be at least 1", "It is how much longer texts become.")
        most = self.original_max_positions
        if self.kind != "linear" and (most is None or most < 1):
            rule, fix = f"be at least 1 for {self.kind}", "Give the length of pretraining, such as 8192."
            raise invalid("RopeScaling.original_max_positions", most, rule, fix)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            rule, fix = f"be more than low_freq_factor = {self.low_freq_factor} > 0", "1 and 4 are Llama's."
            raise invalid("RopeScaling.high_freq_factor", self.high_freq_factor, rule, fix)
        if not 0 < self.beta_slow < self.beta_fast:
            rule, fix = f"be more than beta_slow = {self.beta_slow} > 0", "1 and 32 are usual."
            raise invalid("RopeScaling.beta_fast", self.beta_fast, rule, fix)
        if self.attention_factor is not None and (self.kind != "yarn" or not self.attention_factor > 0):
            rule = "be positive, and be given for yarn only"
            raise invalid("RopeScaling.attention_factor", self.attention_factor, rule, "Leave it out.")

    @property
    def amplitude(self) -> float:
        """Factor on cosine and sine."""
        if self.kind != "yarn":
            return 1.0
        return 1.0 + 0.1 * math.log(self.factor) if self.attention_factor is None else self.attention_factor


def frequencies(width: int, base: float, scaling: RopeScaling | None) -> np.ndarray:
    """Return the angles per position, base ** (-2 i / width) for i < width / 2, as `scaling` lowers them.

    Float32 throughout and rounded where other implementations round: at position 100,000 the last bit of a frequency
    is a hundredth of a radian.
    """
    exponents = np.arange(0, width, 2).astype(np.float32) / np.float32(width)
    plain = np.float32(1) / np.power(base, exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor)
    length = scaling.original_max_positions
    assert length is not None, scaling
    stretched = _llama3(plain, length, scaling) if scaling.kind == "llama3" else _yarn(plain, base, length, scaling)
    return stretched.astype(np.float32)


def _llama3(plain: np.ndarray, length: int, scaling: RopeScaling) -> np.ndarray:
    turns = length * plain / np.float32(2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0, 1)
    return (1 - share) * plain / scaling.factor + share * plain


def _yarn(plain: np.ndarray, base: float, length: int, scaling: RopeScaling) -> np.ndarray:
    width = 2 * len(plain)

    def pair(turns: float) -> float:
        """Return the index i of the pair that turns so many times in the length of pretraining."""
        wavelength = length / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), width - 1)
    index = np.arange(width // 2, dtype=np.float32)
    lowered = np.clip((index - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / scaling.factor * lowered + plain * (1 - lowered)


def table(
    positions: Int[Array, "B L"], width: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
    """Return (cosine, sine) of the angles position * frequency[i], i < width / 2, in float32, times the amplitude."""
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies(width, base, scaling))[None, None, :]
    if scaling is None or scaling.amplitude == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return scaling.amplitude * jnp.cos(angles), scaling.amplitude * jnp.sin(angles)


def apply(
    x: Float[Array, "B L H E"], cosine: Float[Array, "#B L half"], sine: Float[Array, "#B L half"]
) -> Float[Array, "B L H E"]:
    """Turn each pair (x[i], x[i + E/2]) by the angle whose cosine and sine `table` gave; the dtype stays."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def rotate(x: Float[Array, "B L H E"], positions: Int[Array, "B L"], base: float) -> Float[Array, "B L H E"]:
    """Return `x` with each head's vector turned by angles proportional to its position.

    Products <rotate(q, m), rotate(k, n)> depend on m - n alone. E must be even. Where several calls share
    positions (queries and keys, all layers), `table` once and `apply` often saves the trigonometry.

    Source: Su et al. 2021 (arXiv 2104.09864).
    """
    return apply(x, *table(positions, x.shape[-1], base))
