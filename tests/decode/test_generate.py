"""Sampling of whole responses, against a model whose responses can all be enumerated."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.core.rng import key_for
from pit_jax.core.types import Prompts, Samples
from pit_jax.decode.batches import Response, Sampler, Scorer, as_reference, chunks, responses, with_samples
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM, ToyReward, all_responses, conditional, toy_codec, worth
from pit_jax.text.codec import PromptRow, rows_to_prompts
from tests.decode.distribution import assert_distributed

LM = ToyLM()
PARAMS = LM.init(jax.random.key(7))
WORTH = worth(3)
PROMPTS = [[3, 4], [5], [4, 4, 3], [3, 5, 5, 4], [5, 3]]
EOS_IDS = (EOS, OTHER_EOS)
LENGTH = 5


def _keys(rows: int) -> jax.Array:
    return jax.random.split(key_for(0, "test"), rows)


def _rows(prompts: list[list[int]]) -> list[PromptRow]:
    return [PromptRow(ids=tuple(prompt), reference=(0, 0)) for prompt in prompts]


def _generate(prompts: Prompts, keys: jax.Array, sampling: Sampling | None = None, length: int = LENGTH) -> Samples:
    sampling = sampling or Sampling()
    return generate(LM, PARAMS, prompts, keys, sampling, max_new=length, eos_ids=EOS_IDS, pad_id=PAD)


def test_sequences_follow_the_exact_distribution() -> None:
    rows, length = 20_000, 2
    samples = _generate(rows_to_prompts(_rows([[3, 5]] * rows), 2, PAD), _keys(rows), length=length)
    every = all_responses(length, EOS_IDS)
    exact = np.exp(np.asarray(LM.logprobs(PARAMS, conditional([3, 5], every, 2, length)).logp).sum(-1))
    assert_distributed(samples, every, exact)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_logp_is_the_untempered_logp_of_the_model(temperature: float) -> None:
    prompts = rows_to_prompts(_rows(PROMPTS), 6, PAD)
    samples = _generate(prompts, _keys(5), Sampling(temperature=temperature))
    scores = LM.logprobs(PARAMS, with_samples(prompts, samples))
    np.testing.assert_allclose(samples.logp, scores.logp, atol=1e-5)
    if temperature == 0.0:
        np.testing.assert_array_equal(scores.correct, np.asarray(samples.mask, np.float32))


def test_every_eos_ends_a_row_and_padding_follows() -> None:
    rows = 64
    samples = _generate(rows_to_prompts(_rows(PROMPTS[:1] * rows), 2, PAD), _keys(rows))
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    ends = np.isin(tokens, EOS_IDS) & mask
    assert {int(t) for t in tokens[ends]} == set(EOS_IDS)
    assert not samples.finished.all()
    np.testing.assert_array_equal(ends.sum(-1), np.asarray(samples.finished, int))
    for row, length, end in zip(ends, mask.sum(-1), np.asarray(samples.finished), strict=True):
        assert length == (np.flatnonzero(row)[0] + 1 if end else LENGTH)
    np.testing.assert_array_equal(mask, np.arange(LENGTH)[None, :] < mask.sum(-1, keepdims=True))
    assert np.all(tokens[~mask] == PAD)
    assert np.all(np.asarray(samples.logp)[~mask] == 0.0)


def test_a_sample_depends_neither_on_its_mates_nor_on_batch_or_padding() -> None:
    keys = _keys(5)
    together = _generate(rows_to_prompts(_rows(PROMPTS), 4, PAD), keys)
    wide = _generate(rows_to_prompts(_rows(PROMPTS[::-1]), 9, PAD), keys[::-1])
    for row in range(5):
        alone = _generate(rows_to_prompts(_rows(PROMPTS[row : row + 1]), 4, PAD), keys[row : row + 1])
        for other, index in ((alone, 0), (wide, 4 - row)):
            np.testing.assert_array_equal(other.tokens[index], together.tokens[row])
            np.testing.assert_array_equal(other.mask[index], together.mask[row])
            np.testing.assert_allclose(other.logp[index], together.logp[row], atol=1e-6)


def test_a_shorter_limit_gives_a_prefix() -> None:
    prompts, keys = rows_to_prompts(_rows(PROMPTS), 4, PAD), _keys(5)
    np.testing.assert_array_equal(_generate(prompts, keys, length=3).tokens, _generate(prompts, keys).tokens[:, :3])


def test_the_loop_ends_with_the_last_row() -> None:
    steps = []

    class CountingLM(ToyLM):
        def step(self, params, cache, token):  # noqa: ANN001, ANN202
            jax.debug.callback(lambda: steps.append(1))
            return super().step(params, cache, token)

    prompts, keys = rows_to_prompts(_rows(PROMPTS), 4, PAD), _keys(5)
    samples = generate(CountingLM(), PARAMS, prompts, keys, Sampling(), max_new=500, eos_ids=EOS_IDS, pad_id=PAD)
    assert samples.finished.all()
    jax.effects_barrier()
    assert len(steps) == int(samples.mask.sum(-1).max()) - 1 < 499


def test_batches_of_any_size_give_the_same_samples() -> None:
    def sampler(size: int) -> Sampler:
        return Sampler(
            lm=LM, sampling=Sampling(), width=4, max_new=LENGTH, eos_ids=EOS_IDS, pad_id=PAD, batch_size=size
        )

    keys = _keys(5)
    whole = sampler(5).answer(PARAMS, _rows(PROMPTS), keys)
    assert sampler(2).answer(PARAMS, _rows(PROMPTS), keys) == whole
    assert sampler(7).answer(PARAMS, _rows(PROMPTS), keys) == whole
    assert sampler(2).answer(PARAMS, [], keys[:0]) == []


def test_responses_drop_the_eos_and_keep_whether_there_was_one() -> None:
    samples = Samples(
        tokens=np.array([[3, 4, OTHER_EOS], [3, 4, 5], [EOS, PAD, PAD]]),
        mask=np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0]], bool),
        logp=np.zeros((3, 3), np.float32),
        finished=np.array([True, False, True]),
    )
    ended, cut, empty = responses(samples)
    assert (ended, cut, empty) == (Response((3, 4), True), Response((3, 4, 5), False), Response((), True))
    assert (ended.closed(EOS), cut.closed(EOS), empty.closed(EOS)) == ((3, 4, EOS), (3, 4, 5), (EOS,))


def test_chunks_cover_every_row_once_and_have_one_size() -> None:
    for rows, size in ((7, 3), (6, 3), (1, 4)):
        parts = list(chunks(rows, size))
        assert all(len(index) == size and index.max() < rows for index, _ in parts)
        assert [int(i) for index, real in parts for i in index[:real]] == list(range(rows))


def test_bad_input_is_named() -> None:
    prompts = rows_to_prompts(_rows(PROMPTS), 4, PAD)
    with pytest.raises(ConfigError, match="max_new = 0"):
        _generate(prompts, _keys(5), length=0)
    with pytest.raises(ConfigError, match="eos_ids"):
        generate(LM, PARAMS, prompts, _keys(5), Sampling(), max_new=2, eos_ids=(), pad_id=PAD)
    scorer = Scorer(model=ToyReward(), width=4, length=2, eos_id=EOS, pad_id=PAD, batch_size=2)
    with pytest.raises(DataError, match="Response 1 has 3 tokens and must have at most 2"):
        scorer.score(WORTH, _rows(PROMPTS[:2]), [Response((3,), True), Response((3, 4), True)])
    with pytest.raises(ConfigError, match="Scorer.batch_size = 0"):
        dataclasses.replace(scorer, batch_size=0)


def test_scores_read_the_eos_of_finished_responses_whatever_the_batch_size() -> None:
    answers = [Response((3, 4), True), Response((3, 4), False), Response((), True), Response((5,), True)]
    rows = [PromptRow(ids=(3, 5, 4), reference=(1, 3))] * 4
    value = np.asarray(WORTH["worth"])
    reference = value[[5, 4]].mean()
    expected = [value[[3, 4, EOS]].mean(), value[[3, 4]].mean(), value[EOS], value[[5, EOS]].mean()] - reference
    for size in (1, 3, 4):
        scorer = Scorer(model=ToyReward(), width=5, length=3, eos_id=EOS, pad_id=PAD, batch_size=size)
        np.testing.assert_allclose(scorer.score(WORTH, rows, answers), expected, rtol=1e-5)


def test_a_sampled_reference_fits_its_prompt() -> None:
    codec = toy_codec(inputs=4, targets=3, bos_id=5)
    for answer, expected in (
        (Response((3, 4), True), (3, 4)),
        (Response((3, 4, 4), False), (3, 4)),
        (Response((5, 3), True), (3,)),
        (Response((), True), ()),
    ):
        assert as_reference(codec, answer) == expected
        row = codec.improver_prompt((3,), as_reference(codec, answer))
        assert row.ids[slice(*row.reference)] == expected


def test_devices_that_share_a_batch_give_the_same_samples_and_scores() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sampler = Sampler(lm=LM, sampling=Sampling(), width=4, max_new=LENGTH, eos_ids=EOS_IDS, pad_id=PAD, batch_size=4)
    scorer = Scorer(model=ToyReward(), width=4, length=LENGTH, eos_id=EOS, pad_id=PAD, batch_size=4)
    answers = sampler.answer(PARAMS, _rows(PROMPTS), _keys(5))
    assert dataclasses.replace(sampler, mesh=mesh).answer(PARAMS, _rows(PROMPTS), _keys(5)) == answers
    scores = scorer.score(WORTH, _rows(PROMPTS), answers)
    shared = dataclasses.replace(scorer, mesh=mesh).score(WORTH, _rows(PROMPTS), answers)
    np.testing.assert_allclose(shared, scores, rtol=1e-6)


@pytest.mark.parametrize(("size", "mesh"), [(6, False), (7, False), (2, False), (12, True), (4, True)])
def test_samples_of_one_prompt_are_those_of_repeated_prompts(size: int, mesh: bool) -> None:
    devices = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)) if mesh else None
    sampler = Sampler(
        lm=LM, sampling=Sampling(), width=4, max_new=LENGTH, eos_ids=EOS_IDS, pad_id=PAD, batch_size=size, mesh=devices
    )
    keys = _keys(15)
    repeated = [row for row in _rows(PROMPTS) for _ in range(3)]
    assert sampler.answer(PARAMS, _rows(PROMPTS), keys) == sampler.answer(PARAMS, repeated, keys)
    assert sampler.prompts_at_once(3) == {6: 2, 7: 2, 2: 0, 12: 4, 4: 0}[size]


def test_keys_that_cannot_be_shared_out_are_named() -> None:
    sampler = Sampler(lm=LM, sampling=Sampling(), width=4, max_new=2, eos_ids=EOS_IDS, pad_id=PAD, batch_size=4)
    with pytest.raises(DataError, match="7 keys cannot be shared out among 5 prompts"):
        sampler.answer(PARAMS, _rows(PROMPTS), _keys(7))
    with pytest.raises(ConfigError, match=r"generate\.keys = 7 must be a multiple of the 5 prompts"):
        _generate(rows_to_prompts(_rows(PROMPTS), 4, PAD), _keys(7))
