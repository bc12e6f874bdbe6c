"""What the reward that DPO implies, beta log pi / pi_ref, is worth on held-out records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pit_jax.evaluation import estimates, rewards


def report(
    ratios: Float[np.ndarray, "2 n"],
    lengths: Float[np.ndarray, "2 n"],
    groups: Sequence[str],
    clean: Bool[np.ndarray, " n"] | None,
    *,
    beta: float,
    seed: int,
) -> dict[str, Any]:
    """Return the held-out report of a policy trained by DPO; intervals are bootstrapped over prompts.

    Args:
      ratios: log pi(y|x) - log pi_ref(y|x) of the chosen and of the rejected response, in nats.
      lengths: tokens of both.
      groups: the prompt of each record.
      clean: where an exact judge agrees with the label, if there is one.
      beta: of the loss.
      seed: of the bootstrap.
    """
    margin, difference = beta * (ratios[0] - ratios[1]), lengths[0] - lengths[1]
    accuracy = {"chosen > rejected": estimates.share(margin, groups, seed=seed)}
    if clean is not None:
        kept = [group for group, there in zip(groups, clean, strict=True) if there]
        accuracy["chosen > rejected (clean)"] = estimates.share(margin[clean], kept, seed=seed)
    accuracy["longer wins (baseline)"] = estimates.share(difference, groups, seed=seed)
    means = {
        "margin": margin,
        "log-ratio of chosen": ratios[0],
        "log-ratio of rejected": ratios[1],
        "length of chosen": lengths[0],
        "length of rejected": lengths[1],
    }
    return {
        "accuracy": estimates.as_json(accuracy),
        "means": {name: estimates.mean(values, groups, seed=seed).as_json() for name, values in means.items()},
        "scalars": {
            "calibration error": rewards.calibration_error(margin),
            "length correlation": rewards.correlation(margin, difference),
        },
        "calibration": rewards.calibration(margin),
    }
