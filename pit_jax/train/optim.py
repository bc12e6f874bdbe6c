"""Optimisers and learning-rate schedules as one frozen config, built on optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, Scalar

from pit_jax.core.errors import invalid, nearest

Schedule = Callable[[ArrayLike], Scalar]

KINDS = ("adamw", "adafactor", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
NOT_DECAYED = ("scale", "bias")
STACKED = "layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How parameters are updated.

    kind: "adamw" (b1, b2, eps), "adafactor" (second moments in rows and columns, no momentum; Shazeer & Stern
      2018, arXiv 1804.04235) or "sgd" (momentum b1).
    learning_rate: the highest rate, reached after `warmup_steps` linear steps (the first step has 1/warmup of it).
    schedule: what follows until the last step, with p the part of the remaining steps that is done:
      "constant"; "linear" 1 - (1 - end) p; "cosine" end + (1 - end) (1 + cos(pi p)) / 2;
      "rsqrt" sqrt(w / step) with w = max(warmup_steps, 1), so T5X's rate r with warm-up w is r / sqrt(w) here.
    end_fraction: `end` above, as a part of learning_rate.
    weight_decay: times the learning rate (decoupled; Loshchilov & Hutter 2019), on matrices only.
    clip_norm: largest global norm of the mean gradient; None does not clip.
    multiply_by_parameter_scale: Adafactor's relative step size; learning_rate is then relative to the RMS of
      each parameter (T5's pre-training uses 1e-2 with "rsqrt").
    """

    learning_rate: float
    kind: Literal["adamw", "adafactor", "sgd"] = "adamw"
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "constant"
    warmup_steps: int = 0
    end_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    multiply_by_parameter_scale: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        _one_of("Optimizer.kind", self.kind, KINDS)
        _one_of("Optimizer.schedule", self.schedule, SCHEDULES)
        checks = (
            ("learning_rate", self.learning_rate > 0, "be above 0", "Try 1e-3 from scratch, 3e-5 for fine-tuning."),
            ("warmup_steps", self.warmup_steps >= 0, "be 0 or more", "Use 0 for no warm-up."),
            ("end_fraction", 0 <= self.end_fraction <= 1, "lie in [0, 1]", "It is a part of learning_rate."),
            ("weight_decay", self.weight_decay >= 0, "be 0 or more", "Use 0 for no decay."),
            ("b1", 0 <= self.b1 < 1, "lie in [0, 1)", "0.9 is usual."),
            ("b2", 0 < self.b2 < 1, "lie in (0, 1)", "0.999 is usual."),
            ("eps", self.eps > 0, "be above 0", "1e-8 is usual."),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "be above 0 or None", "Use None not to clip."),
        )
        for name, holds, rule, fix in checks:
            if not holds:
                raise invalid(f"Optimizer.{name}", dataclasses.asdict(self)[name], rule, fix)


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise invalid(field, value, f"be one of {', '.join(known)}", f"Choose one of them.{nearest(value, known)}")


def learning_rate(config: Optimizer, steps: int) -> Schedule:
    """Return the learning rate as a function of the number of updates done so far.

    Args:
      config: the optimiser.
      steps: number of updates of the whole run, at which the decay ends.
    """
    warmup = config.warmup_steps
    if steps < 1:
        raise invalid("steps", steps, "be at least 1", "Set the number of training steps.")
    if warmup >= steps and warmup > 0 and config.schedule in ("linear", "cosine"):
        raise invalid(
            "Optimizer.warmup_steps", warmup, f"be below the {steps} steps of the run", "Shorten the warm-up."
        )

    def rate(step: ArrayLike) -> Scalar:
        done = jnp.asarray(step).astype(jnp.float32)
        part = jnp.clip((done - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        factors = {
            "constant": jnp.ones(()),
            "linear": 1.0 - (1.0 - config.end_fraction) * part,
            "cosine": config.end_fraction + (1.0 - config.end_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * part)),
            "rsqrt": jnp.sqrt(max(warmup, 1) / jnp.maximum(done + 1.0, max(warmup, 1))),
        }
        warm = jnp.minimum(1.0, (done + 1.0) / max(warmup, 1))
        return (config.learning_rate * warm * factors[config.schedule]).astype(jnp.float32)

    return rate


def build(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Return the optax transformation of mean gradients to updates, for a run of `steps` updates."""
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if config.kind == "adamw":
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    elif config.kind == "adafactor":
        parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
        if config.multiply_by_parameter_scale:
            parts.append(optax.scale_by_param_block_rms())
    elif config.b1 > 0:
        parts.append(optax.trace(decay=config.b1))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate(config, steps)))


def decayed(params: Any) -> Any:
    """Return a tree of booleans: True for matrices, False for norms, biases and other vectors.

    Parameters of stacked layers (a path part `layers`) have one more axis, which does not count.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        return names[-1] not in NOT_DECAYED and leaf.ndim - (STACKED in names) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)
