"""Samplers and scorers with a run's fixed shapes."""

from __future__ import annotations

from typing import Literal

from pit_jax.core.errors import CheckpointError
from pit_jax.decode.batches import Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.models.heads import ScalarModel
from pit_jax.stages.run import Run


def sampler(run: Run, kind: Literal["policy", "improver"], sampling: Sampling, batch_size: int) -> Sampler:
    """Return what answers prompts of a kind with the run's network."""
    return Sampler(
        lm=run.lm,
        sampling=sampling,
        width=run.codec.width(kind),
        max_new=run.codec.lengths.targets,
        eos_ids=run.codec.eos_ids,
        pad_id=run.codec.pad_id,
        batch_size=batch_size,
        mesh=run.mesh,
    )


def scorer(run: Run, reference: str, kind: Literal["policy", "gap"], batch_size: int) -> Scorer:
    """Return what scores responses with the reward model of a stage.

    Raises:
      CheckpointError: the stage is no reward model.
    """
    network = run.artifact(reference).network
    if not isinstance(network, ScalarModel):
        raise CheckpointError(
            f"{reference!r} must be a reward stage, but it trained a language model. Name a reward stage."
        )
    return Scorer(
        model=network,
        width=run.codec.width(kind),
        length=run.codec.lengths.targets,
        eos_id=run.codec.eos_ids[0],
        pad_id=run.codec.pad_id,
        batch_size=batch_size,
        mesh=run.mesh,
    )
