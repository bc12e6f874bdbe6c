"""Requests of OpenAI's API, read and checked: chat completions and completions, with `pit` as the one extension."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pit_jax.core.errors import DataError
from pit_jax.decode.batches import Response
from pit_jax.improve.accept import RULES, Improve
from pit_jax.serving.asked import Asked, Prompt, Refusal
from pit_jax.serving.fields import Fields, as_text, bad
from pit_jax.serving.settings import Serving
from pit_jax.text.chat import Chat, Message, check_conversation, check_messages
from pit_jax.text.codec import Codec

POLICY = "/policy"
"""What follows a model's name where the policy's own answers are asked for."""
MOST_STOPS = 4
_HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Abilities(NamedTuple):
    """What the served run can do."""

    codec: Codec
    chat: Chat
    name: str
    has_gap: bool
    has_policy: bool

    def models(self) -> list[str]:
        """Return the names that requests can ask for."""
        return [self.name, self.name + POLICY] if self.has_policy else [self.name]


class Reader:
    """Reads requests for one run.

    Args:
      able: what the run can do.
      serving: defaults and limits.
    """

    def __init__(self, able: Abilities, serving: Serving) -> None:
        self._able, self._serving, self._limits = able, serving, serving.limits

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], *, chat: bool) -> Asked:
        """Return what a request asks for.

        Args:
          body: the JSON object.
          headers: of the request, in lower case; `x-pit-iterations`, `x-pit-candidates` and `x-pit-accept` say what
            the body's `pit` does not.
          chat: whether it is a chat completion.

        Raises:
          Refusal: a field is wrong, or more is asked than the limits allow.
        """
        fields = Fields(body)
        for name in _HARMLESS:
            fields.take(name)
        for name, values in _NEUTRAL.items():
            fields.neutral(name, values)
        model = self._model(fields)
        pit = fields.group("pit")
        improve = self._improve(pit, headers, model)
        reference = _first(pit.text("reference"), fields.text("pit_reference"))
        pit.end()
        prompts = self._chat_prompt(fields, reference) if chat else self._text_prompts(fields, reference)
        n = fields.integer("n", 1, 1, self._limits.choices)
        if n * len(prompts) > self._limits.choices:
            raise bad("n", n, f"give at most {self._limits.choices} answers for all prompts of a request")
        if improve is not None and n * len(prompts) * improve.candidates > self._limits.rows:
            rule = f"give at most {self._limits.rows} proposals for all answers of a request"
            raise bad("pit.candidates", improve.candidates, rule)
        most = self._able.codec.lengths.targets
        limit = fields.integer("max_tokens", self._serving.max_tokens or most, 1, 2**31)
        limit = fields.integer("max_completion_tokens", limit, 1, 2**31)
        stream = fields.flag("stream")
        options = fields.group("stream_options")
        usage = options.flag("include_usage")
        options.flag("include_obfuscation")
        options.end()
        asked = Asked(
            chat=chat,
            model=model,
            prompts=prompts,
            n=n,
            improve=improve,
            temperature=fields.number("temperature", self._serving.temperature, 0.0, 2.0),
            top_p=_top_p(fields),
            limit=min(limit, most),
            stops=_stops(fields),
            seed=_seed(fields),
            stream=stream,
            usage=usage,
        )
        fields.end()
        self._check_drafts(asked)
        return asked

    def _model(self, fields: Fields) -> str:
        model, known = fields.text("model"), self._able.models()
        if model is None:
            raise Refusal(400, f"model is missing. Name one of {known}.", param="model", code="invalid_value")
        if model not in known:
            message = f"The model {model!r} does not exist. Name one of {known}."
            raise Refusal(404, message, param="model", code="model_not_found")
        return model

    def _improve(self, pit: Fields, headers: Mapping[str, str], model: str) -> Improve | None:
        """Return how answers are improved, None for not at all."""
        serving, limits, able = self._serving, self._limits, self._able
        said = Fields(_from_headers(headers), "x-pit-")
        iterations = said.integer("iterations", serving.iterations, 0, limits.iterations)
        iterations = pit.integer("iterations", iterations, 0, limits.iterations)
        candidates = said.integer("candidates", serving.candidates, 1, limits.candidates)
        candidates = pit.integer("candidates", candidates, 1, limits.candidates)
        by_header, by_body = said.choice("accept", RULES), pit.choice("accept", RULES)
        accept = by_body or by_header or serving.accept or ("gap" if able.has_gap else "always")
        margin = pit.number("margin", 0.0, 0.0, 1e9)
        if model.endswith(POLICY) and model != able.name:
            return None
        if iterations == 0:
            return None
        rule: Literal["gap", "always"] = "gap" if accept == "gap" else "always"
        improve = Improve(iterations=iterations, candidates=candidates, accept=rule, margin=margin)
        if improve.needs_gap and not able.has_gap:
            message = "The run has no gap model: pit.accept must be always, and pit.candidates must be 1."
            raise Refusal(400, message, param="pit", code="invalid_value")
        return improve

    def _chat_prompt(self, fields: Fields, reference: str | None) -> tuple[Prompt, ...]:
        given = fields.take("messages")
        try:
            messages: list[Message] = list(check_messages(_plain(given), "messages"))
            for n, message in enumerate(messages):
                as_text(message["content"], f"messages[{n}].content")
            if messages[-1]["role"] == "assistant":
                if reference is not None:
                    message = "The draft is given twice, as last message and as reference. Leave one of them out."
                    raise Refusal(400, message, param="messages", code="invalid_value")
                reference = messages.pop()["content"]
            text = self._able.chat.prompt(check_conversation(messages))
        except DataError as error:
            raise Refusal(400, str(error), param="messages", code="invalid_value") from None
        return (self._prompt(text, reference, "messages"),)

    def _text_prompts(self, fields: Fields, reference: str | None) -> tuple[Prompt, ...]:
        texts = fields.texts("prompt", self._limits.choices)
        if not texts:
            raise Refusal(400, "prompt is missing. Give a text.", param="prompt", code="invalid_value")
        if reference is not None and len(texts) > 1:
            raise bad("pit_reference", reference, "come with one prompt, not with several")
        try:
            return tuple(self._prompt(self._able.chat.text_prompt(text), reference, "prompt") for text in texts)
        except DataError as error:
            raise Refusal(400, str(error), param="prompt", code="invalid_value") from None

    def _prompt(self, text: str, reference: str | None, param: str) -> Prompt:
        codec = self._able.codec
        ids = tuple(codec.tokenizer.encode(text))
        most = self._limits.prompt or codec.prompt_room
        if len(ids) > most:
            message = f"The prompt has {len(ids)} tokens, and this server reads at most {most}. Shorten it."
            raise Refusal(400, message, param=param, code="context_length_exceeded")
        if not ids:
            raise Refusal(400, f"{param} has no token. Write something.", param=param, code="invalid_value")
        ids = ids if len(ids) <= codec.prompt_room else codec.prompt_ids(text)
        if reference is None:
            return Prompt(ids=ids)
        try:
            draft = Response(codec.without_eos(codec.response_ids(reference)), True)
        except DataError as error:
            raise Refusal(400, str(error), param=param, code="context_length_exceeded") from None
        return Prompt(ids=ids, draft=draft, draft_text=reference)

    def _check_drafts(self, asked: Asked) -> None:
        drafts = [prompt.draft for prompt in asked.prompts]
        if not self._able.has_policy and None in drafts:
            message = "The run has no policy that could write a draft. Give one as last assistant message."
            raise Refusal(400, message, param="pit_reference", code="invalid_value")
        if asked.improve is None and drafts != [None] * len(drafts):
            message = "A draft is given, but nothing is to improve it: pit.iterations is 0, or the policy is asked."
            raise Refusal(400, message, param="pit_reference", code="invalid_value")


def _plain(messages: object) -> object:
    """Return messages with OpenAI's other ways of writing a text and a system's role made plain."""
    if not isinstance(messages, list):
        return messages
    return [_plain_message(message) if isinstance(message, dict) else message for message in messages]


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DataError("messages: a part of a message is no text. This server reads texts only.")
        content = "".join(as_text(part.get("text"), "messages") for part in content)
    role = "system" if message.get("role") == "developer" else message.get("role")
    return message | {"role": role, "content": content}


def _from_headers(headers: Mapping[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name in ("iterations", "candidates", "accept"):
        value = headers.get(f"x-pit-{name}")
        if value is not None:
            is_number = value.isascii() and value.isdigit() and len(value) < 10
            said[name] = int(value) if is_number else value
    return said


def _top_p(fields: Fields) -> float:
    value = fields.number("top_p", 1.0, 0.0, 1.0)
    if value == 0.0:
        raise bad("top_p", value, "be above 0 and at most 1")
    return value


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.texts("stop", MOST_STOPS)
    if "" in stops:
        raise bad("stop", "", "not be empty")
    return stops


def _seed(fields: Fields) -> int:
    """Return the seed; of larger numbers the last 31 bits count, and of negative ones those of their complement."""
    return fields.integer("seed", secrets.randbits(31), -(2**63), 2**63 - 1) & 0x7FFFFFFF


def _first(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)
