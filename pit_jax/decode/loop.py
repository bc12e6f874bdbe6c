"""Sampling of responses in one compiled program: batched prefill, then a loop that ends with the last row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pit_jax.core.errors import invalid
from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode import passes
from pit_jax.decode.passes import Alike, SampledProgram
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM


def generate(
    lm: ConditionalLM,
    params: Params,
    prompts: Prompts,
    keys: Key[Array, " B"],
    sampling: Sampling,
    *,
    max_new: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Samples:
    """Sample a response of at most `max_new` tokens for every key, B / X of them for each of X prompts in turn.

    Each prompt is read once: row b, which answers prompt b // (B / X), shares its keys and values with its fellows. A
    row ends with the first token out of `eos_ids`; what follows is `pad_id`, outside the mask, with
    log-probability 0. The loop ends with the longest row. `logp` is the untempered log-probability, the one
    `lm.logprobs` gives. Row b uses `keys[b]` only: its sample does not depend on its batch mates, on the
    size of the batch or on the width of the padding. With `Sampling.draft_tokens` the sample is the same, and `passes`
    says how many times the row went through the model for it.

    Raises:
      ConfigError: `max_new` is not positive, `eos_ids` is empty, or the keys cannot be shared out among the prompts.
    """
    function, arguments = call(lm, params, prompts, keys, sampling, max_new=max_new, eos_ids=eos_ids, pad_id=pad_id)
    return function(*arguments)


def call(
    lm: ConditionalLM,
    params: Params,
    prompts: Prompts,
    keys: Key[Array, " B"],
    sampling: Sampling,
    *,
    max_new: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[Any, tuple[Any, ...]]:
    """Return the jitted function that `generate` calls and its arguments; shapes in the place of arrays will do.

    Raises:
      ConfigError: as of `generate`.
    """
    if max_new < 1:
        raise invalid("generate.max_new", max_new, "be at least 1", "Leave room for a response in the lengths.")
    if not eos_ids:
        raise invalid("generate.eos_ids", eos_ids, "name at least one token", "Give the tokenizer's eos_ids.")
    count, each = keys.shape[0], prompts.tokens.shape[0]
    if count % each:
        raise invalid("generate.keys", count, f"be a multiple of the {each} prompts", "Give each as many samples.")
    program = SampledProgram.of(sampling, lm=lm, max_new=max_new, eos_ids=tuple(eos_ids), pad_id=pad_id)
    return _run, (params, prompts, keys, jnp.float32(sampling.temperature), program)


@functools.partial(jax.jit, static_argnames="program")
def _run(
    params: Params, prompts: Prompts, keys: Key[Array, " B"], temperature: Float[Array, ""], program: SampledProgram
) -> Samples:
    draws = Alike(keys, temperature, program)
    first = passes.begin(params, prompts, draws, program)
    ready = program.lm.ready(params)
    last = jax.lax.while_loop(
        lambda rows: ~jnp.all(rows.over), lambda rows: passes.advance(ready, rows, draws, program), first
    )
    return last.samples
