"""What a response is worth: R_P(x, y) for the policy, R_PIT(x, y, y_ref) for the improver.

Each function starts the scoring and returns what waits for the scores, so that the devices are not kept waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pit_jax.core.types import Params
from pit_jax.decode.batches import Response, Scorer
from pit_jax.rl.curriculum import Context
from pit_jax.text.codec import Codec

Pending = Callable[[], Float[np.ndarray, " N"]]
"""Waits for scores that are being computed, and returns them."""


def policy_reward(
    scorer: Scorer, params: Params, codec: Codec, prompts: Sequence[Sequence[int]], answers: Sequence[Response]
) -> Pending:
    """Start R_P(x, y) for every prompt (raw ids, once per answer) and its answer."""
    return scorer.begin(params, [codec.policy_prompt(prompt) for prompt in prompts], answers)


def gap_reward(
    scorer: Scorer, params: Params, codec: Codec, contexts: Sequence[Context], answers: Sequence[Response]
) -> Pending:
    """Start r_gap(y, y_ref | x) for every context (x, y_ref) (once per answer) and its answer y.

    Only differences of gaps mean anything: a gap is compared with the model's own zero, r_gap(y_ref, y_ref | x).
    """
    return scorer.begin(params, [codec.gap_prompt(*context) for context in contexts], answers)
