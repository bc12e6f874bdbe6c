"""Self-Refine (arXiv 2303.17651): one frozen model criticises its own response and writes it anew.

    fb_t    = M(p_feedback | x, y_t)
    y_{t+1} = M(p_refine   | x, y_0, fb_0, ..., y_t, fb_t)

Texts in, texts out: what writes is a `Writer`, such as a model of a run or an endpoint (`stages.writers`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from pit_jax.core.errors import invalid
from pit_jax.core.rng import stream_id
from pit_jax.improve import refine_templates
from pit_jax.improve.refine_templates import RefinePrompts

STYLES = {"self_refine": "dialogue_scored", "pit": "pit"}
"""Each style with the prompt set it takes where none is named."""
Ended = Literal["", "iterations", "marker", "score", "failed", "too long"]


class Written(NamedTuple):
    """A text of a model: whether it came to its end, and why there is none if there is none."""

    text: str
    finished: bool = True
    failure: str = ""


class Writer(Protocol):
    """A language model that answers requests."""

    def write(self, prompts: Sequence[str], *, seed: int, temperature: float) -> list[Written]:
        """Return one text for each request; it depends on that request, the seed and the temperature alone.

        A request that cannot be answered comes back with its `failure`; the others are unaffected.
        """
        ...

    def fits(self, prompt: str) -> bool:
        """Return whether the model can read a request whole."""
        ...


class Feedback(NamedTuple):
    """What the model says of one response: its words, whether they came to their end, and the score if it gave one."""

    text: str
    finished: bool
    score: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfRefine:
    """How responses are refined.

    prompts: a shipped prompt set's name or a .txt file (see `refine_templates`); None takes `STYLES[style]`.
    style: "self_refine" shows the whole history, stops by the set's rules and returns the response with the highest
      score; "pit" is the baseline of PIT's paper: each round is one feedback and one rewriting, without rubric or
      earlier rounds.
    iterations: at most so many rounds. temperature: of both calls.
    stop_score: a response with at least this score is not refined any further.
    """

    prompts: str | None = None
    style: Literal["self_refine", "pit"] = "self_refine"
    iterations: int = 4
    temperature: float = 0.7
    stop_score: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and load the prompts, so that a mistake shows before anything is computed."""
        if self.style not in STYLES:
            raise invalid("SelfRefine.style", self.style, f"be one of {tuple(STYLES)}", "Choose one of them.")
        if self.iterations < 1:
            raise invalid("SelfRefine.iterations", self.iterations, "be at least 1", "The paper has at most 4.")
        if not 0.0 <= self.temperature < float("inf"):
            raise invalid("SelfRefine.temperature", self.temperature, "be finite and >= 0", "The paper has 0.7.")
        prompts = self.templates
        if self.style == "pit" and (prompts.scored or prompts.marker):
            fix = "Remove these sections, or use style='self_refine'."
            raise invalid("SelfRefine.prompts", prompts.name, "have no section score or stop with style='pit'", fix)
        if self.stop_score is not None and not prompts.scored:
            fix = "Take prompts that ask for a score, such as dialogue_scored."
            raise invalid("SelfRefine.stop_score", self.stop_score, "be None where feedback has no score", fix)
        if self.stop_score is not None and not 0.0 <= self.stop_score <= prompts.highest:
            fix = "Give a score from which on a response is good enough."
            raise invalid("SelfRefine.stop_score", self.stop_score, f"lie in 0..{prompts.highest:g}", fix)

    @functools.cached_property
    def templates(self) -> RefinePrompts:
        """The prompt set."""
        return refine_templates.load(self.prompts or STYLES[self.style])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineTrajectory:
    """A response, what was said of it, and what came of that.

    prompt: x. answers: y_0, ..., y_T. feedbacks: fb_0, ...; one less than answers, or as many.
    ended: why there is no further round; `failure` says more where a call failed.
    dropped: rounds of the history that requests had no room for, over all requests.
    unscored: feedbacks that should have held a score and did not.
    """

    prompt: str
    answers: tuple[Written, ...]
    feedbacks: tuple[Feedback, ...] = ()
    ended: Ended = ""
    failure: str = ""
    dropped: int = 0
    unscored: int = 0

    @property
    def rounds(self) -> int:
        """T: how often the response was written anew."""
        return len(self.answers) - 1

    def answer(self, iterations: int) -> Written:
        """Return the response after at most `iterations` rounds."""
        return self.answers[min(iterations, self.rounds)]

    def feedback(self, iteration: int) -> Feedback | None:
        """Return fb_k, the feedback on y_k; None where there is none."""
        return self.feedbacks[iteration] if 0 <= iteration < len(self.feedbacks) else None

    @property
    def number(self) -> int:
        """The k of the response that is returned.

        The one with the highest score, the first of equals, without y_0; complete ones go before those that were cut
        off. Without scores the last one.
        """
        found = [(k, self.feedback(k)) for k in range(1, self.rounds + 1)]
        scored = [(self.answers[k].finished, said.score, -k) for k, said in found if said and said.score is not None]
        return -max(scored)[2] if scored else self.rounds

    @property
    def chosen(self) -> Written:
        """The response that is returned."""
        return self.answers[self.number]


