"""Prompts with several responses, as arrays: successive responses have the same prompt (`core.types.Conditional`)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from pit_jax.core.types import Conditional


def is_shared(x: Conditional) -> bool:
    """Return whether several responses have the same prompt, or prompts that begin alike."""
    return x.rest is not None or x.prompt.shape[0] != x.response.shape[0]


def repeated(part: Array, rows: int) -> Array:
    """Return the rows of prompts once for each of the `rows` rows that continue them."""
    times = rows // part.shape[0]
    return part if times == 1 else jnp.repeat(part, times, axis=0)


def joined(x: Conditional) -> Conditional:
    """Return prompts without a rest: each as `[beginning | rest]`, with what padding there is in between."""
    if x.rest is None:
        return x
    rows = x.rest.tokens.shape[0]
    pairs = ((x.prompt, x.rest.tokens), (x.prompt_segments, x.rest.segments), (x.prompt_reference, x.rest.reference))
    prompt, segments, reference = (jnp.concatenate([repeated(a, rows), b], axis=1) for a, b in pairs)
    return dataclasses.replace(x, prompt=prompt, prompt_segments=segments, prompt_reference=reference, rest=None)


def whole(x: Conditional) -> tuple[Conditional, Int[Array, "Y S"] | None]:
    """Return prompts without a rest and without padding inside, and where each column of `joined` went.

    None stands for no change: no prompt has a rest.
    """
    if x.rest is None:
        return x, None
    x = joined(x)
    order = jnp.argsort(x.prompt_segments == 0, axis=1, stable=True)
    prompt, segments, reference = (
        jnp.take_along_axis(part, order, axis=1) for part in (x.prompt, x.prompt_segments, x.prompt_reference)
    )
    x = dataclasses.replace(x, prompt=prompt, prompt_segments=segments, prompt_reference=reference)
    return x, jnp.argsort(order, axis=1)


def apart(x: Conditional) -> Conditional:
    """Return the plain form: a whole prompt for every response."""
    x, rows = whole(x)[0], x.response.shape[0]
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
