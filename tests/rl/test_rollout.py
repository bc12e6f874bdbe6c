"""Rollouts and rewards on a model whose responses can be enumerated."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from pit_jax.decode.batches import Response, Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.rl.curriculum import Context
from pit_jax.rl.reward import gap_reward, policy_reward
from pit_jax.rl.rollout import per_pass, rollout, rollout_keys
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM, ToyReward, toy_codec, worth

LM = ToyLM()
PARAMS = LM.init(jax.random.key(7))
WORTH = worth(3)
CODEC = toy_codec(inputs=4, targets=5)
SAMPLER = Sampler(
    lm=LM,
    sampling=Sampling(),
    width=CODEC.width("policy"),
    max_new=5,
    eos_ids=(EOS, OTHER_EOS),
    pad_id=PAD,
    batch_size=4,
)
SCORER = Scorer(model=ToyReward(), width=CODEC.width("gap"), length=5, eos_id=EOS, pad_id=PAD, batch_size=4)
ROWS = [CODEC.policy_prompt(prompt) for prompt in ((3, 4), (5,), (4, 4, 3))]


def test_the_samples_of_a_prompt_are_successive_rows_and_differ() -> None:
    result = rollout(SAMPLER, PARAMS, ROWS, 3, rollout_keys(0, 2, 9))
    assert result.samples.tokens.shape == (9, 5)
    np.testing.assert_array_equal(result.prompts.tokens[3:6, 0], [5, 5, 5])
    assert len({response.ids for response in result.responses}) > 3
    np.testing.assert_array_equal(result.inputs.response_segments, result.samples.mask)
    scores = LM.logprobs(PARAMS, result.inputs)
    np.testing.assert_allclose(result.samples.logp, scores.logp, atol=1e-5)


def test_a_sample_depends_on_seed_step_and_its_own_number_only() -> None:
    keys = rollout_keys(0, 2, 9)
    whole = rollout(SAMPLER, PARAMS, ROWS, 3, keys).responses
    assert rollout(SAMPLER, PARAMS, ROWS[1:2], 3, keys[3:6]).responses == whole[3:6]
    np.testing.assert_array_equal(jax.random.key_data(rollout_keys(0, 2, 4)), jax.random.key_data(keys[:4]))
    for other in (rollout_keys(1, 2, 9), rollout_keys(0, 3, 9)):
        assert rollout(SAMPLER, PARAMS, ROWS, 3, other).responses != whole


def test_rewards_read_prompt_reference_and_answer() -> None:
    value = np.asarray(WORTH["worth"])
    answers = [Response((5,), True), Response((4, 4), False)]
    plain = policy_reward(SCORER, WORTH, CODEC, [(3, 4), (5,)], answers)()
    np.testing.assert_allclose(plain, [value[[5, EOS]].mean(), value[4]], rtol=1e-5)
    contexts = [Context((3, 4), (5, 3)), Context((5,), (4,))]
    gaps = gap_reward(SCORER, WORTH, CODEC, contexts, answers)()
    np.testing.assert_allclose(gaps, plain - [value[[5, 3]].mean(), value[4]], rtol=1e-5, atol=1e-6)
    zero = [value[[5, 3, EOS]].mean() - value[[5, 3]].mean(), value[[4, EOS]].mean() - value[4]]
    references = [Response(context.reference, finished=True) for context in contexts]
    np.testing.assert_allclose(gap_reward(SCORER, WORTH, CODEC, contexts, references)(), zero, rtol=1e-5)


def test_tokens_a_pass_are_counted_where_they_are_drafted() -> None:
    plain = rollout(SAMPLER, PARAMS, ROWS, 3, rollout_keys(0, 2, 9)).samples
    assert per_pass(plain) == {}
    drafting = dataclasses.replace(SAMPLER, sampling=Sampling(draft_tokens=2))
    drafted = rollout(drafting, PARAMS, ROWS, 3, rollout_keys(0, 2, 9)).samples
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    found = per_pass(drafted)["tokens_per_pass"]
    assert found.total == plain.mask.sum() - 9 and drafted.passes is not None
    assert found.weight == drafted.passes.sum() <= found.total
