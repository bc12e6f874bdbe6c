"""Settings of the RL objective."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pit_jax.core.errors import invalid
from pit_jax.losses.policy import PolicyLoss

ESTIMATORS = ("rloo", "reinforce", "group", "ppo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """How rewards become an update: J = E[reward] - beta KL(policy || anchor).

    estimator: "rloo" (leave-one-out baseline), "group" (GRPO's normalisation), "reinforce" (running baseline):
      one advantage per response; "ppo": one per token, by GAE with a value head.
    beta: weight of the KL, in units of reward per nat. It means nothing without the reward's scale: a gap
      reward has a standard deviation of about 2.
    samples_per_prompt: G, responses drawn for every prompt of a step.
    no_eos_penalty: what a response that was cut off before it ended loses, in units of reward.
    whiten: shift and scale the advantages of a step to mean 0 and standard deviation 1.
    epochs, minibatches: passes over the samples of a step, and updates in each pass.
    baseline_decay: weight of the past in the running baseline of "reinforce".
    gamma, lam, value_weight, value_clip: discount, GAE's lambda, weight and clip range of the value loss ("ppo").
    policy: the policy loss; several updates on the same samples need "ppo_clip".
    one_step_off: sample the answers of a step, from the second on, with the parameters before the last update, so that
      devices generate while the host prepares that update. The loss corrects for it (`PolicyLoss.truncation`, or
      PPO's ratio); the KL in the reward stays that of the parameters that sampled.
    rescore: have the training graph say the samples' log-probabilities before the update. Without, the sampler's own
      stand for them: the same parameters' up to rounding (also that of `cache_dtype`), and a forward pass less. Only
      for one update on samples of the present parameters, which then compares the two.
    """

    estimator: Literal["rloo", "reinforce", "group", "ppo"] = "rloo"
    beta: float = 0.2
    samples_per_prompt: int = 4
    no_eos_penalty: float = 1.0
    whiten: bool = False
    epochs: int = 1
    minibatches: int = 1
    baseline_decay: float = 0.9
    gamma: float = 1.0
    lam: float = 0.95
    value_weight: float = 0.5
    value_clip: float = 0.2
    policy: PolicyLoss = PolicyLoss()
    one_step_off: bool = False
    rescore: bool = True

    def __post_init__(self) -> None:
        """Check ranges and that the parts fit together."""
        if self.estimator not in ESTIMATORS:
            raise invalid("RlConfig.estimator", self.estimator, f"be one of {ESTIMATORS}", "Choose one of them.")
        self._check_ranges()
        if self.estimator in ("rloo", "group") and self.samples_per_prompt < 2:
            rule = f"be at least 2 for estimator {self.estimator!r}, which compares samples of one prompt"
            fix = "Draw more samples or use 'reinforce'."
            raise invalid("RlConfig.samples_per_prompt", self.samples_per_prompt, rule, fix)
        if (self.updates > 1 or self.estimator == "ppo") and self.policy.kind != "ppo_clip":
            rule = f"be 'ppo_clip' for estimator {self.estimator!r} with {self.updates} updates per step"
            fix = "Set PolicyLoss.kind = 'ppo_clip', or one epoch of one minibatch with another estimator than 'ppo'."
            raise invalid("PolicyLoss.kind", self.policy.kind, rule, fix)
        if not self.rescore and (self.updates > 1 or self.one_step_off):
            why = "one_step_off" if self.one_step_off else f"{self.updates} updates per step"
            fix = "Leave it out: these compare parameters, for which rounding must be the same."
            raise invalid("RlConfig.rescore", False, f"be True with {why}", fix)

    def _check_ranges(self) -> None:
        at_least = {
            "beta": (self.beta, 0.0),
            "samples_per_prompt": (self.samples_per_prompt, 1),
            "no_eos_penalty": (self.no_eos_penalty, 0.0),
            "epochs": (self.epochs, 1),
            "minibatches": (self.minibatches, 1),
            "value_weight": (self.value_weight, 0.0),
        }
        for name, (value, least) in at_least.items():
            if not value >= least:
                raise invalid(f"RlConfig.{name}", value, f"be at least {least}", "Raise it.")
        fractions = {"gamma": self.gamma, "lam": self.lam, "baseline_decay": self.baseline_decay}
        for name, value in fractions.items():
            if not 0.0 <= value <= 1.0:
                raise invalid(f"RlConfig.{name}", value, "lie in [0, 1]", "Choose a value in that range.")
        if not self.value_clip > 0.0:
            raise invalid("RlConfig.value_clip", self.value_clip, "be > 0", "0.2 is usual; inf switches it off.")

    @property
    def updates(self) -> int:
        """Number of optimiser updates of one RL step."""
        return self.epochs * self.minibatches
