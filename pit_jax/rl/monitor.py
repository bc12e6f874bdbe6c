"""The KL budget and the alarms of reward hacking: warn, adapt beta, or stop.

Three signs, each smoothed over steps: the policy is further from its anchor than the KL budget; its answers
have become longer or shorter than the references by more than the allowed drift; the trained reward has
risen while a held-out judge has fallen. Multiplicative control of the KL coefficient: Ziegler et al.,
arXiv 1909.08593, section 2.2; here beta never falls below the value it was set to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pit_jax.core.errors import TrainingError, invalid

ACTIONS = ("warn", "adapt", "stop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Limits of an RL run.

    kl_budget: largest mean KL to the anchor, nats per response.
    length_drift: largest distance of the mean response length from the mean reference length, tokens.
    judge_drop: a fall of the held-out judge by more than this, below its best, while the reward is higher
      than it was then, is hacking.
    action: what an alarm does: "warn" says so, "adapt" also multiplies beta by `raise_beta` (and divides it
      back while there is none), "stop" ends the run.
    max_beta: "adapt" never goes higher, as a multiple of the beta it started from.
    smoothing: weight of the past in the running means, 0 for none; alarms wait for `patience` steps.
    """

    kl_budget: float = 10.0
    length_drift: float = 20.0
    judge_drop: float = 0.05
    action: str = "warn"
    raise_beta: float = 1.05
    max_beta: float = 10.0
    smoothing: float = 0.9
    patience: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.kl_budget > 0:
            raise invalid("MonitorConfig.kl_budget", self.kl_budget, "be > 0", "Use inf to switch it off.")
        if not self.length_drift > 0:
            raise invalid("MonitorConfig.length_drift", self.length_drift, "be > 0", "Use inf to switch it off.")
        if not self.judge_drop >= 0:
            raise invalid("MonitorConfig.judge_drop", self.judge_drop, "be >= 0", "Use inf to switch it off.")
        if self.action not in ACTIONS:
            raise invalid("MonitorConfig.action", self.action, f"be one of {ACTIONS}", "Choose one of them.")
        if not self.raise_beta > 1:
            raise invalid("MonitorConfig.raise_beta", self.raise_beta, "be > 1", "1.05 doubles beta in 14 steps.")
        if not self.max_beta >= 1:
            raise invalid("MonitorConfig.max_beta", self.max_beta, "be >= 1", "It is a multiple of the first beta.")
        if not 0 <= self.smoothing < 1:
            raise invalid("MonitorConfig.smoothing", self.smoothing, "be in [0, 1)", "Use 0 for no smoothing.")
        if self.patience < 1:
            raise invalid("MonitorConfig.patience", self.patience, "be at least 1", "Use 1 to watch from the start.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorState:
    """What the monitor remembers; plain numbers, so that it goes into a checkpoint as JSON.

    The running means start at the first step's values. `best_judge` and `best_reward` are the judge's best
    value and the running mean of the reward at that moment; `judge` is its latest; all None before the first.
    `active` are the alarms of the last step, so that each is announced once and not at every step.
    """

    beta: float
    steps: int = 0
    kl: float = 0.0
    reward: float = 0.0
    drift: float = 0.0
    judge: float | None = None
    best_judge: float | None = None
    best_reward: float | None = None
    active: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MonitorState:
        """Return the state that `to_json` wrote."""
        return cls(**{**data, "active": tuple(data["active"])})


def observe(state: MonitorState, config: MonitorConfig, stats: Mapping[str, float]) -> MonitorState:
    """Return the state after a step, from the values of `experience.statistics`."""
    past = config.smoothing if state.steps else 0.0

    def smooth(old: float, new: float) -> float:
        return past * old + (1.0 - past) * new

    return dataclasses.replace(
        state,
        steps=state.steps + 1,
        kl=smooth(state.kl, stats["kl/mean"]),
        reward=smooth(state.reward, stats["reward/mean"]),
        drift=smooth(state.drift, stats["length/mean"] - stats["length/reference"]),
    )


def observe_judge(state: MonitorState, value: float) -> MonitorState:
    """Return the state after an evaluation in which the held-out judge gave `value` (higher is better)."""
    if state.best_judge is None or value >= state.best_judge:
        return dataclasses.replace(state, judge=value, best_judge=value, best_reward=state.reward)
    return dataclasses.replace(state, judge=value)


def alarms(state: MonitorState, config: MonitorConfig) -> dict[str, str]:
    """Return "kl", "length" or "judge" for every limit that is passed, with the value and the limit in words."""
    if state.steps < config.patience:
        return {}
    found = {}
    if state.kl > config.kl_budget:
        found["kl"] = f"KL to the anchor is {state.kl:.2f} nats per response, over the budget of {config.kl_budget:g}"
    if abs(state.drift) > config.length_drift:
        way = "longer" if state.drift > 0 else "shorter"
        found["length"] = (
            f"responses are {abs(state.drift):.2f} tokens {way} than the references, over the limit of "
            f"{config.length_drift:g}"
        )
    if state.judge is not None and state.best_judge is not None and state.best_reward is not None:
        fallen = state.best_judge - state.judge
        if fallen > config.judge_drop and state.reward > state.best_reward:
            found["judge"] = (
                f"the held-out judge has fallen from {state.best_judge:.3f} to {state.judge:.3f} while the reward "
                f"rose from {state.best_reward:.3f} to {state.reward:.3f}"
            )
    return found


def control(
    state: MonitorState, config: MonitorConfig, first_beta: float, found: dict[str, str]
) -> tuple[MonitorState, list[str]]:
    """Act on the alarms as configured; return the state, whose beta the next step uses, and what to print.

    adapt: beta <- min(beta * raise_beta, first_beta * max_beta) after an alarm,
           beta <- max(beta / raise_beta, first_beta) otherwise.

    Raises:
      TrainingError: there is an alarm and the action is "stop".
    """
    if found and config.action == "stop":
        raise TrainingError(
            f"Stopped at a reward-hacking alarm: {'; '.join(found.values())}. Continue from the last checkpoint with a "
            f"larger beta (now {state.beta:g}), a smaller learning rate or fewer steps, or set MonitorConfig.action "
            "to 'warn' or 'adapt'."
        )
    messages = [f"Reward-hacking alarm: {text}." for kind, text in found.items() if kind not in state.active]
    beta = state.beta
    if config.action == "adapt":
        raised, lowered = beta * config.raise_beta, beta / config.raise_beta
        beta = min(raised, first_beta * config.max_beta) if found else max(lowered, first_beta)
    return dataclasses.replace(state, beta=beta, active=tuple(found)), messages
