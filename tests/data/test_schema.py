import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pit_jax.core.errors import DataError
from pit_jax.data.schema import content_hash, default_group, parse
from pit_jax.text.chat import ChatFormat
from pit_jax.text.chat_template import TemplateChat

FIRST = "\n\nHuman: What is a good way to fry an egg?\n\nAssistant:"
MULTI = (
    "\n\nHuman: Can you help me plan a trip?\n\nAssistant: Sure! Where would you like to go?"
    "\n\nHuman: Somewhere warm,\n\nbut not too far.\n\nAssistant:"
)


def hh(prompt, chosen, rejected):
    """Return a row as Anthropic publishes it: two whole dialogues."""
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


@pytest.mark.parametrize("prompt", [FIRST, MULTI])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Use butter and low heat.", "No idea."),
        # Replies that begin alike: the longest common prefix is not the prompt.
        ("You could use butter.", "You could use motor oil."),
        # One reply begins with all of the other.
        ("I would go to Spain.", "I would go to Spain. Or not."),
        ("One.\n\nTwo.", "One.\n\n\nTwo."),
        # A human turn that a model wrote into its reply belongs to the reply.
        ("Spain.", "Spain.\n\nHuman: Thanks!"),
    ],
)
def test_hh_dialogues_are_cut_at_the_last_assistant_turn(prompt, chosen, rejected):
    record = parse(hh(prompt, chosen, rejected))
    assert (record.prompt, record.chosen, record.rejected) == (prompt, chosen, rejected)
    assert record == parse({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def test_the_four_shapes_give_the_same_record():
    turns = [
        {"role": "user", "content": "Can you help me plan a trip?"},
        {"role": "assistant", "content": "Sure! Where would you like to go?"},
        {"role": "user", "content": "Somewhere warm,\n\nbut not too far."},
    ]
    better, worse = ([{"role": "assistant", "content": text}] for text in ("Spain.", "Mars."))
    shapes = [
        {"prompt": MULTI, "chosen": "Spain.", "rejected": "Mars."},
        hh(MULTI, "Spain.", "Mars."),
        {"prompt": turns, "chosen": better, "rejected": worse},
        {"prompt": turns, "chosen": "Spain.", "rejected": "Mars."},
        {"chosen": turns + better, "rejected": turns + worse},
    ]
    assert len({parse(shape) for shape in shapes}) == 1


def test_replies_are_stripped_and_prompts_are_not():
    record = parse({"prompt": " raw \n", "chosen": " better\n", "rejected": "\tworse "})
    assert (record.prompt, record.chosen, record.rejected) == (" raw \n", "better", "worse")


def test_group_is_the_first_human_turn():
    group = default_group(FIRST, ChatFormat())
    assert default_group(FIRST + " Butter.\n\nHuman: More?\n\nAssistant:", ChatFormat()) == group
    assert default_group("\n\nSystem: Be kind." + FIRST, ChatFormat()) == group
    assert default_group(MULTI, ChatFormat()) != group
    assert group == content_hash("What is a good way to fry an egg?")
    assert default_group("no dialogue", ChatFormat()) == content_hash("no dialogue")


def test_given_id_and_group_are_kept_and_defaults_follow_the_content():
    raw = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert (parse(raw | {"id": 7}).id, parse(raw | {"group": "g"}).group) == ("7", "g")
    assert parse(raw).id == parse(raw | {"source": "elsewhere", "id": None}).id
    assert parse(raw).id != parse(raw | {"chosen": "c"}).id


@given(st.lists(st.text(max_size=3), max_size=3), st.lists(st.text(max_size=3), max_size=3))
def test_content_hash_sees_where_texts_part(left, right):
    assert (content_hash(*left) == content_hash(*right)) == (left == right)


MESSAGE = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "p", "chosen": "a", "rejcted": "b"}, "'rejected' is missing. Rename 'rejcted'"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "'chosen' is missing"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "'chosen' must be a text or a list of messages, not int"),
        ({"prompt": {}, "chosen": "a", "rejected": "b"}, "'prompt' must be a text or a list of messages, not dict"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "'rejected' is empty"),
        ({"prompt": "p", "chosen": "\ud83d", "rejected": "b"}, "'chosen' holds half a surrogate pair"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "id": [1]}, "'id' must be a text or an integer, not list"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "group": True}, "'group' must be"),
        ({"chosen": "a", "rejected": "b"}, r"'chosen' is no dialogue: it has no '\\n\\nAssistant:'"),
        ({"chosen": FIRST + " a", "rejected": MULTI + " b"}, "differ before their last assistant turn, at character 9"),
        ({"chosen": FIRST + " a", "rejected": FIRST + " a\n\nHuman: b\n\nAssistant: c"}, "differ before"),
        ({"chosen": FIRST + " a", "rejected": [MESSAGE, MESSAGE]}, "differ before"),
        ({"chosen": FIRST, "rejected": FIRST + " b"}, "'chosen' is empty"),
        ({"chosen": [MESSAGE], "rejected": [MESSAGE]}, "'chosen' must end with an assistant's message after"),
        ({"prompt": [MESSAGE], "chosen": "a", "rejected": "b"}, "'prompt' ends with an assistant's message"),
        ({"prompt": "p", "chosen": [MESSAGE, MESSAGE], "rejected": "b"}, "must be one assistant's message"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, r"prompt\[0\]\.content"),
    ],
)
def test_bad_records_are_named_by_field(raw, message):
    with pytest.raises(DataError, match=message):
        parse(raw)


