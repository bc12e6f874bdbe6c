import dataclasses
import json

import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.io.serialize import from_json, to_json
from pit_jax.text.chat import ChatFormat
from pit_jax.text.chat_template import (
    IMPROVE,
    ChatTemplate,
    TemplateChat,
    chat_templates,
    find_chat_template,
    load_chat_template,
)
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import load_tokenizer

from .hf_directories import CHAT, HERE, changed

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "gpt", "content": "Hello!"},
    {"role": "human", "content": "Which {dog}?"},
]
BOS = (("bos_token", "<s>"), ("eos_token", "</s>"))
# In the manner of Qwen 3: a whole last turn has an empty thinking block, which the question for an answer has not.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# In the manner of DeepSeek R1: the question opens a thinking block, which an answer in a conversation has not.
REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content }}<E>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# In the manner of Llama 2: BOS before every user's turn.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", CHAT)
def test_prompt_and_cue_are_the_rendered_conversation_without_bos(name):
    template = load_chat_template(HERE / name)
    bos = dict(template.tokens)["bos_token"] if template.opens_with_bos else ""
    for talk in (TALK, TALK[:1]):
        assert bos + template.prompt(talk) + template.cue == template.render(talk, ask=True)
        answered = template.render([*talk, {"role": "assistant", "content": "Ciao."}])
        # The space that Mistral writes before an answer is what its tokenizer puts there.
        assert answered.replace("[/INST] ", "[/INST]").endswith(template.cue + "Ciao." + template.close)
    assert template.prompt(TALK).endswith("Which {dog}?")


def test_parts_of_templates_in_the_manner_of_released_models():
    thinking = ChatTemplate(THINKING)
    assert (thinking.cue, thinking.close) == ("<|end|><|assistant|><think>\n\n</think>\n\n", "<|end|>")
    assert thinking.prompt(TALK) == "<|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Which {dog}?"
    reasoning = ChatTemplate(REASONING, BOS)
    assert (reasoning.cue, reasoning.close, reasoning.opens_with_bos) == ("<A>", "<E>", True)
    assert reasoning.prompt(TALK) == "<U>Hi<A>Hello!<E><U>Which {dog}?"
    old = ChatTemplate(LLAMA2, BOS)
    assert (old.cue, old.close) == (" [/INST]", " </s>")
    assert old.prompt(TALK) == "[INST] Hi [/INST] Hello! </s><s>[INST] Which {dog}?"
    no_question = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}")
    assert (no_question.cue, no_question.close) == ("</><assistant>", "</>")


def test_templates_of_a_chat_model_put_the_reference_into_the_users_turn():
    tokenizer = load_tokenizer(HERE / "gemma")
    codec = Codec(tokenizer, chat_templates(HERE / "gemma"), Lengths(inputs=80, targets=20))
    prompt = codec.prompt_ids(tokenizer.chat_template.prompt(TALK[:1]))
    row = codec.improver_prompt(prompt, codec.response_ids("the fox"))
    text = "<start_of_turn>user\nHi" + IMPROVE.format(reference="the fox") + "<end_of_turn>\n<start_of_turn>model\n"
    assert row.ids[0] == tokenizer.bos_id
    assert list(row.ids[1:]).count(tokenizer.bos_id) == 0
    assert tokenizer.decode(row.ids) == tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.decode(row.ids[slice(*row.reference)]) == "the fox"
    assert codec.gap_prompt(prompt, codec.response_ids("the fox")) == row
    # The marks of turns are tokens, not text.
    assert row.ids.count(tokenizer.token_id("<start_of_turn>")) == 2


