"""Samplers and scorers with a run's fixed shapes."""

from __future__ import annotations

import math
from typing import Literal

from pit_jax.decode.batches import Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.sharding.place import ROW_AXES
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
        batch_size=_shared_out(run, batch_size),
        mesh=run.mesh,
    )


def scorer(run: Run, reference: str, kind: Literal["policy", "gap"], batch_size: int) -> Scorer:
    """Return what scores responses with the reward model of a stage.

    Raises:
      CheckpointError: the stage is no reward model, or one for other prompts.
    """
    return Scorer(
        model=run.reward_model(reference, "bt" if kind == "policy" else "gap"),
        width=run.codec.width(kind),
        length=run.codec.lengths.targets,
        eos_id=run.codec.eos_ids[0],
        pad_id=run.codec.pad_id,
        batch_size=_shared_out(run, batch_size),
        mesh=run.mesh,
    )


def _shared_out(run: Run, rows: int) -> int:
    """Return the least number, from `rows` up, that the run's devices can share evenly; fillers change no answer."""
    parts = math.prod(run.mesh.shape[axis] for axis in ROW_AXES)
    return -(-rows // parts) * parts
