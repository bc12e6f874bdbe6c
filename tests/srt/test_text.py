"""SRT's text: written and taken apart again, for tokenizers of every kind and for every ablation."""

from __future__ import annotations

import itertools

import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.io import serialize
from pit_jax.srt.critique import Critique, Drop
from pit_jax.srt.text import PARTS, Pieces, SrtCodec, SrtText
from pit_jax.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

from ..text.hf_directories import HERE
from .formats import PIECES, codec_of, special, words

CRITIQUE = Critique(
    weaknesses="goal inn with rope", suggestions="goal pond with lamp", score=6.0, refinement="pond via farm"
)
RESPONSE = "inn via farm with rope"
ABLATIONS = [parts for n in range(4) for parts in itertools.combinations(PARTS, n)]


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory) -> Tokenizer:
    return words(tmp_path_factory.mktemp("words"))


@pytest.fixture(params=["words", "bytes", "llama3", "qwen", "gemma", "mistral"])
def codec(request, word_tokenizer) -> SrtCodec:
    if request.param == "words":
        return SrtCodec(special(), codec_of(word_tokenizer))
    tokenizer = ByteTokenizer() if request.param == "bytes" else load_tokenizer(HERE / request.param)
    return SrtCodec(SrtText(targets=600), codec_of(tokenizer, inputs=100, targets=80))


def with_parts(codec: SrtCodec, parts: tuple[str, ...]) -> SrtCodec:
    return SrtCodec(serialize.from_json(serialize.to_json(codec.text) | {"parts": list(parts)}), codec.run)


@pytest.mark.parametrize("parts", ABLATIONS, ids=lambda parts: "+".join(parts) or "none")
def test_what_is_written_is_read_back(codec, parts):
    codec = with_parts(codec, parts)
    target = codec.target(RESPONSE, CRITIQUE)
    assert not isinstance(target, Drop)
    assert target[-1] == codec.run.eos_ids[0] and target.count(target[-1]) == 1
    pieces = codec.split(target)
    text = codec.run.text
    # Response and refinement are, token for token, what they are as responses that stand alone.
    assert (*pieces.response, codec.run.eos_ids[0]) == codec.run.response_ids(RESPONSE)
    assert (*(pieces.refinement or ()), codec.run.eos_ids[0]) == codec.run.response_ids(CRITIQUE.refinement)
    if not parts:
        assert pieces.feedback is None and codec.own_score(pieces.feedback) is None
        return
    assert pieces.feedback is not None
    feedback = text(pieces.feedback)
    assert codec.own_score(pieces.feedback) == (6.0 if "score" in parts else None)
    for part, said in (("weakness", "goal inn with rope"), ("suggestion", "goal pond with lamp")):
        assert (said in feedback) == (part in parts)


@pytest.mark.parametrize("score", range(1, 11))
def test_every_score_survives_the_tokenizer(codec, score):
    ids = codec.run.tokenizer.encode(codec.text.write_feedback(_with(score=float(score))))
    assert codec.own_score(ids) == score


def _with(**changes) -> Critique:
    return Critique(**{**vars(CRITIQUE), **changes})


def test_texts_that_stop_early_come_apart_as_far_as_they_go(codec):
    target = codec.target(RESPONSE, CRITIQUE)
    y, f, r = codec.split(target)
    first, second = codec.markers
    assert codec.opened(y) == (*y, *first)
    assert codec.split(()) == Pieces((), None, None)
    assert codec.split(y) == Pieces(y, None, None)
    assert codec.split(codec.opened(y)) == Pieces(y, (), None)
    assert codec.split((*codec.opened(y), *f)) == Pieces(y, f, None)
    assert codec.split((*codec.opened(y), *f, *second)) == Pieces(y, f, ())
    assert codec.split((*target, *target)) == Pieces(y, f, r), "nothing after EOS counts"
    # A second marker without the first is no refinement of anything.
    assert codec.split((*y, *second, *r)).refinement is None


def test_markers_spelt_in_other_tokens_are_found_by_their_text():
    tokenizer = load_tokenizer(HERE / "llama3")
    codec = SrtCodec(SrtText(targets=600), codec_of(tokenizer, inputs=100, targets=80))
    whole = f"An answer.{codec.text.feedback}Weaknesses: w\nOverall Score: [[4]]{codec.text.refinement}A better one."
    spelt = [i for letter in whole for i in tokenizer.encode(letter)]
    found = codec.split(spelt)
    assert found.feedback is not None and found.refinement is not None
    assert [codec.run.text(part) for part in (found.response, found.refinement)] == ["An answer.", "A better one."]
    assert codec.own_score(found.feedback) == 4