def test_braces_of_a_template_are_text(tmp_path):
    path = tmp_path / "braces.jinja"
    path.write_text("{% for m in messages %}{{ '{' + m.role + '}' + m.content + '{{end}}' }}{% endfor %}")
    templates = chat_templates(path, improver=" better than {reference}", gap="{reference}")
    assert templates.bos is False
    assert templates.policy == "{prompt}{{{{end}}}}{{assistant}}"
    assert [piece[0] for piece in templates.pieces("improver")] == [
        "prompt", " better than ", "reference", "{{end}}{assistant}"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"Templates.improver .* contain {reference}"):
        chat_templates(path, improver="again")


def test_a_bos_in_the_middle_of_a_conversation_is_allowed_and_two_at_its_start_are_not(tmp_path):
    folder = changed("mistral", tmp_path, chat_template=LLAMA2)
    tokenizer = load_tokenizer(folder)
    codec = Codec(tokenizer, chat_templates(folder), Lengths(inputs=60, targets=10))
    ids = codec.prompt_ids(tokenizer.chat_template.prompt(TALK))
    assert codec.policy_prompt(ids).ids.count(tokenizer.bos_id) == 2
    assert codec.policy_prompt(ids).ids[0] == tokenizer.bos_id
    with pytest.raises(DataError, match="2 times"):
        codec.policy_prompt((tokenizer.bos_id, *ids))
    # A cut that falls before a BOS does not leave two of them.
    room = len(ids) - ids.index(tokenizer.bos_id)
    short = Codec(tokenizer, codec.templates, Lengths(inputs=room + 60 - codec.prompt_room, targets=10))
    assert short.prompt_ids(tokenizer.chat_template.prompt(TALK)) == ids[-room + 1 :]
    assert short.policy_prompt(ids).ids.count(tokenizer.bos_id) == 1


def test_the_date_does_not_change_from_day_to_day():
    template = load_chat_template(HERE / "llama3")
    assert "Today Date: 26 Jul 2024" in template.prompt(TALK)
    other = load_chat_template(HERE / "llama3", date="2031-02-03")
    assert "Today Date: 03 Feb 2031" in other.prompt(TALK)
    assert other.fingerprint() != template.fingerprint()
    with pytest.raises(ConfigError, match="date = 'soon' must be written YYYY-MM-DD"):
        load_chat_template(HERE / "llama3", date="soon")
    assert "Today Date: " in load_chat_template(HERE / "llama3", date=None).prompt(TALK)


def test_the_file_wins_over_the_configuration_and_default_over_other_names(tmp_path):
    assert load_chat_template(HERE / "qwen").source.startswith("{%- if messages[0]")
    folder = changed("qwen", tmp_path)
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    assert load_chat_template(folder).render(TALK) == "<|endoftext|>"
    assert load_chat_template(folder / "chat_template.jinja").render(TALK) == "<|endoftext|>"
    named = {"chat_template": [{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}]}
    several = {"chat_template": {"tools": "y", "default": "z"}}
    assert find_chat_template({"tokenizer_config.json": json.dumps(several).encode()}, "here").source == "z"
    with pytest.raises(DataError, match=r"names \['rag', 'tools'\], but none of them 'default'"):
        find_chat_template({"tokenizer_config.json": json.dumps(named).encode()}, "here")


