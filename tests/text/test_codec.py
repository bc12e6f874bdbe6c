import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.text.codec import Codec, Lengths, PromptRow, ResponseTooLong, rows_to_prompts
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer, SentencePieceTraining, train_sentencepiece

TEMPLATES = Templates(policy="Q{prompt}A", improver="Q{prompt}R{reference}I", gap="{reference}<{prompt}>>")
CODEC = Codec(ByteTokenizer(), TEMPLATES, Lengths(inputs=12, targets=6))

texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    config = SentencePieceTraining(vocab_size=300, bos=True, special_pieces=("\n",))
    sentences = [f"one two three {n}" for n in range(300)]
    return train_sentencepiece(sentences, config, tmp_path_factory.mktemp("bos"))


@settings(max_examples=100, deadline=None)
@given(prompt=texts, reference=st.text("abc", max_size=5))
def test_assembled_prompts_read_as_their_template_says(prompt, reference):
    tail = prompt[-10:]
    ids = CODEC.prompt_ids(prompt)
    reference_ids = CODEC.response_ids(reference)
    policy = CODEC.policy_prompt(ids)
    improver = CODEC.improver_prompt(ids, reference_ids)
    gap = CODEC.gap_prompt(ids, reference_ids[:-1])
    for row, text in ((policy, f"Q{tail}A"), (improver, f"Q{tail}R{reference}I"), (gap, f"{reference}<{tail}>>")):
        assert CODEC.tokenizer.decode(row.ids) == text
    for row in (improver, gap):
        assert CODEC.tokenizer.decode(row.ids[slice(*row.reference)]) == reference
    assert policy.reference == (0, 0)


def test_widths_are_exactly_those_of_the_longest_rows():
    ids, reference = CODEC.prompt_ids("x" * 99), CODEC.response_ids("y" * 5)
    assert len(CODEC.policy_prompt(ids).ids) == CODEC.width("policy") == 12
    assert len(CODEC.improver_prompt(ids, reference).ids) == CODEC.width("improver") == 10 + 5 + 3
    assert len(CODEC.gap_prompt(ids, reference).ids) == CODEC.width("gap") == 10 + 5 + 3


def test_prompt_is_cut_on_the_left_only():
    assert CODEC.text(CODEC.prompt_ids("0123456789abc")) == "3456789abc"
    # Ids that were not cut, for example of another codec, are cut the same way.
    uncut = CODEC.tokenizer.encode("0123456789abc")
    assert CODEC.policy_prompt(uncut) == CODEC.policy_prompt(CODEC.prompt_ids("0123456789abc"))


def test_response_ends_with_one_eos_and_is_never_cut():
    assert CODEC.response_ids("abcde")[-1] == 1
    assert CODEC.response_ids("abcde").count(1) == 1
    with pytest.raises(ResponseTooLong, match=r"7 tokens.*Lengths\.targets = 6"):
        CODEC.response_ids("abcdef")
    with pytest.raises(ResponseTooLong, match="at most 5 fit"):
        CODEC.improver_prompt((5,), CODEC.tokenizer.encode("abcdef"))


def test_text_and_reference_stop_at_the_first_eos():
    ids = np.array([*CODEC.response_ids("ab"), 99, 1, 0, 0])
    assert CODEC.text(ids) == "ab"
    assert CODEC.without_eos(ids) == CODEC.response_ids("ab")[:-1]
    assert CODEC.improver_prompt((5,), ids) == CODEC.improver_prompt((5,), CODEC.response_ids("ab"))


def test_an_empty_sample_is_an_allowed_reference():
    row = CODEC.improver_prompt(CODEC.prompt_ids("x"), (1,))
    assert CODEC.text(row.ids) == "QxRI"
    assert row.reference[0] == row.reference[1]


def test_bos_is_there_exactly_once(with_bos):
    codec = Codec(with_bos, Templates(), Lengths(inputs=20, targets=10))
    ids, reference = codec.prompt_ids("one two three four"), codec.response_ids("two")
    for row in (codec.policy_prompt(ids), codec.improver_prompt(ids, reference), codec.gap_prompt(ids, reference)):
        assert row.ids[0] == with_bos.bos_id
        assert row.ids.count(with_bos.bos_id) == 1
    assert with_bos.bos_id not in ids
    assert with_bos.bos_id not in reference
    with pytest.raises(DataError, match="2 times"):
        codec.policy_prompt((with_bos.bos_id, *ids))
    without = dataclasses.replace(codec, templates=Templates(bos=False))
    assert with_bos.bos_id not in without.policy_prompt(ids).ids


def test_longest_rows_fit_their_width_with_bos(with_bos):
    codec = Codec(with_bos, Templates(), Lengths(inputs=20, targets=10))
    ids = codec.prompt_ids("one two three " * 30)
    reference = (5,) * 9
    assert len(codec.policy_prompt(ids).ids) == 20
    assert len(codec.improver_prompt(ids, reference).ids) == codec.width("improver")
    assert len(codec.gap_prompt(ids, reference).ids) == codec.width("gap")


def test_dialogue_text_survives_templates(with_bos):
    codec = Codec(with_bos, Templates(), Lengths(inputs=200, targets=100))
    prompt, reply = "\n\nHuman: one  two\n\nAssistant:", "three\n\n  four"
    row = codec.improver_prompt(codec.prompt_ids(prompt), codec.response_ids(reply))
    assert codec.text(codec.response_ids(reply)) == reply
    assert codec.text(codec.prompt_ids(prompt)) == prompt
    # The reference's first token brings its own space, as a reply's after "Assistant:" does.
    assert codec.tokenizer.decode(row.ids[1:]) == f"{prompt}\n\nReference answer: {reply}\n\nImproved answer:"


def test_template_that_leaves_no_room_is_refused():
    with pytest.raises(ConfigError, match=r"Lengths\.inputs = 2 .*more than the 2 tokens"):
        Codec(ByteTokenizer(), TEMPLATES, Lengths(inputs=2, targets=6))
    for settings_ in ({"inputs": 0, "targets": 6}, {"inputs": 5, "targets": 1}):
        with pytest.raises(ConfigError, match="Lengths"):
            Lengths(**settings_)


def test_rows_become_right_padded_arrays():
    prompts = rows_to_prompts([PromptRow((5, 6, 7), (1, 3)), PromptRow((8,), (0, 0))], 4, 9)
    np.testing.assert_array_equal(prompts.tokens, [[5, 6, 7, 9], [8, 9, 9, 9]])
    np.testing.assert_array_equal(prompts.mask, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(prompts.reference, [[0, 1, 1, 0], [0, 0, 0, 0]])
    with pytest.raises(DataError, match="3 tokens, more than the width 2"):
        rows_to_prompts([PromptRow((5, 6, 7), (0, 0))], 2, 0)
