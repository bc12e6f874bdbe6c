import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.text.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    SentencePieceTraining,
    load_tokenizer,
    train_sentencepiece,
)

SENTENCES = [f"the quick brown fox {n} jumps over\nthe lazy dog  {n * 7} times" for n in range(200)]
WORDS = ["goal from oak by red blue", "inn via tower barn with lamp thanks", "end friend"]
WORD_CONFIG = SentencePieceTraining(vocab_size=100, model_type="word", special_pieces=("<ref>", "<improve>"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    config = SentencePieceTraining(vocab_size=400, bos=True, special_pieces=("\n", "<ref>"))
    return train_sentencepiece(SENTENCES, config, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return train_sentencepiece(WORDS, WORD_CONFIG, tmp_path_factory.mktemp("words"))


# U+2581 is how SentencePiece writes a space: it comes back as one.
any_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(text=any_text | st.text(" \nab<ref>", max_size=20))
def test_text_comes_back_unchanged(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(chosen=st.lists(st.sampled_from(" ".join(WORDS).split()), max_size=12))
def test_word_vocabulary_has_one_piece_per_word_and_loses_nothing(words, chosen):
    text = " ".join(chosen)
    ids = words.encode(text)
    assert len(ids) == len(chosen)
    assert words.unk_id not in ids
    assert words.decode(ids) == text


def test_special_ids_are_those_of_the_model(words, bpe):
    assert (words.pad_id, words.eos_ids, words.unk_id, words.bos_id) == (0, (1,), 2, None)
    assert (bpe.pad_id, bpe.eos_ids, bpe.unk_id, bpe.bos_id) == (0, (1,), 2, 3)
    assert words.special_pieces == {"<ref>": 3, "<improve>": 4}
    assert words.vocab_size == 5 + len(set(" ".join(WORDS).split()))


@pytest.mark.parametrize("name", ["words", "bpe"])
def test_a_special_piece_is_one_token_wherever_it_stands(request, name):
    tokenizer = request.getfixturevalue(name)
    ref = tokenizer.special_pieces["<ref>"]
    assert tokenizer.encode("<ref>") == [ref]
    assert tokenizer.encode("<ref><ref>") == [ref, ref]
    for text in ("oak<ref>red blue", "<ref>red", "oak by<ref>"):
        ids = tokenizer.encode(text)
        assert ids.count(ref) == 1
        assert tokenizer.decode(ids) == text


def test_specials_are_never_read_out_of_text(bpe):
    ids = bpe.encode("a </s> <s> <pad> b")
    assert not {bpe.pad_id, bpe.bos_id, *bpe.eos_ids} & set(ids)


def test_ids_beyond_the_vocabulary_are_unknown_not_an_error(bpe, words):
    # A model's vocabulary may be padded beyond the tokenizer's.
    for tokenizer in (bpe, words):
        assert "\u2047" in tokenizer.decode([tokenizer.vocab_size + 3])
    assert ByteTokenizer().decode([300, 68, 0, 1]) == "A"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_training_is_deterministic(kind, tmp_path):
    config = SentencePieceTraining(vocab_size=330, model_type=kind, sentences=150, seed=3)
    twice = [train_sentencepiece(iter(SENTENCES), config, tmp_path / name) for name in ("a", "b")]
    assert twice[0].fingerprint() == twice[1].fingerprint()
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()


def test_long_lines_are_not_left_out(tmp_path):
    # The trainer's default limit is 4192 bytes.
    config = SentencePieceTraining(vocab_size=50, model_type="word", special_pieces=())
    trained = train_sentencepiece(["filler " * 2000 + "needle"], config, tmp_path)
    assert trained.unk_id not in trained.encode("needle")


def test_save_and_load_give_the_same_tokenizer_at_any_path(words, tmp_path):
    for folder in ("one", "two"):
        words.save(tmp_path / folder)
    bare = tmp_path / "other.model"
    bare.write_bytes((tmp_path / "one" / "tokenizer.model").read_bytes())
    loaded = [load_tokenizer(tmp_path / "one"), load_tokenizer(str(tmp_path / "two")), load_tokenizer(bare)]
    assert {tokenizer.fingerprint() for tokenizer in loaded} == {words.fingerprint()}
    assert all(tokenizer.encode("oak<ref>red") == words.encode("oak<ref>red") for tokenizer in loaded)
    ByteTokenizer().save(tmp_path / "bytes")
    assert load_tokenizer(tmp_path / "bytes").fingerprint() == load_tokenizer("bytes").fingerprint()


def test_a_replaced_model_is_refused(words, bpe, tmp_path):
    words.save(tmp_path)
    bpe.save(tmp_path / "bpe")
    (tmp_path / "tokenizer.model").write_bytes((tmp_path / "bpe" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="was replaced"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no tokenizer description"), ("[]", "no tokenizer description"), ('{"kind": "x"}', "no tokenizer desc")],
)
def test_broken_metadata_are_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_foreign_metadata_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "wordpiece", "fingerprint": "x"}))
    with pytest.raises(DataError, match="kind = 'wordpiece'"):
        load_tokenizer(tmp_path)


def test_missing_and_broken_models_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(DataError, match="0 .model files"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="broken.model: is no SentencePiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such tokenizer model"):
        SentencePieceTokenizer(tmp_path / "absent.model")


def test_too_little_text_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="could not train 400 pieces"):
        train_sentencepiece(["a b"], SentencePieceTraining(vocab_size=400), tmp_path)
    with pytest.raises(DataError, match="Give more text"):
        train_sentencepiece([], WORD_CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("settings_", "field"),
    [
        ({"vocab_size": 259}, "vocab_size"),
        ({"vocab_size": 500, "model_type": "char"}, "model_type"),
        ({"vocab_size": 500, "special_pieces": ("<a>", "<a>")}, "special_pieces"),
        ({"vocab_size": 500, "special_pieces": ("",)}, "special_pieces"),
        ({"vocab_size": 500, "special_pieces": ("<pad>",)}, "special_pieces"),
        ({"vocab_size": 500, "sentences": -1}, "sentences"),
    ],
)
def test_bad_training_settings_are_named(settings_, field):
    with pytest.raises(ConfigError, match=rf"SentencePieceTraining\.{field}"):
        SentencePieceTraining(**settings_)
