"""SRT's training records from drafts: a critic's feedback, and the two filters (arXiv 2406.07168).

A record is kept if all parts of the critique parse, and if the refinement's score is not lower than the response's.
Both scores are given independently, each in a fresh context, by the same question: the score inside the critique was
given by one who had just looked for weaknesses, so it is no fair measure of the response against its refinement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pit_jax.srt.critics import Critic, Draft, Said
from pit_jax.srt.critique import Critique, Drop, read_critique, read_score

UNANSWERED = "no_reply"
"""Reason of drafts for which a question has no reply: asking again may help, unlike with all other reasons."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A draft that passed both filters: the critique, and the independent scores of response and refinement."""

    draft: Draft
    critique: Critique
    response_score: float
    refinement_score: float


def judge(drafts: Sequence[Draft], critic: Critic) -> list[Judged | Drop]:
    """Return for each draft what the critic made of it, or why it is left out.

    The reasons are those of `read_critique`, and no_reply, cut_reply, no_independent_score, refinement_worse.
    """
    critiques = dict(enumerate(_critique(said) for said in critic.critiques(drafts)))
    lost = {number: critique for number, critique in critiques.items() if isinstance(critique, Drop)}
    read = {number: critique for number, critique in critiques.items() if isinstance(critique, Critique)}
    questions = [
        draft
        for number, critique in read.items()
        for draft in (drafts[number], Draft(drafts[number].prompt, critique.refinement))
    ]
    answers = iter(critic.scores(questions))
    compared = {
        number: _compare(drafts[number], critique, next(answers), next(answers)) for number, critique in read.items()
    }
    found: dict[int, Judged | Drop] = {**lost, **compared}
    return [found[number] for number in range(len(drafts))]


def _critique(said: Said) -> Critique | Drop:
    if said.failure:
        return Drop(UNANSWERED, said.failure)
    # The improved response comes last, so it is what a cut reply has lost.
    return Drop("cut_reply", said.text[-200:]) if said.cut else read_critique(said.text)


def _compare(draft: Draft, critique: Critique, response: Said, refinement: Said) -> Judged | Drop:
    failure = response.failure or refinement.failure
    if failure:
        return Drop(UNANSWERED, failure)
    before, after = read_score(response.text), read_score(refinement.text)
    if before is None or after is None:
        return Drop("no_independent_score", (refinement if after is None else response).text[-200:])
    if after < before:
        return Drop("refinement_worse", f"{after:g} after {before:g}")
    return Judged(draft=draft, critique=critique, response_score=before, refinement_score=after)
