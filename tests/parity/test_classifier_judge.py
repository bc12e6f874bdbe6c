"""Reward models of transformers as judges, against transformers itself, one text at a time and without padding."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.evaluation.classifier_judge import ClassifierJudge, ClassifierJudgeConfig
from pit_jax.evaluation.pairwise import Question

pytestmark = pytest.mark.parity
WORDS = "why is the sky so blue because light of short waves is scattered more than red and green one ask me again"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = ["why is the sky blue", "ask me", "is red more than green so why is that again and again", "light"] * 3
RESPONSES = ["because light is scattered", "again", "red", "short waves of the light are scattered more than red one"]
RESPONSES += ["blue", "the sky", "", "so so so so so so so so so", "why", "more", "is the light green", "one of me"]


def _deberta_tokenizer(directory: pathlib.Path) -> None:
    """A Unigram model with DeBERTa-v3's own pieces around a text and a pair, made here."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="[UNK]")
    trained.train_from_iterator([WORDS] * 3, trainer)
    marks = [(mark, trained.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, model_max_length=64, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(directory)


def _deberta(directory: pathlib.Path, labels: int) -> str:
    torch.manual_seed(labels)
    _deberta_tokenizer(directory)
    config = transformers.DebertaV2Config(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, type_vocab_size=0, relative_attention=True, position_buckets=8,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        num_labels=labels, pooler_hidden_size=32, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(directory)
    return str(directory)


def _llama(directory: pathlib.Path, *, pad: bool) -> str:
    torch.manual_seed(9)
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    padding = {"pad_token": "<pad>"} if pad else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", model_max_length=128, **padding
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_labels=1, pad_token_id=2 if pad else None, initializer_range=0.3,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("judges")
    return {
        **{f"deberta{labels}": _deberta(root / f"deberta{labels}", labels) for labels in (1, 2, 3)},
        "llama": _llama(root / "llama", pad=True),
        "llama without padding": _llama(root / "llama-bare", pad=False),
    }


def judge(model: str, **fields) -> ClassifierJudge:
    return ClassifierJudge(ClassifierJudgeConfig(model=model, device="cpu", **fields), progress=False)


def reference(model: str):
    return (
        transformers.AutoTokenizer.from_pretrained(model),
        transformers.AutoModelForSequenceClassification.from_pretrained(model).eval(),
    )


def alone(model: str) -> np.ndarray:
    """Return the logits of each (prompt, response), as the card of the Open Assistant's model computes them."""
    tokenizer, network = reference(model)
    with torch.inference_mode():
        return np.array(
            [
                network(**tokenizer(x, y, return_tensors="pt")).logits[0].numpy()
                for x, y in zip(PROMPTS, RESPONSES, strict=True)
            ]
        )


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_deberta_scores_are_those_of_transformers(places, batch_size):
    found = judge(places["deberta1"], batch_size=batch_size).scores(PROMPTS, RESPONSES)
    wanted = alone(places["deberta1"])[:, 0]
    assert np.std(wanted) > 0.01
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_heads_of_several_logits_give_log_odds(places):
    logits = alone(places["deberta2"])
    two = judge(places["deberta2"]).scores(PROMPTS, RESPONSES)
    np.testing.assert_allclose(two, logits[:, 1] - logits[:, 0], atol=1e-4)
    np.testing.assert_allclose(judge(places["deberta2"], label=0).scores(PROMPTS, RESPONSES), -two, atol=1e-4)
    logits = alone(places["deberta3"])
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    three = judge(places["deberta3"], label=2).scores(PROMPTS, RESPONSES)
    np.testing.assert_allclose(1 / (1 + np.exp(-three)), probability[:, 2], atol=1e-5)
    with pytest.raises(ConfigError, match="LABEL_2"):
        judge(places["deberta3"])
    with pytest.raises(ConfigError, match="be a class of the model"):
        judge(places["deberta1"], label=1)


@pytest.mark.parametrize("name", ["llama", "llama without padding"])
def test_chat_models_are_read_by_their_template(places, name):
    tokenizer, network = reference(places[name])
    wanted = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
        assert int((ids == tokenizer.bos_token_id).sum()) == 1
        with torch.inference_mode():
            wanted.append(network(ids).logits[0, 0].item())
    found = judge(places[name], form="chat", batch_size=5).scores(PROMPTS, RESPONSES)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_dialogues_are_given_to_chat_models_turn_by_turn(places):
    tokenizer, network = reference(places["llama"])
    turns = [("user", "ask me"), ("assistant", "why"), ("user", "again"), ("assistant", "blue")]
    ids = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], return_dict=True, return_tensors="pt"
    )["input_ids"]
    dialogue = "\n\nHuman: ask me\n\nAssistant: why\n\nHuman: again\n\nAssistant:"
    found = judge(places["llama"], form="chat").scores([dialogue], ["blue"])
    with torch.inference_mode():
        np.testing.assert_allclose(found, network(ids).logits[0].numpy(), atol=1e-4)


def test_texts_are_read_as_one(places):
    tokenizer, network = reference(places["deberta1"])
    found = judge(places["deberta1"], form="text").scores(["why is "], ["the sky"])
    with torch.inference_mode():
        wanted = network(**tokenizer("why is the sky", return_tensors="pt")).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_long_prompts_lose_their_beginning_and_are_counted(places, caplog):
    caplog.set_level(logging.WARNING)
    tokenizer, network = reference(places["deberta1"])
    scorer = judge(places["deberta1"], max_length=24)
    prompt, response = WORDS, "the sky is blue"
    found = scorer.scores([prompt, "light"], [response, response])
    assert scorer.truncated == 1 and "1 of 2 texts have more than 24 tokens" in caplog.text
    x, y = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [cls, *x[-(24 - 3 - len(y)) :], sep, *y, sep]
    with torch.inference_mode():
        wanted = network(torch.tensor([ids])).logits[0, 0].item()
    assert len(ids) == 24 and found[0] == pytest.approx(wanted, abs=1e-4)
    assert found[1] == pytest.approx(judge(places["deberta1"]).scores(["light"], [response])[0], abs=1e-4)
    scorer.scores(["light"], [WORDS])
    assert scorer.truncated == 2


def test_long_chats_keep_their_end(places):
    scorer = judge(places["llama"], form="chat", max_length=20)
    tokenizer, network = reference(places["llama"])
    chat = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "blue"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    with torch.inference_mode():
        wanted = network(torch.tensor([[ids[0], *ids[-19:]]])).logits[0, 0].item()
    assert scorer.scores([WORDS], ["blue"])[0] == pytest.approx(wanted, abs=1e-4) and scorer.truncated == 1


def test_the_default_length_is_the_models(places, caplog):
    caplog.set_level(logging.WARNING)
    scorer = judge(places["deberta1"])
    scorer.scores([WORDS * 3], ["blue"])
    assert scorer.truncated == 1 and "more than 64 tokens" in caplog.text


def test_verdicts_and_the_tie_rule(places, tmp_path):
    config = ClassifierJudgeConfig(model=places["deberta1"], device="cpu", name="third party")
    questions = [Question(x, y, RESPONSES[0]) for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    found = config.build(tmp_path, progress=False)
    outcomes = [v.outcome for v in found.verdicts(questions)]
    scores = judge(places["deberta1"]).scores(PROMPTS * 2, RESPONSES + [RESPONSES[0]] * 12).reshape(2, 12)
    difference = np.where([y == RESPONSES[0] for y in RESPONSES], 0, scores[0] - scores[1])
    # Whether the first response is the best, the worst or neither is up to the random weights.
    assert outcomes == np.sign(difference).tolist() and {0.0} < set(outcomes)
    margin = float(np.median(np.abs(difference)))
    tied = dataclasses.replace(config, margin=margin).build(tmp_path, progress=False)
    expected = np.where(np.abs(difference) > margin, np.sign(difference), 0)
    assert [v.outcome for v in tied.verdicts(questions)] == expected.tolist() and 0 < np.abs(expected).sum() < 12
    assert tied.name == "third party"


def test_a_model_without_a_trained_head_is_refused(places, tmp_path):
    transformers.DebertaV2Model.from_pretrained(places["deberta1"]).save_pretrained(tmp_path)
    _deberta_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no trained weights for classifier\.bias"):
        judge(str(tmp_path))


def test_missing_models_and_wrong_settings_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        judge(str(tmp_path / "nowhere"))
    for fields in ({"form": "dialogue"}, {"dtype": "int8"}, {"margin": -1.0}, {"batch_size": 0}, {"max_length": 0}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            ClassifierJudgeConfig(**fields)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, places, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs {missing}.*pit_jax\[judge\]"):
        judge(places["deberta1"])


def test_bfloat16_is_close(places):
    exact = judge(places["deberta1"]).scores(PROMPTS, RESPONSES)
    rough = judge(places["deberta1"], dtype="bfloat16").scores(PROMPTS, RESPONSES)
    assert 0 < np.abs(rough - exact).max() < 0.2 * np.abs(exact).max()
