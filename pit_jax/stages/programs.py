"""Every program that a stage compiles, as shapes: what is needed to compile it without data, weights or devices."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Params
from pit_jax.decode.sampling import Sampling
from pit_jax.srt.text import SrtCodec, SrtText
from pit_jax.srt.writing import Writer
from pit_jax.stages import answering, srt_answers
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.evaluate import Evaluate
from pit_jax.stages.gap_study import GapStudy
from pit_jax.stages.pipeline import Recipe, Stage
from pit_jax.stages.planned import PlannedRun
from pit_jax.stages.program import Program, key_shapes, on_paper, placed, prompt_arrays, sampling, scoring
from pit_jax.stages.reference_study import ReferenceStudy
from pit_jax.stages.rl import Rl
from pit_jax.stages.srt_data import SrtData
from pit_jax.stages.srt_pairs import SrtPairs
from pit_jax.stages.srt_tune import SrtTune
from pit_jax.stages.training_programs import Supervised, reinforced, supervised


def stage_programs(recipe: Recipe, stage: Stage, mesh: Mesh) -> tuple[list[Program], list[str]]:
    """Return the programs of one stage of a recipe on a mesh, and remarks on what had to be assumed.

    Raises:
      ConfigError: a batch cannot be shared out over the mesh, or the stage is of a kind that is not known here.
    """
    run = PlannedRun(recipe, mesh)
    with on_paper(mesh, recipe.experiment.mesh.rules):
        if isinstance(stage, Supervised):
            programs = supervised(run, stage)
        elif isinstance(stage, Rl):
            programs = reinforced(run, stage)
        elif isinstance(stage, Evaluate):
            programs = _evaluated(run, stage)
        elif isinstance(stage, GapStudy):
            programs = _gaps_compared(run, stage)
        elif isinstance(stage, ReferenceStudy):
            programs = _references_judged(run, stage)
        elif isinstance(stage, SrtData):
            programs = _drafted(run, stage)
        elif isinstance(stage, SrtPairs):
            programs = _refined(run, stage, _srt_text(recipe, stage))
        else:
            raise ConfigError(
                f"The stage {stage.name!r} is a {type(stage).__name__}, whose programs are not known. "
                "Plan the others by name (--stage)."
            )
    return programs, run.remarks


def _evaluated(run: PlannedRun, stage: Evaluate) -> list[Program]:
    """Return the programs that answer and judge held-out prompts; parameters are read for each system in turn."""
    size, prompts = stage.batch_size, stage.prompts
    kinds: tuple[tuple[Literal["policy", "improver"], str, Literal["policy", "gap"], str], ...] = (
        ("policy", stage.original, "policy", stage.reward),
        ("improver", stage.improver, "gap", stage.gap),
    )
    jury = run.params(stage.reward)
    programs = []
    for kind, system, judge, reward in kinds:
        params, judges = run.language_model(system, kind), run.params(reward)
        beside = (params, judges, jury)
        answerer = answering.sampler(run, kind, Sampling(temperature=stage.temperatures[0]), size)
        programs += sampling(f"{kind} answers", answerer, params, prompts, residents=beside)
        scorer = answering.scorer(run, reward, judge, size)
        programs.append(scoring(f"{'reward' if judge == 'policy' else 'gap'} scores", scorer, judges, beside))
    return programs


def _gaps_compared(run: PlannedRun, stage: GapStudy) -> list[Program]:
    """Return the programs that score records, one for each kind of head; models are read one after the other."""
    kinds = {answering.scorer(run, name, "gap", stage.batch_size): name for name in stage.gaps.values()}
    programs = [scoring(f"scores of {reference}", scorer, run.params(reference)) for scorer, reference in kinds.items()]
    judge = answering.scorer(run, stage.reward, "policy", stage.batch_size)
    return [*programs, scoring("reward scores", judge, run.params(stage.reward))]


def _drafted(run: PlannedRun, stage: SrtData) -> list[Program]:
    """Return the program that writes drafts; the critic is none of ours."""
    sampler = answering.sampler(run, "policy", Sampling(temperature=stage.temperature), stage.batch_size)
    return sampling("drafts", sampler, run.language_model(stage.model, "policy"), stage.prompts)


def _srt_text(recipe: Recipe, stage: SrtPairs) -> SrtText:
    """Return the format that the model of a stage is tuned on."""
    for other in recipe.stages:
        if isinstance(other, SrtTune) and other.name == split_reference(stage.model)[0]:
            return other.text
    raise ConfigError(
        f"The stage {stage.name!r} reads {stage.model!r}, which no stage `srt` of the recipe makes: its format is not "
        "known. Plan the others by name (--stage)."
    )


def _refined(run: PlannedRun, stage: SrtPairs, text: SrtText) -> list[Program]:
    """Return the programs that write y, f and r, and fresh feedback."""
    codec, params = SrtCodec(text, run.codec), run.language_model(stage.model, "policy")
    programs = [_writing(run.mesh, "texts", srt_answers.writer(run, codec, stage.batch_size), params)]
    if "score" in text.parts:
        author = srt_answers.writer(run, codec, stage.batch_size, stop=codec.markers[-1])
        programs.append(_writing(run.mesh, "fresh feedback", author, params))
    return programs


def _writing(mesh: Mesh, name: str, author: Writer, params: Params) -> Program:
    """Return the program that writes one batch of SRT's texts."""
    rows = author.batch_size
    given, count = jnp.zeros((rows, author.max_new), jnp.int32), jnp.zeros(rows, jnp.int32)
    heat = jax.ShapeDtypeStruct((2,), jnp.float32)
    arguments = (
        params,
        *placed((prompt_arrays(rows, author.width), given, count, key_shapes(rows)), mesh, row_axis=0),
        heat,
    )
    # The first token comes with the prompt's pass; the loop takes or draws the others.
    return Program(name=name, function=jax.jit(author.draw), arguments=arguments, trips=max(author.max_new - 1, 1))


def _references_judged(run: PlannedRun, stage: ReferenceStudy) -> list[Program]:
    """Return the programs that answer, improve and score held-out prompts."""
    size, sampled = stage.batch_size, Sampling(temperature=stage.temperature)
    policy, improver = run.language_model(stage.original, "policy"), run.language_model(stage.improver, "improver")
    gap, reward = run.params(stage.gap), run.params(stage.reward)
    answerers = answering.sampler(run, "policy", sampled, size), answering.sampler(run, "improver", sampled, size)
    programs = [
        *sampling("policy answers", answerers[0], policy, stage.prompts),
        *sampling("improver answers", answerers[1], improver, stage.prompts, residents=(gap,)),
        scoring("gap scores", answering.scorer(run, stage.gap, "gap", size), gap),
    ]
    if run.experiment.judge is None:
        judge = answering.scorer(run, stage.reward, "policy", size)
        programs.append(scoring("reward scores", judge, reward, (gap,)))
    return programs
