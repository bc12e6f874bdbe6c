"""Sampling of responses in one compiled program: batched prefill, then a loop that ends with the last row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pit_jax.core.errors import invalid
from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode.sampling import Sampling, draw
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """Everything that decides which program is compiled; hashable, static under jit."""

    lm: ConditionalLM
    top_k: int
    top_p: float
    draws: str
    max_new: int
    eos_ids: tuple[int, ...]
    pad_id: int


class _Loop(NamedTuple):
    """State of the loop after tokens 0..t-1 of every row are drawn; `token` is the newest."""

    t: Int[Array, ""]
    cache: Any
    token: Int[Array, " B"]
    finished: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logp: Float[Array, "B T"]


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
    size of the batch or on the width of the padding.

    Raises:
      ConfigError: `max_new` is not positive, `eos_ids` is empty, or the keys cannot be shared out among the prompts.
    """
    if max_new < 1:
        raise invalid("generate.max_new", max_new, "be at least 1", "Leave room for a response in the lengths.")
    if not eos_ids:
        raise invalid("generate.eos_ids", eos_ids, "name at least one token", "Give the tokenizer's eos_ids.")
    rows, each = keys.shape[0], prompts.tokens.shape[0]
    if rows % each:
        raise invalid("generate.keys", rows, f"be a multiple of the {each} prompts", "Give each as many samples.")
    program = _Program(
        lm=lm,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        draws=sampling.draws,
        max_new=max_new,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
    )
    return _run(params, prompts, keys, jnp.float32(sampling.temperature), program)


@functools.partial(jax.jit, static_argnames="program")
def _run(
    params: Params, prompts: Prompts, keys: Key[Array, " B"], temperature: Float[Array, ""], program: _Program
) -> Samples:
    rows = keys.shape[0]
    shape, axes = (rows, program.max_new), ("batch", None)
    empty = _Loop(
        t=jnp.int32(0),
        cache=None,
        token=constrain(jnp.zeros(rows, jnp.int32), axes[:1]),
        finished=constrain(jnp.zeros(rows, bool), axes[:1]),
        tokens=constrain(jnp.full(shape, program.pad_id, jnp.int32), axes),
        mask=constrain(jnp.zeros(shape, bool), axes),
        logp=constrain(jnp.zeros(shape, jnp.float32), axes),
    )
    logits, cache = program.lm.prefill(params, prompts, program.max_new, rows // prompts.tokens.shape[0])
    first = _append(empty._replace(cache=cache), logits, keys, temperature, program)

    ready = program.lm.ready(params)

    def advance(loop: _Loop) -> _Loop:
        logits, cache = program.lm.step(ready, loop.cache, loop.token)
        return _append(loop._replace(cache=cache), logits, keys, temperature, program)

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.t < program.max_new) & ~jnp.all(loop.finished)

    last = jax.lax.while_loop(unfinished, advance, first)
    return Samples(tokens=last.tokens, mask=last.mask, logp=last.logp, finished=last.finished)


def _append(
    loop: _Loop,
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    program: _Program,
) -> _Loop:
    """Draw token t of every row that has not ended and write it down."""
    drawn, logp = draw(logits, keys, loop.t, temperature, program.top_k, program.top_p, program.draws)
    going = ~loop.finished
    token = jnp.where(going, drawn, program.pad_id)
    ends = jnp.isin(drawn, jnp.asarray(program.eos_ids, jnp.int32))
    return loop._replace(
        t=loop.t + 1,
        token=token,
        finished=loop.finished | (going & ends),
        tokens=loop.tokens.at[:, loop.t].set(token),
        mask=loop.mask.at[:, loop.t].set(going),
        logp=loop.logp.at[:, loop.t].set(jnp.where(going, logp, 0.0)),
    )
