"""One request to a chat endpoint, and what its answer or its failure means for the next one."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import json
import re
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import httpx2

from pit_jax.evaluation.endpoint_config import EndpointConfig, Tokens

TRY_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 that pass by themselves."""
STOP = (401, 402, 404)
"""Statuses that every further request would meet as well."""
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""OpenAI's codes of a 429 that waiting does not cure."""
HINTS = {
    401: "check the key in the variable that key_env names",
    402: "the account has no credit",
    403: "the server does not allow this request with this key",
    404: "check base_url (up to and including /v1) and model",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of a question: a text, or why there is none.

    text: the model's words; empty where it gave none.
    failure: why there is no reply, empty if there is one. status: HTTP status of a failure, if it had one.
    finish: why the model stopped: "stop", "length" (cut at max_tokens), "content_filter", ...
    model: the model that the server says it was.
    tokens: read and written. known: taken from the cache, so nothing was paid.
    """

    text: str = ""
    failure: str = ""
    status: int | None = None
    finish: str = ""
    model: str = ""
    tokens: Tokens = Tokens(0, 0)
    known: bool = False

    @property
    def ok(self) -> bool:
        """Whether there is a reply."""
        return not self.failure


class Problem(NamedTuple):
    """Why a try failed.

    again: another try may help. wait: seconds the server asks to wait. everyone: every other request fails like this.
    paid: the server may have done the work all the same.
    """

    reason: str
    status: int | None = None
    again: bool = True
    wait: float | None = None
    everyone: bool = False
    paid: bool = False


class _Key(httpx2.Auth):
    """Puts the key into the header and nowhere else: not into the client's own headers, which are printed."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "_Key(...)"

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        """Send the request with the key."""
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request

    def hide(self, text: str) -> str:
        """Return a server's text without the key, which some repeat in their errors."""
        return text.replace(self._key, "[key]")


class Client:
    """An HTTP client for one endpoint: an asynchronous context manager."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        key = config.read_key()
        self._key = None if key is None else _Key(key)
        limits = config.limits
        self._http = httpx2.AsyncClient(
            base_url=config.base_url,
            auth=self._key,
            timeout=httpx2.Timeout(limits.timeout, connect=min(limits.timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency),
            trust_env=not config.is_local,
        )

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.__aexit__()

    async def post(self, body: Mapping[str, Any], expected: Tokens) -> Reply | Problem:
        """Send one request and wait for its whole answer, `limits.timeout` seconds at most.

        Args:
          body: of the request.
          expected: tokens to count where the server does not say how many it used.
        """
        try:
            # httpx2's own limits are on each piece of an answer; a server that sends a byte a second would pass them.
            async with asyncio.timeout(self._config.limits.timeout):
                response = await self._http.post("/chat/completions", json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            return Problem(f"no connection to {self._config.base_url}: {self._hidden(str(error))}")
        except (TimeoutError, httpx2.TimeoutException):
            return Problem(f"no whole answer within {self._config.limits.timeout:g} seconds", paid=True)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return Problem(f"the connection broke: {self._hidden(str(error))}", paid=True)
        if response.status_code == 200:
            return _read(response.content, expected)
        return self._refused(response)

    def _refused(self, response: httpx2.Response) -> Problem:
        status = response.status_code
        code, message = _error_in(response)
        hint = HINTS.get(status, "")
        if 300 <= status < 400:
            hint = "the server redirects, which is not followed: correct base_url"
        parts = [f"HTTP {status}", self._hidden(message), hint]
        reason = ": ".join(part for part in parts if part)
        everyone = status in STOP or 300 <= status < 400 or code in NO_CREDIT
        again = not everyone and (status in TRY_AGAIN or status >= 500)
        return Problem(reason, status, again=again, wait=asked_wait(response.headers), everyone=everyone)

    def _hidden(self, text: str) -> str:
        return text if self._key is None else self._key.hide(text)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that `Retry-After` (seconds or a date) or `retry-after-ms` asks for, None if neither does."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text := headers.get(name, "")):
            return float(text) * unit
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds())


def _read(content: bytes, expected: Tokens) -> Reply | Problem:
    """Return the reply in the body of an answer of status 200."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        return Problem(f"the answer is not JSON ({error})", paid=True)
    match answer:
        case {"choices": [{"message": {**message}, **choice}, *_]}:
            pass
        case {"error": {**error}}:
            return Problem(f"the server answers with an error: {str(error.get('message', error))[:200]}", paid=True)
        case _:
            return Problem(f"the answer has no choices[0].message: {content[:200]!r}", paid=True)
    # A refusal, or a model that spent all its tokens on reasoning, has no content: an empty reply, paid for.
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        return Problem(f"choices[0].message.content is no text but {type(text).__name__}", paid=True)
    return Reply(
        text=text,
        finish=str(choice.get("finish_reason") or ""),
        model=str(answer.get("model") or ""),
        tokens=_used(answer.get("usage"), expected),
    )


def _used(usage: object, expected: Tokens) -> Tokens:
    match usage:
        case {"prompt_tokens": int(prompt), "completion_tokens": int(completion)}:
            return Tokens(prompt, completion)
        case _:
            return expected


def _error_in(response: httpx2.Response) -> tuple[str, str]:
    """Return the code and the message of an error in OpenAI's form, or an empty code and the start of the body."""
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError):
        answer = None
    match answer:
        case {"error": {"message": str(message), **rest}}:
            code, text = str(rest.get("code") or rest.get("type") or ""), message
        case {"error": str(message)} | {"message": str(message)} | {"detail": str(message)}:
            code, text = "", message
        case _:
            code, text = "", response.text
    return code, " ".join(text.split())[:300]
