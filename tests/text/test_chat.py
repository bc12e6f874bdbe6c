import pytest

from pit_jax.core.errors import DataError
from pit_jax.text.chat import ChatFormat, check_messages, render, render_prompt

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "human", "content": "Bye"},
]


def test_default_format_is_that_of_hh():
    dialogue = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye"
    assert render(MESSAGES, ChatFormat()) == dialogue
    assert render_prompt(MESSAGES, ChatFormat()) == dialogue + "\n\nAssistant:"


def test_prefixes_are_data():
    chat = ChatFormat(user="<u>", assistant="<a>", system="<s>")
    assert render_prompt(MESSAGES, chat) == "<s>Be brief.<u>Hi<a>Hello.<u>Bye<a>"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "prompt must be a list"),
        ([], "prompt must be a list"),
        (["x"], r"prompt\[0\] must be an object"),
        ([{"role": "user"}], r"prompt\[0\]\.content must be a text, not missing"),
        ([{"role": 3, "content": "x"}], r"prompt\[0\]\.role must be a text, not int"),
    ],
)
def test_malformed_messages_are_named(value, message):
    with pytest.raises(DataError, match=message):
        check_messages(value, "prompt")


def test_unknown_role_is_named():
    with pytest.raises(DataError, match="'asistant' must be.*Did you mean 'assistant'"):
        render([{"role": "asistant", "content": "x"}], ChatFormat())
