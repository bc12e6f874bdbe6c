"""Prompts with several responses, as arrays: successive responses have the same prompt (`core.types.Conditional`)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from pit_jax.core.types import Conditional


def is_shared(x: Conditional) -> bool:
    """Return whether prompts have several responses."""
    return x.prompt.shape[0] != x.response.shape[0]


def repeated(part: Array, rows: int) -> Array:
    """Return the rows of prompts once for each of the `rows` rows that continue them."""
    times = rows // part.shape[0]
    return part if times == 1 else jnp.repeat(part, times, axis=0)


def apart(x: Conditional) -> Conditional:
    """Return the plain form: a prompt for every response."""
    rows = x.response.shape[0]
    return dataclasses.replace(
        x,
        prompt=repeated(x.prompt, rows),
        prompt_segments=repeated(x.prompt_segments, rows),
        prompt_reference=repeated(x.prompt_reference, rows),
    )


def share(x: Conditional, samples: int) -> Conditional:
    """Return rows of which successive `samples` have the same prompt with each prompt once."""
    return dataclasses.replace(
        x,
        prompt=x.prompt[::samples],
        prompt_segments=x.prompt_segments[::samples],
        prompt_reference=x.prompt_reference[::samples],
    )
