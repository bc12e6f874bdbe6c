"""What improvement has to beat: more samples of the policy, the best of them chosen by the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pit_jax.core.errors import invalid
from pit_jax.decode.batches import Response
from pit_jax.improve.accept import best, usable
from pit_jax.improve.loop import Answerer, Judge, sample_keys
from pit_jax.text.codec import Codec


class BestOf(NamedTuple):
    """The n samples of one prompt, their rewards, and the best of the samples."""

    samples: tuple[Response, ...]
    rewards: tuple[float, ...]
    answer: Response


def best_of_n(
    policy: Answerer, reward: Judge, codec: Codec, prompts: Sequence[Sequence[int]], n: int, seed: int
) -> list[BestOf]:
    """Return for every prompt (raw ids) the best of n policy samples by R_P(x, y).

    Sample 0 is the one `first_answers` draws with the same seed, so the comparison with the Original is paired
    as that of improvement is. A sample that was cut off is chosen only if all were.

    Raises:
      ConfigError: n is not positive.
    """
    if n < 1:
        raise invalid("best_of_n.n", n, "be at least 1", "2 costs as much sampling as one improvement step.")
    rows = [codec.policy_prompt(prompt) for prompt in prompts]
    samples = policy(rows, sample_keys(seed, "answers", 0, range(len(prompts)), n))
    rewards = reward([row for row in rows for _ in range(n)], samples).reshape(len(prompts), n)
    chosen = best(usable(rewards, samples))
    grouped = [tuple(samples[start : start + n]) for start in range(0, len(samples), n)]
    return [
        BestOf(group, tuple(values.tolist()), group[number])
        for group, values, number in zip(grouped, np.asarray(rewards), chosen, strict=True)
    ]
