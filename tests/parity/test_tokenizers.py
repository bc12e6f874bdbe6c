"""Tokenizers and chat templates against transformers', on tokenizers in the forms of the model families."""

import json
import pathlib
import re

import pytest
import sentencepiece
import tokenizers
import transformers
from transformers.convert_slow_tokenizer import generate_merges

from pit_jax.core.errors import DataError
from pit_jax.text.chat_template import chat_templates, load_chat_template
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.tokenizer import load_tokenizer, tokenizer_files

pytestmark = pytest.mark.parity
HERE = pathlib.Path(__file__).parents[1] / "data" / "hf_tokenizers"
CHAT = ("llama3", "qwen", "gemma", "mistral")
TEXTS = (
    "the quick brown fox",
    " leading, trailing ",
    "two  spaces\n\nand lines\n",
    "Äpfel größer 日本 😀 \u0301 unknown: ж",
    "a<|eot_id|>b <|im_end|>\n</s> x<end_of_turn>\ny<pad> <extra_id_3> z",
    "[INST] Hi [/INST]",
    "",
    " ",
    "don't 12345 jumps7",
)
TALKS = (
    [("user", "Hi there")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi "), ("assistant", "Hello!"), ("user", "the lazy\n\ndog?")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "{five} 5 ")],
)


def messages(talk):
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(scope="module", params=[*CHAT, "t5"])
def pair(request):
    folder = HERE / request.param
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_texts_and_special_ids_are_those_of_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.vocab_size == len(theirs)
    if theirs.pad_token_id is not None:
        assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("talk", TALKS)
def test_conversations_are_those_of_apply_chat_template(name, talk):
    folder = HERE / name
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    template, talk = load_chat_template(folder), messages(talk)
    day = {"date_string": "26 Jul 2024"}
    try:
        wanted = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **day)
    except Exception as error:  # noqa: BLE001 (whatever the template raises)
        with pytest.raises(DataError, match=str(error).split(".")[0]):
            template.prompt(talk)
        return
    assert template.render(talk, ask=True) == wanted
    bos = theirs.bos_token if template.opens_with_bos else ""
    assert bos + template.prompt(talk) + template.cue == wanted
    ids = theirs.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False, **day)
    codec = Codec(load_tokenizer(folder), chat_templates(folder), Lengths(inputs=600, targets=30))
    row = codec.policy_prompt(codec.prompt_ids(template.prompt(talk)))
    assert list(row.ids) == ids
    answered = [*talk, {"role": "assistant", "content": "the fox"}]
    ids = theirs.apply_chat_template(answered, tokenize=True, return_dict=False, **day)
    whole = [*row.ids, *codec.response_ids("the fox")]
    assert ids[: len(whole)] == whole


@pytest.mark.parametrize("name", [*CHAT, "t5"])
def test_transformers_loads_what_is_exported(name, tmp_path):
    ours = load_tokenizer(HERE / name)
    for file, content in tokenizer_files(ours).items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    eos = generation.eos_token_id
    assert set(eos if isinstance(eos, list) else [eos]) == set(ours.eos_ids)


def train(path, kind, **ids):
    options = {"unk_id": 2, "pad_id": 0, "eos_id": 1, "bos_id": -1, "byte_fallback": False} | ids
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the quick brown fox {n} jumps over the lazy dog" for n in range(200)]),
        model_prefix=str(path), vocab_size=300 if options["byte_fallback"] else 60, model_type=kind, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    path.with_suffix(".vocab").unlink()


def test_t5_model_file_has_the_extra_ids(tmp_path):
    train(tmp_path / "spiece", "unigram")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.pad_id, ours.eos_ids, ours.bos_id) == (0, (1,), None)
    for text in ("the fox", "a <extra_id_0> b <extra_id_99>dog", "  the  lazy "):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def train_llama(folder, **settings):
    extra = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True}
    train(folder / "tokenizer", "bpe", **extra, normalization_rule_name="identity", remove_extra_whitespaces=False)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_llama_model_file(tmp_path):
    train_llama(tmp_path, legacy=False)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (2,)) == (1, (2,))
    for text in ("the fox", "the  lazy\ndog", "x</s>the dog<s> y", "größer"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("legacy", [False, True])
def test_llama_2_is_read_as_its_file_says(tmp_path, legacy):
    """The pipeline of `tokenizer.json`, which Llama 2 and TinyLlama publish in this form, is that of SentencePiece.

    It puts a space before every section between special tokens, also before one that begins with a space.
    `AutoTokenizer` of transformers 5 builds another one from the class's name (huggingface/transformers#45488), and
    differs on just that; transformers 4, vLLM with it, and `PreTrainedTokenizerFast` read the file.
    """
    train_llama(tmp_path, legacy=legacy)
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
    merges = generate_merges(vocabulary, scores)
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    pipeline = tokenizers.Tokenizer(model)
    change = tokenizers.normalizers
    pipeline.normalizer = change.Sequence([change.Prepend("\u2581"), change.Replace(" ", "\u2581")])
    special = ("<unk>", "<s>", "</s>")
    pipeline.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    pipeline.save(str(tmp_path / "tokenizer.json"))
    ours, file = load_tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rebuilt, spaced = transformers.AutoTokenizer.from_pretrained(tmp_path), 0
    for text in ("the fox", " the fox", "the  dog ", "<s>the dog", "a</s> the", "<s> the</s>\nfox", "größer"):
        ids = ours.encode(text)
        assert ids == file(text, add_special_tokens=False)["input_ids"], text
        sections = re.split("(<s>|</s>)", text)
        wanted = [[pieces.piece_to_id(part)] if part in special else pieces.encode(part) for part in sections]
        assert ids == [i for section in wanted for i in section], text
        closely = not legacy and ("<s>t" in text or "</s>\n" in text)
        differs = closely or any(part.startswith(" ") for part in sections)
        spaced += differs
        assert (ids != rebuilt(text, add_special_tokens=False)["input_ids"]) == differs, text
    assert spaced > 2
