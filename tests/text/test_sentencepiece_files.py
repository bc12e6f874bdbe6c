"""A SentencePiece model with the files of a checkpoint beside it: T5's spiece.model, Llama's tokenizer.model."""

import json

import pytest
import sentencepiece

from pit_jax.core.errors import DataError
from pit_jax.text.tokenizer import SentencePieceTokenizer, find_tokenizer, load_tokenizer, tokenizer_files


def train(path, kind, **options):
    options = {"unk_id": 2, "pad_id": 0, "eos_id": 1, "bos_id": -1} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the quick brown fox {n} jumps over the lazy dog" for n in range(200)]),
        model_prefix=str(path), vocab_size=300 if options.get("byte_fallback") else 60, model_type=kind, minloglevel=2,
        hard_vocab_limit=False, num_threads=1, **options,
    )  # fmt: skip
    path.with_suffix(".vocab").unlink()


def describe(folder, name="tokenizer_config.json", **content):
    (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    train(folder / "spiece", "unigram")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    train(
        folder / "tokenizer", "bpe", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    describe(folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    describe(folder, "generation_config.json", eos_token_id=[2], bos_token_id=1)
    return folder


def test_t5_has_its_extra_ids_at_the_end_in_falling_order(t5):
    bare, tokenizer = SentencePieceTokenizer(t5 / "spiece.model"), load_tokenizer(t5)
    size = bare.vocab_size
    assert tokenizer.vocab_size == size + 100
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.bos_id) == (0, (1,), None)
    assert tokenizer.encode("<extra_id_0><extra_id_99>") == [size + 99, size]
    the = bare.encode("the fox")
    assert tokenizer.encode("the fox") == the
    assert tokenizer.encode("the fox <extra_id_1> the fox") == [*the, size + 98, *the]
    assert tokenizer.decode([*the, size + 98, 1]) == "the fox"
    assert tokenizer.fingerprint() != bare.fingerprint()


def test_number_and_presence_of_extra_ids_are_the_files_own(t5, tmp_path):
    (tmp_path / "spiece.model").write_bytes((t5 / "spiece.model").read_bytes())
    size = SentencePieceTokenizer(t5 / "spiece.model").vocab_size
    for config, extra in (({"extra_ids": 7}, 7), ({"tokenizer_class": "XLNetTokenizer"}, 0)):
        describe(tmp_path, eos_token="</s>", **config)
        assert load_tokenizer(tmp_path).vocab_size == size + extra


def test_llama_recognises_its_special_tokens_in_text(llama):
    bare, tokenizer = SentencePieceTokenizer(llama / "tokenizer.model"), load_tokenizer(llama)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), bare.vocab_size)
    the, fox = bare.encode("the"), bare.encode("fox")
    first, *inner, last = tokenizer.encode("<s>the</s>")
    assert (first, last) == (1, 2)
    # No space is put before the words after a special token.
    assert inner != the
    assert bare.decode(inner) == "the"
    assert tokenizer.encode("the</s> fox") == [*the, 2, *fox]
    assert bare.encode("</s>") != [2]
    assert tokenizer.decode([1, *the, 2]) == "the"


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_copy_stands_alone_and_is_exported_without_our_own_file(kind, request, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenizer.save(tmp_path)
    copy = load_tokenizer(tmp_path)
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert copy.encode("the <extra_id_0> fox</s>") == tokenizer.encode("the <extra_id_0> fox</s>")
    model = {"t5": "spiece.model", "llama": "tokenizer.model"}[kind]
    assert {model, "generation_config.json"} <= tokenizer_files(copy).keys()
    assert "tokenizer.json" not in tokenizer_files(copy)


def test_files_of_another_model_are_refused(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    describe(tmp_path, eos_token="</s>", added_tokens_decoder={"2": {"content": "<eot>"}})
    with pytest.raises(DataError, match="gives '<eot>' the id 2, that of another piece"):
        find_tokenizer(tmp_path)