def self_refine(
    config: SelfRefine, writer: Writer, prompts: Sequence[str], originals: Sequence[Written], seed: int
) -> list[RefineTrajectory]:
    """Refine the responses to many prompts; all requests of a round go to the writer at once.

    Each trajectory depends on its prompt, its response and the seed alone. Where feedback is scored the last response
    gets feedback too: T rounds are 2 T calls without scores, 2 T + 1 with them.

    Args:
      config: prompts, rounds and when to stop.
      writer: the model.
      prompts: x, as texts.
      originals: y_0, one for each prompt.
      seed: of all samples.
    """
    rows = [RefineTrajectory(prompt=x, answers=(y,)) for x, y in zip(prompts, originals, strict=True)]
    calls = _Calls(config, writer, seed)
    for iteration in range(config.iterations):
        rows = calls.answered(rows, "feedback", iteration, _feedback_request, _with_feedback)
        rows = [_stopped(config, row) for row in rows]
        rows = calls.answered(rows, "refine", iteration, _refine_request, _with_answer)
    if config.templates.scored:
        rows = calls.answered(rows, "feedback", config.iterations, _feedback_request, _with_feedback)
    return [row if row.ended else dataclasses.replace(row, ended="iterations") for row in rows]


Ask = Callable[[SelfRefine, Writer, RefineTrajectory], tuple[str | None, int]]
"""The request for a trajectory's next text, None where it does not fit; and the rounds left out of it."""
Add = Callable[[SelfRefine, RefineTrajectory, Written], RefineTrajectory]


class _Calls:
    """Asks the writer for the next text of every trajectory that goes on."""

    def __init__(self, config: SelfRefine, writer: Writer, seed: int) -> None:
        self._config, self._writer, self._seed = config, writer, seed

    def answered(
        self, rows: Sequence[RefineTrajectory], kind: str, iteration: int, ask: Ask, add: Add
    ) -> list[RefineTrajectory]:
        """Return the trajectories with one text more each, or with the reason why there is none."""
        found, requests, asked = list(rows), [], []
        for number, row in enumerate(rows):
            if row.ended:
                continue
            request, dropped = ask(self._config, self._writer, row)
            if request is None:
                found[number] = dataclasses.replace(row, ended="too long")
                continue
            found[number] = dataclasses.replace(row, dropped=row.dropped + dropped)
            requests.append(request)
            asked.append(number)
        for number, written in zip(asked, self._written(requests, kind, iteration), strict=True):
            if written.failure:
                found[number] = dataclasses.replace(found[number], ended="failed", failure=written.failure)
            else:
                found[number] = add(self._config, found[number], written)
        return found

    def _written(self, requests: Sequence[str], kind: str, iteration: int) -> list[Written]:
        if not requests:
            return []
        # Every call has a seed of its own: where a response comes back unchanged, the same request is asked anew.
        seed = (self._seed * 1_000_003 + stream_id(f"{kind} {iteration}")) % (1 << 31)
        return self._writer.write(requests, seed=seed, temperature=self._config.temperature)


def _feedback_request(config: SelfRefine, writer: Writer, row: RefineTrajectory) -> tuple[str | None, int]:
    request = config.templates.ask_feedback(row.prompt, row.answers[-1].text)
    return (request if writer.fits(request) else None), 0