def wrong(source, message, **tokens):
    with pytest.raises(DataError, match=message):
        _ = ChatTemplate(source, tuple(tokens.items()), "here").cue


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "here: line 2 of the chat template is no Jinja"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "nothing to train"),
        ("{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}", "must write the user's words once"),
        ("{% for m in messages %}{{ m.role }}{{ m.content * 2 }}{% endfor %}", "must write the user's words once"),
        ("{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}", "the same around every answer"),
        ("{% for m in messages %}{{ m.content }}{{ '?' if add_generation_prompt else '!' }}{% endfor %}", "asks for"),
        ("{{ raise_exception('I do not want to.') }}", "refuses a conversation: I do not want to."),
        ("{{ messages.append(1) }}", "refuses a conversation: .*list.* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refuses a conversation"),
        ("{{ 1 / 0 }}", "refuses a conversation: division by zero"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_say_why(source, message):
    wrong(source, message)


def test_bos_twice_is_refused():
    wrong("{{ bos_token }}{{ bos_token }}" + THINKING, "begins with '<s>' twice", bos_token="<s>")


def test_a_tokenizer_is_good_without_its_template_but_a_broken_one_is_an_error(tmp_path, caplog):
    useless = load_tokenizer(changed("gemma", tmp_path / "useless", chat_template="{{ messages | length }}"))
    assert "the chat template is left aside" in caplog.text
    assert useless.eos_ids == (1, 5)
    with pytest.raises(DataError, match="must write the user's words once"):
        chat_templates(tmp_path / "useless")
    with pytest.raises(DataError, match="line 1 of the chat template is no Jinja"):
        load_tokenizer(changed("gemma", tmp_path / "broken", chat_template="{% if %}"))
    plain = changed("gemma", tmp_path / "plain", without=("chat_template",))
    for path, message in ((plain, "has no chat template"), (tmp_path / "no.jinja", "there is no such chat template")):
        with pytest.raises(DataError, match=message):
            chat_templates(path)


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (TALK[:2], r"must end with a user's message, but its roles are \['user', 'assistant'\]"),
        ([], "must end with a user's message"),
        ([{"role": "user", "content": " \n"}], "last user's message of the prompt is empty"),
        ([{"role": "system", "content": "S"}, TALK[0]], "System role not supported"),
        ([TALK[0], TALK[0]], "roles must alternate"),
    ],
)
def test_conversations_that_cannot_be_answered_are_refused(talk, message):
    with pytest.raises(DataError, match=message):
        load_chat_template(HERE / "gemma").prompt(talk)


def test_the_setting_is_data_and_reads_texts_dialogues_and_messages_alike():
    chat = TemplateChat(path=str(HERE / "qwen"))
    assert from_json(to_json(chat)) == chat
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Which {dog}?\n\nAssistant:"
    assert chat.text_prompt(dialogue) == chat.text_prompt(dialogue.lstrip()) == chat.prompt(TALK)
    assert chat.text_prompt("Human rights?") == chat.prompt([{"role": "user", "content": "Human rights?"}])
    assert chat.fingerprint() == load_chat_template(HERE / "qwen").fingerprint()
    assert TemplateChat(path=str(HERE / "gemma")).fingerprint() != chat.fingerprint()


def test_dialogues_in_text_are_taken_apart_at_their_marks():
    form = ChatFormat()
    text = "\n\nSystem: Be brief.\n\nHuman: a\n\nb Human: c\n\nAssistant: d\n\nHuman: e"
    assert [tuple(message.values()) for message in form.messages(text)] == [
        ("system", "Be brief."), ("user", "a\n\nb Human: c"), ("assistant", "d"), ("user", "e")
    ]  # fmt: skip
    assert form.messages(text + "\n\nAssistant:") == form.messages(text)
    assert form.messages("What do humans do?\n\nHuman: x\n\nAssistant:") is None
    with pytest.raises(DataError, match="must end with a user's message"):
        TemplateChat(path=str(HERE / "qwen")).text_prompt(text + "\n\nAssistant: Sure,")


def test_templates_that_do_not_go_on_where_prompts_end_are_refused():
    chat = TemplateChat(path=str(HERE / "gemma"))
    right = chat_templates(HERE / "gemma")
    chat.check(right)
    for wrong_ones in (Templates(), dataclasses.replace(right, bos=False), chat_templates(HERE / "llama3")):
        with pytest.raises(ConfigError, match=r"Experiment.templates = .* must end with .*end_of_turn.*bos = True"):
            chat.check(wrong_ones)


def test_a_file_that_writes_special_tokens_stands_beside_those_that_name_them(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(LLAMA2)
    with pytest.raises(DataError, match="writes bos_token, but no tokenizer_config.json beside it"):
        load_chat_template(path)
    changed("mistral", tmp_path)
    assert load_chat_template(path).opens_with_bos