QWEN = TemplateChat(path=str(pathlib.Path(__file__).parent / "hf_tokenizers" / "qwen"))
GEMMA = TemplateChat(path=str(pathlib.Path(__file__).parent / "hf_tokenizers" / "gemma"))
TURNS = [
    {"role": "user", "content": "Can you help me plan a trip?"},
    {"role": "assistant", "content": "Sure! Where would you like to go?"},
    {"role": "user", "content": "Somewhere warm,\n\nbut not too far."},
]


def test_the_four_shapes_give_the_same_record_under_a_chat_template():
    better, worse = ([{"role": "assistant", "content": text}] for text in ("Spain.", "Mars."))
    shapes = [
        {"prompt": MULTI, "chosen": "Spain.", "rejected": "Mars."},
        hh(MULTI, "Spain.", "Mars."),
        {"prompt": TURNS, "chosen": better, "rejected": worse},
        {"prompt": TURNS, "chosen": "Spain.", "rejected": "Mars."},
        {"chosen": TURNS + better, "rejected": TURNS + worse},
    ]
    assert len({parse(shape, QWEN) for shape in shapes}) == 1
    record = parse(shapes[0], QWEN)
    assert record.prompt == QWEN.prompt(TURNS)
    assert record.prompt.endswith("<|im_start|>user\nSomewhere warm,\n\nbut not too far.")
    assert (record.chosen, record.rejected) == ("Spain.", "Mars.")
    # Which fold a record falls into does not depend on how its prompt is written.
    assert record.group == parse(shapes[0]).group


def test_a_plain_prompt_is_one_users_message_under_a_chat_template():
    record = parse({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, GEMMA)
    assert record.prompt == "<start_of_turn>user\nWhy?"
    assert record.group == content_hash("Why?")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": [*TURNS, TURNS[1]], "chosen": "a", "rejected": "b"}, "'prompt' ends with an assistant's message"),
        ({"prompt": [{"role": "system", "content": "S"}], "chosen": "a", "rejected": "b"}, "must end with a user's"),
        ({"prompt": MULTI + " Sure,", "chosen": "a", "rejected": "b"}, "must end with a user's message"),
        ({"prompt": [{"role": "system", "content": "S"}, TURNS[0]], "chosen": "a", "rejected": "b"}, "System role not"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        (
            {"prompt": [{"role": "user", "content": " "}], "chosen": "a", "rejected": "b"},
            "of the prompt is empty",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{}]}, "field 'tools' is given"),
        ({"prompt": [{"role": "tool", "content": "3"}], "chosen": "a", "rejected": "b"}, r"prompt\[0\] uses tools"),
        (
            {"prompt": "p", "chosen": [{"role": "assistant", "content": "", "tool_calls": [1]}], "rejected": "b"},
            r"chosen\[0\] uses tools \(tool_calls\)",
        ),
    ],
)
def test_records_that_no_chat_template_can_write_are_refused(raw, message):
    with pytest.raises(DataError, match=message):
        parse(raw, GEMMA)