def _refine_request(config: SelfRefine, writer: Writer, row: RefineTrajectory) -> tuple[str | None, int]:
    """Return the request with as much of the history as fits; x and the present round are never left out."""
    history = [(y.text, said.text) for y, said in zip(row.answers, row.feedbacks, strict=True)]
    shown = history[-1:] if config.style == "pit" else history
    for dropped in range(len(shown)):
        request = config.templates.ask_refinement(row.prompt, shown[dropped:])
        if writer.fits(request):
            return request, dropped
    return None, 0


def _with_feedback(config: SelfRefine, row: RefineTrajectory, written: Written) -> RefineTrajectory:
    score = config.templates.read_score(written.text)
    said = Feedback(written.text.strip(), written.finished, score)
    unscored = row.unscored + (config.templates.scored and score is None)
    return dataclasses.replace(row, feedbacks=(*row.feedbacks, said), unscored=unscored)


def _with_answer(config: SelfRefine, row: RefineTrajectory, written: Written) -> RefineTrajectory:
    del config
    return dataclasses.replace(row, answers=(*row.answers, written))


def _stopped(config: SelfRefine, row: RefineTrajectory) -> RefineTrajectory:
    """Return a trajectory, ended where its last feedback says that the response is good enough."""
    if row.ended:
        return row
    said = row.feedbacks[-1]
    if config.stop_score is not None and said.score is not None and said.score >= config.stop_score:
        return dataclasses.replace(row, ended="score")
    return dataclasses.replace(row, ended="marker") if config.templates.says_stop(said.text) else row


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineCounts:
    """What became of the requests of many trajectories.

    trajectories, feedbacks, refinements: how many there are.
    unscored: feedbacks without the score they were asked for; they are never chosen by.
    cut_feedback, cut_answers: texts that did not come to their end. empty_feedback: feedbacks that say nothing.
    repeated: refinements equal to the response they were to improve.
    ended: trajectories by the reason of their end (see `RefineTrajectory`).
    shortened: trajectories in which requests had no room for the whole history; dropped: rounds left out of requests.
    failures: reasons of failed calls with their numbers, the most frequent first.
    """

    trajectories: int
    feedbacks: int
    refinements: int
    unscored: int
    cut_feedback: int
    cut_answers: int
    empty_feedback: int
    repeated: int
    ended: dict[str, int]
    shortened: int
    dropped: int
    failures: dict[str, int]

    @property
    def doubtful(self) -> bool:
        """Whether something went otherwise than asked for."""
        troubled = self.ended.get("failed", 0) + self.ended.get("too long", 0)
        return bool(self.unscored or self.cut_feedback or self.empty_feedback or self.shortened or troubled)

    def summary(self) -> str:
        """Return one line of counts; those that are zero are left out."""
        counts = {
            "feedbacks without a score": self.unscored,
            "feedbacks cut off": self.cut_feedback,
            "feedbacks empty": self.empty_feedback,
            "responses cut off": self.cut_answers,
            "responses repeated": self.repeated,
            "histories shortened": self.shortened,
        }
        notes = [f"{count} {what}" for what, count in counts.items() if count]
        notes.append("ended by " + ", ".join(f"{why}: {count}" for why, count in self.ended.items()))
        notes += [f"{count} calls failed: {why}" for why, count in list(self.failures.items())[:1]]
        return (
            f"{self.trajectories} responses, {self.feedbacks} feedbacks, {self.refinements} refinements; "
            + "; ".join(notes)
        )


def count(rows: Sequence[RefineTrajectory]) -> RefineCounts:
    """Return the counts of trajectories."""
    feedbacks = [said for row in rows for said in row.feedbacks]
    pairs = [(before, after) for row in rows for before, after in zip(row.answers, row.answers[1:], strict=False)]
    return RefineCounts(
        trajectories=len(rows),
        feedbacks=len(feedbacks),
        refinements=len(pairs),
        unscored=sum(row.unscored for row in rows),
        cut_feedback=sum(not said.finished for said in feedbacks),
        cut_answers=sum(not after.finished for _, after in pairs),
        empty_feedback=sum(not said.text for said in feedbacks),
        repeated=sum(before.text.strip() == after.text.strip() for before, after in pairs),
        ended=dict(sorted(collections.Counter(row.ended for row in rows).items())),
        shortened=sum(row.dropped > 0 for row in rows),
        dropped=sum(row.dropped for row in rows),
        failures=dict(collections.Counter(row.failure for row in rows if row.failure).most_common()),
    )
