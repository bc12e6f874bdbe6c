"""Rollouts: G sampled responses for every prompt of an RL step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.rng import key_for
from pit_jax.core.types import Conditional, Params, Prompts, Samples
from pit_jax.decode.batches import Response, Sampler, responses, row_keys, with_samples
from pit_jax.text.codec import PromptRow, rows_to_prompts


class Rollout(NamedTuple):
    """N = X * G prompts and what was sampled for them, as NumPy arrays; row x * G + g is sample g of prompt x."""

    prompts: Prompts
    samples: Samples

    @property
    def inputs(self) -> Conditional:
        """The same, token for token, as the policy gradient reads it."""
        return with_samples(self.prompts, self.samples)

    @property
    def responses(self) -> list[Response]:
        """The responses as lists of ids, for the reward models."""
        return responses(self.samples)


def rollout_keys(seed: int, step: int, count: int) -> Key[Array, " N"]:
    """Return the keys of a step's samples: each depends on (seed, step, number of the sample in the step) only."""
    return row_keys(key_for(seed, "rollout", step), np.arange(count))


def rollout(
    sampler: Sampler, params: Params, rows: Sequence[PromptRow], samples_per_prompt: int, keys: Key[Array, " N"]
) -> Rollout:
    """Sample `samples_per_prompt` responses for each of X prompts; `keys` has one key for each of the N samples.

    A prompt is read once for all of its samples.
    """
    prompts = rows_to_prompts(rows, sampler.width, sampler.pad_id)
    return Rollout(repeated(prompts, samples_per_prompt), sampler.sample(params, prompts, keys))


def begin_rollout(
    sampler: Sampler, params: Params, rows: Sequence[PromptRow], samples_per_prompt: int, keys: Key[Array, " N"]
) -> Callable[[], Rollout]:
    """Start what `rollout` does, and return what waits for it; the parameters may be given up meanwhile."""
    prompts = rows_to_prompts(rows, sampler.width, sampler.pad_id)
    samples = sampler.begin(params, prompts, keys)
    return lambda: Rollout(repeated(prompts, samples_per_prompt), samples())


def per_pass(samples: Samples) -> Metrics:
    """Return how many tokens a pass of the model gave on average, where tokens were drafted; 1 is none for a draft.

    The first tokens, which come with the prompts' passes, do not count.
    """
    if samples.passes is None:
        return {}
    later = np.sum(samples.mask) - len(samples.mask)
    return {"tokens_per_pass": Metric(np.float32(later), np.float32(np.sum(samples.passes)))}


def repeated(prompts: Prompts, samples_per_prompt: int) -> Prompts:
    """Return each prompt as many times as it is answered."""
    return jax.tree.map(lambda leaf: np.repeat(leaf, samples_per_prompt, axis=0), prompts)
