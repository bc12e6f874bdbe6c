"""Iterative self-improvement: y_0 ~ M_P(. | x), y_{i+1} ~ M_PIT(. | x, y_i) (PIT, arXiv 2310.00898, section 3.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from pit_jax.core.errors import invalid
from pit_jax.core.rng import key_for
from pit_jax.decode.batches import Response, as_reference, row_keys
from pit_jax.improve.accept import Improve, accepts, best, usable
from pit_jax.text.codec import Codec, PromptRow

Answerer = Callable[[Sequence[PromptRow], Key[Array, " N"]], list[Response]]
"""A sample for each key, as many for each prompt row: `functools.partial(sampler.answer, params)`."""
Judge = Callable[[Sequence[PromptRow], Sequence[Response]], Float[np.ndarray, " N"]]
"""One scalar for each prompt row with its response: `functools.partial(scorer.score, params)`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One iteration: what was proposed and what became of it.

    gap: r_gap(proposal, y_i | x); zero: r_gap(y_i, y_i | x); both None where no gap model was given.
    """

    proposal: Response
    accepted: bool
    gap: float | None
    zero: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """An answer and its improvements; no step follows a rejected one."""

    first: Response
    steps: tuple[Step, ...] = ()

    def answer(self, iterations: int) -> Response:
        """Return the answer after at most `iterations` steps: the last accepted proposal, or y_0."""
        taken = [step.proposal for step in self.steps[:iterations] if step.accepted]
        return taken[-1] if taken else self.first

    @property
    def final(self) -> Response:
        """The answer after all steps."""
        return self.answer(len(self.steps))

    @property
    def stopped(self) -> bool:
        """Whether the accept rule rejected the last proposal."""
        return bool(self.steps) and not self.steps[-1].accepted


def sample_keys(seed: int, stream: str, iteration: int, prompts: Sequence[int], candidates: int) -> Key[Array, " N"]:
    """Return keys [X * C], candidate fastest, from (seed, stream, iteration, number of the prompt, candidate) only."""
    per_prompt = row_keys(key_for(seed, stream, iteration), np.asarray(prompts, np.int64))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
    return fold(per_prompt, jnp.arange(candidates)).reshape(-1)


def first_answers(
    policy: Answerer, codec: Codec, prompts: Sequence[Sequence[int]], seed: int, sample: int = 0, start: int = 0
) -> list[Response]:
    """Return y_0 ~ M_P(. | x) for every prompt (raw ids): the Original that improvement starts from.

    `sample` 1, 2, ... are further samples: those that `baselines.best_of_n` chooses from. `start` is the number of the
    first prompt, where these are a portion of more.
    """
    keys = sample_keys(seed, "answers", 0, range(start, start + len(prompts)), sample + 1)[sample :: sample + 1]
    return policy([codec.policy_prompt(prompt) for prompt in prompts], keys)


def improve(
    config: Improve,
    improver: Answerer,
    gap: Judge | None,
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Response],
    seed: int,
    start: int = 0,
) -> list[Trajectory]:
    """Improve the answers to many prompts; rows that the accept rule stopped are not sampled again.

    The proposal of step i is the best by r_gap of `config.candidates` samples; a sample that was cut off
    before its EOS is chosen only if there is no other, and never accepted by the "gap" rule.
    Each sample depends only on (seed, number of the prompt, iteration, candidate) and on the present answer.

    Args:
      config: iterations, candidates and the accept rule.
      improver: samples M_PIT from improver prompts.
      gap: scores gap prompts with R_PIT; None is possible only where `config.needs_gap` is not.
      codec: makes both kinds of prompts.
      prompts: raw ids of x.
      answers: y_0, one for each prompt.
      seed: of all samples.
      start: number of the first prompt, where these are a portion of more.

    Raises:
      ConfigError: there is no gap model where the settings need one.
    """
    if gap is None and config.needs_gap:
        fix = "Set accept='always' and candidates=1, or give a run that has a gap reward model."
        value = f"accept={config.accept!r}, candidates={config.candidates}"
        raise invalid("Improve", value, "be 'always' and 1 without R_PIT", fix)
    trajectories = [Trajectory(first=answer) for answer in answers]
    for iteration in range(config.iterations):
        active = [number for number, row in enumerate(trajectories) if not row.stopped]
        if not active:
            break
        present = [trajectories[number].final for number in active]
        contexts = [(prompts[number], as_reference(codec, y)) for number, y in zip(active, present, strict=True)]
        keys = sample_keys(seed, "improve", iteration, [start + number for number in active], config.candidates)
        rows = [codec.improver_prompt(*context) for context in contexts]
        steps = _score_and_choose(config, gap, codec, contexts, present, improver(rows, keys))
        for number, step in zip(active, steps, strict=True):
            row = trajectories[number]
            trajectories[number] = dataclasses.replace(row, steps=(*row.steps, step))
    return trajectories


def _score_and_choose(
    config: Improve,
    gap: Judge | None,
    codec: Codec,
    contexts: Sequence[tuple[Sequence[int], tuple[int, ...]]],
    present: Sequence[Response],
    proposals: Sequence[Response],
) -> list[Step]:
    """Score the proposals, `config.candidates` successive ones for each context, and choose."""
    if gap is None:
        return [Step(proposal=proposal, accepted=True, gap=None, zero=None) for proposal in proposals]
    rows = [codec.gap_prompt(*context) for context in contexts]
    repeated = [row for row in rows for _ in range(config.candidates)]
    scores = gap([*repeated, *rows], [*proposals, *present])
    return choose(config, proposals, scores[: len(proposals)], scores[len(proposals) :])


def choose(
    config: Improve,
    proposals: Sequence[Response],
    gaps: Float[np.ndarray, " N"],
    zero: Float[np.ndarray, " X"],
) -> list[Step]:
    """Return one step for each of X answers: the best of its `config.candidates` successive proposals, and its fate.

    Args:
      config: the accept rule and the number of candidates C; N = X C.
      proposals: the candidates, those of one answer after each other.
      gaps: r_gap(proposal, y_i | x) of each.
      zero: r_gap(y_i, y_i | x) of each answer.
    """
    gaps = gaps.reshape(len(zero), config.candidates)
    valid = usable(gaps, proposals)
    chosen, number = best(valid), np.arange(len(zero))
    accepted = accepts(valid[number, chosen], zero, config.margin) | (config.accept == "always")
    return [
        Step(
            proposal=proposals[row * config.candidates + chosen[row]],
            accepted=bool(accepted[row]),
            gap=float(gaps[row, chosen[row]]),
            zero=float(zero[row]),
        )
        for row in number
    ]
