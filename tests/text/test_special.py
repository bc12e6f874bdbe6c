import json
import logging

import pytest

from pit_jax.core.errors import DataError
from pit_jax.text.special import Facts, ModelDefaults, SpecialTokens, kept_files

TOKENS = {"<s>": 1, "</s>": 2, "<pad>": 0, "<end>": 9, "<more>": 10}


class Words:
    """A vocabulary in which all ids but those of TOKENS are text."""

    def token_id(self, token):
        return TOKENS.get(token)

    def is_text(self, token_id):
        return token_id not in TOKENS.values()


def facts(**files):
    return Facts({f"{name}.json": json.dumps(content).encode() for name, content in files.items()}, "here")


def decide(given, *, close=None, opens=False, **defaults):
    return given.decide(Words(), ModelDefaults(**defaults), close=close, opens_with_bos=opens)


def test_eos_is_the_union_and_its_first_what_the_most_telling_file_says():
    files = {
        "tokenizer_config": {"eos_token": {"content": "</s>"}},
        "special_tokens_map": {"eos_token": "<more>"},
        "generation_config": {"eos_token_id": [9, 2]},
        "config": {"eos_token_id": 2, "text_config": {"eos_token_id": [1]}},
    }
    assert decide(facts(**files)).eos_ids == (2, 10, 9, 1)
    assert decide(facts(**files), close=9).eos_ids == (9, 2, 10, 1)
    del files["tokenizer_config"], files["special_tokens_map"]
    assert decide(facts(**files)).eos_ids == (9, 2, 1)
    assert decide(facts(), eos_id=5).eos_ids == (5,)


def test_ids_left_over_from_another_vocabulary_are_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        found = decide(facts(tokenizer_config={"eos_token": "</s>"}, config={"eos_token_id": 77, "pad_token_id": -1}))
    assert found == SpecialTokens(bos_id=None, pad_id=2, eos_ids=(2,))
    assert "eos_token_id = 77 of config.json is no special token" in caplog.text


def test_bos_is_what_the_tokenizer_says_and_null_says_none():
    config = {"eos_token": "</s>"}
    assert decide(facts(tokenizer_config=config | {"bos_token": "<s>"})).bos_id == 1
    assert decide(facts(tokenizer_config=config | {"bos_token": None}, config={"bos_token_id": 1})).bos_id is None
    assert decide(facts(tokenizer_config=config, special_tokens_map={"bos_token": "<s>"})).bos_id == 1
    assert decide(facts(tokenizer_config=config, config={"bos_token_id": 1})).bos_id is None
    assert decide(facts(tokenizer_config=config), bos_id=10).bos_id == 10
    assert decide(facts(config={"bos_token_id": 1, "eos_token_id": 2})).bos_id == 1
    silent = facts(tokenizer_config=config | {"bos_token": "<s>", "add_bos_token": False})
    assert decide(silent).bos_id is None
    assert decide(silent, opens=True).bos_id == 1


def test_padding_is_the_named_token_then_an_id_then_an_eos():
    config = {"eos_token": "</s>"}
    assert decide(facts(tokenizer_config=config | {"pad_token": "<pad>"}, config={"pad_token_id": 9})).pad_id == 0
    assert decide(facts(tokenizer_config=config, config={"pad_token_id": 9})).pad_id == 9
    assert decide(facts(tokenizer_config=config), pad_id=4).pad_id == 4
    assert decide(facts(tokenizer_config=config)).pad_id == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file names a token that ends a response"),
        ({"tokenizer_config": {"eos_token": "<none>"}}, "eos_token = '<none>' must be a token of the vocabulary"),
        ({"config": {"eos_token_id": "x"}}, "eos_token_id of config.json is 'x', but must be an id or a list"),
    ],
)
def test_files_that_cannot_be_used_are_named(files, message):
    with pytest.raises(DataError, match=message):
        decide(facts(**files))


def test_kept_files_say_what_the_models_config_said():
    special = SpecialTokens(bos_id=1, pad_id=0, eos_ids=(2, 9))
    files = {"config.json": b'{"eos_token_id": [2, 9]}', "generation_config.json": b'{"top_k": 5}', "x": b"kept"}
    kept = kept_files(files, special)
    assert kept.keys() == {"x", "generation_config.json"}
    said = {"top_k": 5, "bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0}
    assert json.loads(kept["generation_config.json"]) == said
