"""The official openai client talks to the server, and gets what `pit-jax improve` writes."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pit_jax.serving.loaded import Models
from pit_jax.stages.improve import Request, improve_file

from .hosting import Host, hosted

PROMPTS = ["goal from oak", "goal from mill by blue"]


@pytest.fixture(scope="module")
def host(models: Models) -> Iterator[Host]:
    with hosted(models) as host:
        yield host


@pytest.fixture
def api(host: Host) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{host.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def _improved(run_dir: pathlib.Path, tmp_path: pathlib.Path, rows: list[dict], **changes: Any) -> list[dict[str, Any]]:
    source, output = tmp_path / "drafts.jsonl", tmp_path / "improved.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    improve_file(Request(checkpoint=str(run_dir), input=str(source), output=str(output), **changes))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_models_are_listed(api: Any) -> None:
    assert [model.id for model in api.models.list()] == ["nano", "nano/policy"]
    assert api.models.retrieve("nano/policy").id == "nano/policy"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.models.retrieve("other")


def test_answers_are_those_of_improve(api: Any, run_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pit = {"iterations": 3, "candidates": 2}
    reply = api.completions.create(model="nano", prompt=PROMPTS, seed=3, extra_body={"pit": pit})
    wanted = _improved(run_dir, tmp_path, [{"prompt": prompt} for prompt in PROMPTS], seed=3, **pit)
    for choice, row in zip(reply.choices, wanted, strict=True):
        how = choice.model_extra["pit"]
        assert (choice.text, how["original"], how["changed"]) == (row["improved"], row["response"], row["changed"])
        assert len(how["steps"]) == len(row["steps"])
        for step, other in zip(how["steps"], row["steps"], strict=True):
            assert (step["proposal"], step["accepted"]) == (other["proposal"], other["accepted"])
            assert [step["gap"], step["zero"]] == pytest.approx([other["gap"], other["zero"]], abs=1e-5)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_given_draft_is_improved(api: Any, run_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prompt, draft = "\n\nHuman: goal from oak\n\nAssistant:", "inn via tower"
    [wanted] = _improved(run_dir, tmp_path, [{"prompt": prompt, "response": draft}], seed=5, accept="always")
    messages = [{"role": "user", "content": "goal from oak"}, {"role": "assistant", "content": draft}]
    headers = {"x-pit-accept": "always"}
    by_chat = api.chat.completions.create(model="nano", messages=messages, seed=5, extra_headers=headers)
    body = {"pit_reference": draft, "pit": {"accept": "always"}}
    by_field = api.completions.create(model="nano", prompt=prompt, seed=5, extra_body=body)
    assert by_chat.choices[0].message.content == by_field.choices[0].text == wanted["improved"]
    assert by_chat.choices[0].model_extra["pit"]["original"] == draft


@pytest.mark.parametrize("accept", ["gap", "always"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_says_what_the_whole_reply_says(api: Any, accept: str, chat: bool) -> None:
    create = api.chat.completions.create if chat else api.completions.create
    asked = {"messages": [{"role": "user", "content": "goal"}]} if chat else {"prompt": "goal"}
    asked |= {"model": "nano", "n": 2, "seed": 7, "extra_body": {"pit": {"iterations": 2, "accept": accept}}}
    whole = create(**asked)
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    texts, ends = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += (choice.delta.content if chat else choice.text) or ""
        ends[choice.index] = choice.finish_reason
        if choice.finish_reason is not None:
            assert choice.model_extra["pit"] == whole.choices[choice.index].model_extra["pit"]
    assert texts == [choice.message.content if chat else choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len({chunk.id for chunk in chunks}) == 1
    pieces = [chunk for chunk in chunks[:-1] if chunk.choices[0].finish_reason is None]
    # Where the rule decides about the whole answer, it comes in one piece; else as it is written.
    assert len(pieces) == 2 if accept == "gap" else len(pieces) > 2


def test_the_policy_alone_streams_and_keeps_to_its_limits(api: Any) -> None:
    asked = {"model": "nano/policy", "messages": [{"role": "user", "content": "goal"}], "seed": 9}
    whole = api.chat.completions.create(**asked).choices[0]
    assert whole.model_extra["pit"]["steps"] == [] and not whole.model_extra["pit"]["changed"]
    text = whole.message.content
    cut = api.chat.completions.create(**asked, max_tokens=5)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)
    assert text.startswith(cut.choices[0].message.content.rstrip("\ufffd"))
    mark = text[10:12]
    stopped = api.chat.completions.create(**asked, stop=["never there", mark])
    assert stopped.choices[0].message.content == text[: text.index(mark)]
    assert stopped.choices[0].finish_reason == "stop"
    pieces = [c.choices[0].delta.content or "" for c in api.chat.completions.create(**asked, stop=mark, stream=True)]
    assert "".join(pieces) == text[: text.index(mark)]


def test_temperature_and_top_p_belong_to_the_request(host: Host) -> None:
    async def ask(api: Any, **settings: Any) -> str:
        asked = {"model": "nano/policy", "messages": [{"role": "user", "content": "goal"}], "max_tokens": 12}
        return (await api.chat.completions.create(**asked, **settings)).choices[0].message.content

    async def together() -> list[str]:
        settings = [{"temperature": 0.0, "seed": 1}, {"temperature": 0.0, "seed": 2}, {"top_p": 1e-6}, {"seed": 3}]
        async with openai.AsyncOpenAI(base_url=f"{host.url}/v1", api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(ask(api, **one) for one in settings))

    greedy, again, nucleus, drawn = asyncio.run(together())
    assert greedy == again == nucleus != drawn


def test_errors_are_those_the_client_knows(api: Any) -> None:
    ask = {"messages": [{"role": "user", "content": "goal"}]}
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist") as caught:
        api.chat.completions.create(model="gpt-4", **ask)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        api.chat.completions.create(model="nano", tools=[{"type": "function", "function": {"name": "f"}}], **ask)