def test_special_tokens_may_be_markers_although_they_have_no_text():
    run = codec_of(load_tokenizer(HERE / "t5"), inputs=100, targets=80)
    text = SrtText(targets=600, feedback="<extra_id_0>", refinement="<extra_id_1>", parts=("weakness",))
    codec = SrtCodec(text, run)
    target = codec.target("a b", _with(weaknesses="c", refinement="d"))
    assert not isinstance(target, Drop) and codec.markers == ((116,), (115,))
    pieces = codec.split(target)
    assert [run.text(part or ()) for part in (pieces.response, pieces.refinement)] == [
        run.text(run.response_ids(said)) for said in ("a b", "d")
    ]
    with pytest.raises(ConfigError, match="must be a text the tokenizer can write"):
        SrtCodec(SrtText(targets=600), run)


def test_what_cannot_be_trained_on_is_dropped_by_name(word_tokenizer):
    codec = SrtCodec(special(), codec_of(word_tokenizer))
    long = " ".join(["farm"] * 14)
    assert codec.target(RESPONSE + " <feedback> farm", CRITIQUE) == Drop("marker_inside")
    assert codec.target(RESPONSE, _with(suggestions="farm<refinement>")) == Drop("marker_inside")
    assert codec.target(long, CRITIQUE) == Drop("too_long_response")
    assert codec.target(RESPONSE, _with(refinement=long)) == Drop("too_long_refinement")
    assert codec.target(RESPONSE, _with(weaknesses=" ".join([long] * 3))) == Drop("too_long")
    fits = _with(weaknesses="farm " * 31)
    target = codec.target(RESPONSE, fits)
    assert len(target) == 48 and codec.target(RESPONSE, _with(weaknesses=fits.weaknesses + "farm")) == Drop("too_long")


def test_the_run_codec_keeps_its_prompts(word_tokenizer):
    codec = SrtCodec(special(), codec_of(word_tokenizer))
    assert codec.codec.lengths.targets == 48 and codec.codec.width("policy") == codec.run.width("policy")
    ids = codec.run.prompt_ids("goal from oak by red blue")
    assert codec.codec.policy_prompt(ids) == codec.run.policy_prompt(ids)


def test_a_tokenizer_without_the_pieces_is_refused_by_name(tmp_path):
    plain = codec_of(words(tmp_path / "a", PIECES[:2]))
    with pytest.raises(ConfigError, match="SrtText.feedback = '<feedback>' must be a text the tokenizer can write"):
        SrtCodec(special(), plain)
    without_ten = codec_of(words(tmp_path / "b", PIECES[:-1]))
    with pytest.raises(ConfigError, match="SrtText.score.*survive the tokenizer.*pieces for the scores 1 to 10"):
        SrtCodec(special(), without_ten)
    SrtCodec(special(parts=("weakness", "suggestion")), without_ten)
    with pytest.raises(ConfigError, match="SrtText.targets = 16 must be more than 16"):
        SrtCodec(special(targets=16), codec_of(words(tmp_path / "c")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parts": ("score", "weakness")}, "parts.*in this order"),
        ({"parts": ("praise",)}, "parts"),
        ({"score": "[[n]]"}, "SrtText.score.*contain {score}"),
        ({"weakness": "{weaknes}"}, "SrtText.weakness.*use only {weakness}"),
        ({"feedback": " \n"}, "not be empty"),
        ({"feedback": "##", "refinement": "###"}, "not hold each other"),
    ],
)
def test_formats_are_checked(fields, said):
    with pytest.raises(ConfigError, match=said):
        SrtText(targets=100, **fields)


def test_scores_are_read_from_their_own_template_only():
    text = SrtText(targets=100, score="Score ({score}) of 10.")
    assert text.read_score("Score (7) of 10.") == 7 and text.read_score("Score ( 7 ) of 10.") == 7
    assert text.read_score("Score (3) of 10. Score (4) of 10.") == 4
    assert text.read_score("[[7]]") is None and text.read_score("Score (70) of 10.") is None
