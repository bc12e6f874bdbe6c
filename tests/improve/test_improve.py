"""The improvement loop, its accept rule, and best-of-n."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError
from pit_jax.decode.batches import Response, Sampler, Scorer, as_reference
from pit_jax.decode.sampling import Sampling
from pit_jax.improve.accept import Improve, accepts, best, usable
from pit_jax.improve.baselines import best_of_n
from pit_jax.improve.loop import Trajectory, first_answers, improve, sample_keys
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM, ToyReward, toy_codec, worth

LM = ToyLM()
POLICY, IMPROVER, WORTH = LM.init(jax.random.key(7)), LM.init(jax.random.key(8)), worth(3)
CODEC = toy_codec(inputs=4, targets=5)
PROMPTS = [(3, 4), (5,), (4, 4, 3), (5, 5), (3,), (4, 5), (5, 3, 3)]


def _sampler(kind: str, batch_size: int = 4) -> Sampler:
    return Sampler(
        lm=LM,
        sampling=Sampling(),
        width=CODEC.width(kind),
        max_new=5,
        eos_ids=(EOS, OTHER_EOS),
        pad_id=PAD,
        batch_size=batch_size,
    )


SCORER = Scorer(model=ToyReward(), width=CODEC.width("gap"), length=5, eos_id=EOS, pad_id=PAD, batch_size=4)
answer_policy = functools.partial(_sampler("policy").answer, POLICY)
answer_improver = functools.partial(_sampler("improver").answer, IMPROVER)
judge = functools.partial(SCORER.score, WORTH)
ANSWERS = first_answers(answer_policy, CODEC, PROMPTS, 0)


def _improve(config: Improve, **change: object) -> list[Trajectory]:
    arguments = {"improver": answer_improver, "gap": judge, "prompts": PROMPTS, "answers": ANSWERS, "seed": 0}
    return improve(config, codec=CODEC, **(arguments | change))


def _quality(response: Response) -> float:
    """Return what ToyReward says of a response alone."""
    return float(np.asarray(WORTH["worth"])[list(response.closed(EOS))].mean())


def test_the_gap_rule_only_accepts_better_answers_and_stops_at_the_first_rejection() -> None:
    rows = _improve(Improve(iterations=4, margin=0.1))
    assert {step.accepted for row in rows for step in row.steps} == {True, False}
    for row in rows:
        present = row.first
        for number, step in enumerate(row.steps):
            assert step.accepted == (step.proposal.finished and step.gap > step.zero + 0.1)
            assert step.accepted or number == len(row.steps) - 1
            np.testing.assert_allclose(step.gap - step.zero, _quality(step.proposal) - _quality(present), atol=1e-5)
            if step.accepted:
                assert _quality(step.proposal) > _quality(present)
                present = step.proposal
        assert row.final == present
        assert row.stopped or len(row.steps) == 4


def test_always_is_the_plain_chain() -> None:
    rows = _improve(Improve(iterations=3, accept="always"), gap=None)
    for number, row in enumerate(rows):
        present = row.first
        for iteration, step in enumerate(row.steps):
            prompt = CODEC.improver_prompt(PROMPTS[number], as_reference(CODEC, present))
            assert step.accepted and step.gap is None
            expected = answer_improver([prompt], sample_keys(0, "improve", iteration, [number], 1))[0]
            assert step.proposal == expected
            present = step.proposal
        assert len(row.steps) == 3
        assert row.final == present


def test_always_with_a_gap_model_proposes_the_same_and_reports_the_gaps() -> None:
    plain = _improve(Improve(iterations=2, accept="always"), gap=None)
    judged = _improve(Improve(iterations=2, accept="always"))
    for one, other in zip(plain, judged, strict=True):
        assert [step.proposal for step in one.steps] == [step.proposal for step in other.steps]
        assert all(step.gap is not None and step.accepted for step in other.steps)


def test_the_best_candidate_is_proposed_and_more_candidates_keep_the_first_samples() -> None:
    few, many = (_improve(Improve(candidates=number)) for number in (1, 6))
    for one, other in zip(few, many, strict=True):
        scores = [_quality(step.proposal) for step in (*one.steps, *other.steps)]
        if one.steps[0].proposal.finished:
            assert scores[1] >= scores[0]


def test_results_do_not_depend_on_batch_size_or_on_the_other_prompts() -> None:
    config = Improve(iterations=2, candidates=2)
    whole = _improve(config)
    other = functools.partial(_sampler("improver", batch_size=5).answer, IMPROVER)
    score = functools.partial(dataclasses.replace(SCORER, batch_size=3).score, WORTH)
    for one, same in zip(whole, _improve(config, improver=other, gap=score), strict=True):
        assert [step.proposal for step in one.steps] == [step.proposal for step in same.steps]
        assert [step.accepted for step in one.steps] == [step.accepted for step in same.steps]
    for one, same in zip(whole[:3], _improve(config, prompts=PROMPTS[:3], answers=ANSWERS[:3]), strict=True):
        assert [step.proposal for step in one.steps] == [step.proposal for step in same.steps]
    assert _improve(config, seed=1) != whole


def test_one_compiled_program_serves_all_iterations() -> None:
    traces = []

    class CountingLM(ToyLM):
        def prefill(self, params, prompts, max_new, samples=1, tried=0):  # noqa: ANN001, ANN202
            traces.append((*prompts.tokens.shape, samples))
            return super().prefill(params, prompts, max_new, samples, tried)

    sampler = dataclasses.replace(_sampler("improver"), lm=CountingLM())
    rows = _improve(Improve(iterations=4, candidates=3), improver=functools.partial(sampler.answer, IMPROVER))
    assert len({len(row.steps) for row in rows}) > 1
    assert traces == [(1, CODEC.width("improver"), 3)], "as many prompts as have room for three candidates"


def test_the_answer_after_i_steps() -> None:
    for row in _improve(Improve(iterations=3)):
        assert row.answer(0) == row.first
        assert row.answer(3) == row.answer(9) == row.final
        if row.steps[0].accepted:
            assert row.answer(1) == row.steps[0].proposal


def test_cut_off_candidates_are_chosen_last_and_never_accepted_by_gap() -> None:
    cut, done = Response((3, 3, 3, 3, 3), False), Response((4,), True)
    scores = {cut: 5.0, done: 1.0, ANSWERS[0]: 0.0}

    def gap(rows: list, answers: list[Response]) -> np.ndarray:
        return np.array([scores[answer] for answer in answers], np.float32)

    def run(accept: str, *proposals: Response) -> Trajectory:
        config = Improve(accept=accept, candidates=len(proposals))
        return improve(config, lambda rows, keys: list(proposals), gap, CODEC, PROMPTS[:1], ANSWERS[:1], 0)[0]

    assert run("gap", cut, done).final == done
    assert run("gap", cut).final == ANSWERS[0]
    assert run("gap", cut).steps[0].gap == 5.0
    assert run("always", cut).final == cut


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_an_accepted_gap_is_never_below_its_zero(pairs: list[tuple[float, float]], margin: float) -> None:
    gap, zero = np.array(pairs).T
    accepted = accepts(gap, zero, margin)
    assert np.all(gap[accepted] > zero[accepted])
    assert not accepts(zero, zero, margin).any()


def test_best_prefers_finished_answers_and_the_first_of_equals() -> None:
    finished, cut = Response((3,), True), Response((3,), False)
    scores = usable(np.array([[1.0, 9.0, 1.0], [2.0, 3.0, 1.0]]), [finished, cut, finished, cut, cut, cut])
    np.testing.assert_array_equal(best(scores), [0, 0])


def test_best_of_n_starts_with_the_original_and_takes_the_best() -> None:
    results = best_of_n(answer_policy, judge, CODEC, PROMPTS, 3, 0)
    assert any(len(set(result.samples)) == 3 for result in results)
    for result, original in zip(results, ANSWERS, strict=True):
        assert result.samples[0] == original
        np.testing.assert_allclose(result.rewards, [_quality(sample) for sample in result.samples], rtol=1e-5)
        allowed = [sample for sample in result.samples if sample.finished] or [result.samples[0]]
        assert _quality(result.answer) == max(_quality(sample) for sample in allowed)
    assert [r.answer for r in best_of_n(answer_policy, judge, CODEC, PROMPTS, 1, 0)] == ANSWERS


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="without R_PIT"):
        _improve(Improve(), gap=None)
    with pytest.raises(ConfigError, match="best_of_n.n = 0"):
        best_of_n(answer_policy, judge, CODEC, PROMPTS, 0, 0)
    for bad in ({"iterations": 0}, {"candidates": 0}, {"accept": "never"}, {"margin": -1.0}):
        with pytest.raises(ConfigError, match=f"Improve.{next(iter(bad))}"):
            Improve(**bad)
