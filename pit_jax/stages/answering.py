"""Samplers and scorers with the fixed shapes of a codec or a run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from jax.sharding import Mesh

from pit_jax.decode.batches import Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.improve.loop import Judge
from pit_jax.models.api import ConditionalLM
from pit_jax.models.heads import ScalarModel
from pit_jax.sharding.place import row_parts
from pit_jax.stages.run import Run
from pit_jax.text.codec import Codec


def make_sampler(
    lm: ConditionalLM,
    codec: Codec,
    kind: Literal["policy", "improver"],
    sampling: Sampling,
    batch_size: int,
    mesh: Mesh | None = None,
    *,
    portions: int = 0,
) -> Sampler:
    """Return what answers prompts of a kind with a network, at the codec's fixed shapes."""
    return Sampler(
        lm=lm,
        sampling=sampling,
        width=codec.width(kind),
        max_new=codec.lengths.targets,
        eos_ids=codec.eos_ids,
        pad_id=codec.pad_id,
        batch_size=batch_size,
        mesh=mesh,
        portions=portions,
    )


def make_scorer(
    model: ScalarModel,
    codec: Codec,
    kind: Literal["policy", "gap"],
    batch_size: int,
    mesh: Mesh | None = None,
    *,
    samples: int = 1,
) -> Scorer:
    """Return what scores `samples` responses to each prompt of a kind with a reward model, at the codec's shapes."""
    return Scorer(
        model=model,
        width=codec.width(kind),
        length=codec.lengths.targets,
        eos_id=codec.eos_ids[0],
        pad_id=codec.pad_id,
        batch_size=batch_size,
        samples=samples,
        mesh=mesh,
    )


def sampler(run: Run, kind: Literal["policy", "improver"], sampling: Sampling, batch_size: int) -> Sampler:
    """Return what answers prompts of a kind with the run's network; an improver's answers are drafted.

    A policy has nothing to repeat.
    """
    rows, portions = shared_out(run.mesh, batch_size), run.experiment.portions
    if kind == "improver":
        sampling = dataclasses.replace(sampling, draft_tokens=run.experiment.draft_tokens)
    return make_sampler(run.lm, run.codec, kind, sampling, rows, run.mesh, portions=portions)


def scorer(run: Run, reference: str, kind: Literal["policy", "gap"], batch_size: int) -> Scorer:
    """Return what scores responses with the reward model of a stage.

    Raises:
      CheckpointError: the stage is no reward model, or one for other prompts.
    """
    model = run.reward_model(reference, "bt" if kind == "policy" else "gap")
    return make_scorer(model, run.codec, kind, shared_out(run.mesh, batch_size), run.mesh)


def scores_by(run: Run, reference: str, kind: Literal["policy", "gap"], batch_size: int) -> Judge:
    """Return the scoring function of a reward stage, for prompts of kind "policy" (R_P) or "gap" (R_PIT).

    Raises:
      CheckpointError: the stage is no reward model of that kind.
    """
    return functools.partial(scorer(run, reference, kind, batch_size).score, run.params(reference))


def shared_out(mesh: Mesh, rows: int) -> int:
    """Return the least number, from `rows` up, that a mesh's devices can share evenly; fillers change no answer."""
    parts = row_parts(mesh)
    return -(-rows // parts) * parts
