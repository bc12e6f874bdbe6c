"""Systems of an evaluation that refine by language: Self-Refine and SRT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pit_jax.core.errors import invalid
from pit_jax.decode.batches import Response
from pit_jax.evaluation.report_parts import Dropped
from pit_jax.improve.self_refine import SelfRefine
from pit_jax.srt.inference import PARSED, outcomes
from pit_jax.stages import srt_answers, writers
from pit_jax.stages.answers import Answered, Answers, iterated
from pit_jax.stages.jury import JUDGES
from pit_jax.stages.srt_answers import Inference
from pit_jax.stages.systems import ORIGINAL
from pit_jax.stages.writers import EndpointWriting, LocalWriting, Refined


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfRefined:
    """Self-Refine (arXiv 2303.17651) from the responses of another system.

    model: the policy that criticises and rewrites; None for a served one.
    refine: of the method; its temperature is replaced by the evaluation's.
    writing: how requests are put to the model; a served one needs `EndpointWriting`.
    every: give the responses after each round, NAME, NAME_iter2, ...; otherwise the one that Self-Refine returns.
    """

    name: str
    model: str | None = None
    refine: SelfRefine = dataclasses.field(default_factory=SelfRefine)
    writing: LocalWriting | EndpointWriting = dataclasses.field(default_factory=LocalWriting)
    every: bool = False
    of: str = ORIGINAL

    def __post_init__(self) -> None:
        """Check that there is one model."""
        if (self.model is None) != isinstance(self.writing, EndpointWriting):
            rule = "name a policy for LocalWriting, and be None for EndpointWriting"
            raise invalid("SelfRefined.model", self.model, rule, "Correct `model` or `writing`.")

    def names(self) -> list[str]:
        """Return its name, or one for each round."""
        return iterated(self.name, self.refine.iterations) if self.every else [self.name]

    def inputs(self) -> list[str]:
        """Return the policy, if it is one of the run's."""
        return [] if self.model is None else [self.model]

    def starts_from(self) -> str | None:
        """Begin with the responses of `of`."""
        return self.of

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return the refined responses; what went otherwise than asked for is counted in the report."""

        def make() -> list[list[Response]]:
            found = self._refined(answers, made[self.of], temperature)
            answers.leave_out(self.name, temperature, _refine_drops(f"{self.name}, T = {temperature:g}", found))
            return found.answers if self.every else [found.chosen]

        return answers.kept(self.names(), temperature, make)

    def _refined(self, answers: Answers, original: Answered, temperature: float) -> Refined:
        run, prompts, first = answers.run, [prompt.ids for prompt in answers.prompts], original.responses
        if isinstance(self.writing, EndpointWriting):
            writer = self.writing.build(run.directory / JUDGES)
            config = dataclasses.replace(self.refine, temperature=temperature)
            return writers.refined_by(writer, config, run.codec, prompts, first, run.seed)
        assert self.model is not None
        return writers.refined(
            run, self.model, self.refine, prompts, first, temperature, answers.batch_size, self.writing
        )


def _refine_drops(what: str, refined: Refined) -> list[Dropped]:
    counts = refined.counts
    feedbacks, rows = counts.feedbacks, counts.trajectories
    found = [
        ("feedback", "without the score it should have", counts.unscored, feedbacks),
        ("feedback", "cut off", counts.cut_feedback, feedbacks),
        ("feedback", "says nothing", counts.empty_feedback, feedbacks),
        ("history", "no room for the whole of it", counts.shortened, rows),
        ("refinement", "a call failed", counts.ended.get("failed", 0), rows),
        ("refinement", "no room for the request", counts.ended.get("too long", 0), rows),
    ]
    return [
        Dropped(what=f"{what}: {part}", reason=reason, count=count, total=total)
        for part, reason, count, total in found
        if count
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTuned:
    """A model tuned by SRT (arXiv 2406.07168), which writes y, f and r; r is its response."""

    name: str
    model: str
    inference: Inference = dataclasses.field(default_factory=Inference)

    def names(self) -> list[str]:
        """Return its one name."""
        return [self.name]

    def inputs(self) -> list[str]:
        """Return the model."""
        return [self.model]

    def starts_from(self) -> str | None:
        """Begin with the prompt."""
        return None

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return r, or y where the text has none; how often that was is counted in the report."""
        del made

        def make() -> list[list[Response]]:
            prompts = [prompt.ids for prompt in answers.prompts]
            found = srt_answers.answers(
                answers.run, self.model, prompts, self.inference, temperature, answers.batch_size
            )
            what = f"{self.name}, T = {temperature:g}"
            drops = [
                Dropped(what=f"{what}: refinement (y is taken)", reason=reason, count=count, total=len(found))
                for reason, count in outcomes(found).items()
                if reason != PARSED and count
            ]
            answers.leave_out(self.name, temperature, drops)
            return [srt_answers.finals(found)]

        return answers.kept(self.names(), temperature, make)
