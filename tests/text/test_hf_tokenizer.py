import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import DataError
from pit_jax.data.collate import Pass
from pit_jax.data.inspect import pass_spans
from pit_jax.text.chat_template import chat_templates
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer
from pit_jax.text.tokenizer import (
    ByteTokenizer,
    SentencePieceTraining,
    find_tokenizer,
    load_tokenizer,
    tokenizer_files,
    train_sentencepiece,
)

from .hf_directories import ALL, CHAT, HERE, changed

LOADED = {name: load_tokenizer(HERE / name) for name in ALL}
BYTE_EXACT = ("llama3", "qwen", "gemma", "mistral")


def ids(name, *tokens):
    return tuple(LOADED[name].token_id(token) for token in tokens)


def test_special_ids_come_from_the_files_and_the_template():
    assert LOADED["llama3"].eos_ids == ids("llama3", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    assert LOADED["qwen"].eos_ids == ids("qwen", "<|im_end|>", "<|endoftext|>")
    assert LOADED["gemma"].eos_ids == ids("gemma", "<end_of_turn>", "<eos>")
    assert LOADED["mistral"].eos_ids == ids("mistral", "</s>")
    assert LOADED["t5"].eos_ids == (1,)
    # Qwen's generation_config names a BOS that its tokenizer says it has not.
    assert [LOADED[name].bos_id for name in ALL] == [*ids("llama3", "<|begin_of_text|>"), None, 2, 1, None]
    assert [LOADED[name].pad_id for name in ALL] == [
        *ids("llama3", "<|eot_id|>"), *ids("qwen", "<|endoftext|>"), 0, 2, 0
    ]  # fmt: skip


@pytest.mark.parametrize("name", CHAT)
def test_what_training_appends_is_the_templates_close_token(name):
    tokenizer = LOADED[name]
    codec = Codec(tokenizer, chat_templates(HERE / name), Lengths(inputs=300, targets=30))
    close = tokenizer.encode(tokenizer.chat_template.close.lstrip())[0]
    response = codec.response_ids("the lazy dog")
    assert response[-1] == close == codec.eos_ids[0]
    assert not set(response[:-1]) & set(codec.eos_ids)
    for eos in tokenizer.eos_ids:
        assert codec.text((*response[:-1], eos, 7)) == "the lazy dog"


# Prepending and stripping of a space are inverse to each other where the text has none of its own.
some_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(text=some_text)
def test_text_comes_back_unchanged(text):
    for name in BYTE_EXACT:
        assert LOADED[name].decode(LOADED[name].encode(text)) == text


def test_specials_are_recognised_in_text_and_left_out_of_it():
    tokenizer = LOADED["llama3"]
    found = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")
    assert {found[0], found[-1]} <= {tokenizer.token_id("<|start_header_id|>"), tokenizer.token_id("<|eot_id|>")}
    assert tokenizer.decode(found) == "user\n\nHi"
    assert LOADED["t5"].encode("x <extra_id_0>")[-1] == LOADED["t5"].vocab_size - 1
    assert tokenizer.decode([tokenizer.vocab_size + 5, 10**9, -1, *tokenizer.encode("Hi")]) == "Hi"


def test_a_piece_that_follows_another_gets_no_space_of_its_own():
    tokenizer = LOADED["mistral"]
    whole = tokenizer.encode("the fox [/INST]")
    assert tokenizer.encode("the fox") + tokenizer.encode_rest(" [/INST]") == whole
    assert tokenizer.encode("the fox") + tokenizer.encode(" [/INST]") != whole
    assert LOADED["llama3"].encode_rest(" [/INST]") == LOADED["llama3"].encode(" [/INST]")


@pytest.mark.parametrize("name", ALL)
def test_a_copy_stands_alone(name, tmp_path):
    tokenizer = LOADED[name]
    tokenizer.save(tmp_path)
    copy = load_tokenizer(tmp_path)
    assert isinstance(copy, HuggingFaceTokenizer)
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert (copy.bos_id, copy.pad_id, copy.eos_ids) == (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids)
    assert tokenizer_files(tmp_path) == copy.files() == tokenizer_files(tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == set(tokenizer.files())
    assert "config.json" not in tokenizer.files()
    for file in set(tokenizer.files()) - {"generation_config.json"}:
        assert tokenizer.files()[file] == (HERE / name / file).read_bytes()


def test_the_fingerprint_covers_special_ids_and_template_but_not_the_place(tmp_path):
    others = {
        "same": changed("gemma", tmp_path / "same", model_max_length=7),
        "template": changed("gemma", tmp_path / "template", chat_template="{{ messages[0].content }}"),
        "eos": changed("gemma", tmp_path / "eos", file="generation_config.json", eos_token_id=[1, 4]),
        "pad": changed("gemma", tmp_path / "pad", pad_token="<eos>"),
    }
    found = {name: load_tokenizer(folder).fingerprint() for name, folder in others.items()}
    assert found.pop("same") == LOADED["gemma"].fingerprint()
    assert len({*found.values(), LOADED["gemma"].fingerprint()}) == 4


def test_tokens_that_only_the_configuration_knows_are_added(tmp_path):
    size = LOADED["gemma"].vocab_size
    decoder = {str(size): {"content": "<tool>", "special": True}}
    folder = changed("gemma", tmp_path, added_tokens_decoder=decoder, additional_special_tokens=["<more>"])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<tool><more>") == [size, size + 1]
    assert tokenizer.vocab_size == size + 2
    wrong = changed("gemma", tmp_path / "wrong", added_tokens_decoder={"3000": {"content": "<tool>"}})
    with pytest.raises(DataError, match=f"'<tool>' must have the id 3000, but tokenizer.json leaves it {size}"):
        load_tokenizer(wrong)


def test_encoding_costs_no_more_than_the_librarys():
    text = "the quick brown fox jumps over the lazy dog\n" * 200
    library = tokenizers.Tokenizer.from_file(str(HERE / "llama3" / "tokenizer.json"))

    def seconds(encode):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            encode()
            best = min(best, time.perf_counter() - start)
        return best

    ours = seconds(lambda: LOADED["llama3"].encode(text))
    assert ours < 2 * seconds(lambda: library.encode(text, add_special_tokens=False).ids)


def test_directories_without_or_with_broken_tokenizers(tmp_path):
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(DataError, match="0 .model files and no tokenizer.json"):
        load_tokenizer(tmp_path)
    for content, message in (
        ('{"model": {"type": "BPE"}, "version": 3}', "tokenizer.json is no tokenizer"),
        ('{"model": ', "no tokenizer description"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=message):
            find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(DataError, match="GPT2Tokenizer.*neither tokenizer.json nor a .model file"):
        find_tokenizer(tmp_path)
    broken = changed("gemma", tmp_path / "broken")
    (broken / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(broken)
    (broken / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object, not list"):
        load_tokenizer(broken)


def test_tokenizers_of_ours_are_exported_by_the_names_others_look_for(tmp_path):
    exported = tmp_path / "bytes"
    exported.mkdir()
    (exported / "tokenizer_config.json").write_bytes(tokenizer_files("bytes")["tokenizer_config.json"])
    assert load_tokenizer(exported).fingerprint() == ByteTokenizer().fingerprint()
    config = SentencePieceTraining(vocab_size=300, bos=True)
    trained = train_sentencepiece([f"one two three {n}" for n in range(99)], config, tmp_path / "saved")
    exported = tmp_path / "exported"
    exported.mkdir()
    for name, content in tokenizer_files(tmp_path / "saved").items():
        (exported / name).write_bytes(content)
    loaded = load_tokenizer(exported)
    assert loaded.encode("one three\ntwo") == trained.encode("one three\ntwo")
    assert (loaded.bos_id, loaded.pad_id, loaded.eos_ids) == (3, 0, (1,))


def test_marks_of_turns_are_shown_to_who_looks_at_the_data():
    codec = Codec(LOADED["gemma"], chat_templates(HERE / "gemma"), Lengths(inputs=60, targets=10))
    prompt = codec.prompt_ids(codec.tokenizer.chat_template.prompt([{"role": "user", "content": "Hi"}]))
    shown = pass_spans(Pass(codec.policy_prompt(prompt), codec.response_ids("fox")), codec)
    assert "".join(span.text for span in shown) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nfox<end_of_turn>"
    )
    assert [span.text for span in shown if span.role == "trained"] == ["fox", "<end_of_turn>"]
