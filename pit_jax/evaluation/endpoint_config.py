"""How an OpenAI-compatible endpoint is asked: address, model, sampling, limits and budget; and its key."""

from __future__ import annotations

import dataclasses
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pit_jax.core.errors import ConfigError, invalid
from pit_jax.text.chat import Message

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens")


class Tokens(NamedTuple):
    """Tokens read and written."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.prompt + self.completion

    def plus(self, other: Tokens) -> Tokens:
        """Return the sum, kind by kind."""
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def minus(self, other: Tokens) -> Tokens:
        """Return the difference, kind by kind."""
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How hard an endpoint is pressed, and how patient its client is.

    concurrency: requests under way at once.
    requests_per_minute, tokens_per_minute: of this process; sent evenly spaced. None for no limit.
    timeout: seconds for one request, from connecting to the last byte.
    attempts: tries for one question. first_wait: seconds before the second try, doubled for each further one.
    longest_wait: seconds at most between two tries; a server that asks for more is given up.
    give_up_after: after so many questions in a row that failed in all their tries, the others are not asked.
    """

    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    give_up_after: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("concurrency", "attempts", "give_up_after"):
            value = vars(self)[name]
            if value < 1:
                raise invalid(f"Limits.{name}", value, "be at least 1", f"The default is {vars(Limits)[name]}.")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise invalid(f"Limits.{name}", value, "be positive or None", "None sets no limit.")
        for name in ("timeout", "first_wait", "longest_wait"):
            value = vars(self)[name]
            if not 0 < value < math.inf:
                raise invalid(f"Limits.{name}", value, "be positive", f"The default is {vars(Limits)[name]:g} seconds.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What the questions of one process may cost; answers that are known already cost nothing.

    tokens: at most so many, read and written. cost: at most so much, in the currency of the prices.
    prompt_price, completion_price: of a million tokens read and written.
    reply_tokens: tokens a reply usually has, for the estimate; None takes the most it may have.
    """

    tokens: int | None = None
    cost: float | None = None
    prompt_price: float | None = None
    completion_price: float | None = None
    reply_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that a cost can be computed where it is limited."""
        for name, value in vars(self).items():
            if value is not None and not value >= 0:
                raise invalid(f"Budget.{name}", value, "be >= 0 or None", "Leave it out for none.")
        if (self.prompt_price is None) != (self.completion_price is None):
            given = (self.prompt_price, self.completion_price)
            raise invalid("Budget.prompt_price, .completion_price", given, "be given together", "Set both or none.")
        if self.cost is not None and self.prompt_price is None:
            fix = "Set Budget.prompt_price and Budget.completion_price, per million tokens."
            raise invalid("Budget.cost", self.cost, "come with prices", fix)

    def price(self, tokens: Tokens) -> float | None:
        """Return what tokens cost, or None if there are no prices."""
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (tokens.prompt * self.prompt_price + tokens.completion * self.completion_price) / 1e6

    def covers(self, tokens: Tokens) -> bool:
        """Return whether so many tokens are within the budget."""
        price = self.price(tokens)
        return (self.tokens is None or tokens.total <= self.tokens) and (
            self.cost is None or price is None or price <= self.cost
        )

    def describe(self, tokens: Tokens) -> str:
        """Return a number of tokens, with what it costs where prices are known."""
        price = self.price(tokens)
        return f"{tokens.total:,} tokens" + ("" if price is None else f" for {price:.2f}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible endpoint, and how it is sampled.

    base_url: up to and including the version, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1.
    model: as the server calls it.
    key_env: name of the environment variable that holds the key; None for a server that wants none.
    temperature, top_p, seed: sent unless None. max_tokens: of a reply, sent as `token_field`.
    extra: further fields of the request's body, for example {"reasoning_effort": "low"}.
    """

    base_url: str
    model: str
    key_env: str | None = None
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int = 1024
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limits: Limits = Limits()
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        """Check the address and the sampling; the key is looked up when it is needed."""
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        _check_address(self.base_url)
        if not self.model:
            raise invalid("EndpointConfig.model", self.model, "be a name", "Ask the server for its list: GET /models.")
        if self.max_tokens < 1:
            raise invalid("EndpointConfig.max_tokens", self.max_tokens, "be at least 1", "1024 suits most judges.")
        if self.token_field not in TOKEN_FIELDS:
            raise invalid("EndpointConfig.token_field", self.token_field, f"be one of {TOKEN_FIELDS}", "Choose one.")
        if self.temperature is not None and not self.temperature >= 0:
            raise invalid("EndpointConfig.temperature", self.temperature, "be >= 0 or None", "None sends none.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise invalid("EndpointConfig.top_p", self.top_p, "be in (0, 1] or None", "None sends none.")
        own = sorted({"model", "messages", "stream", "n", self.token_field} & set(self.extra))
        if own:
            raise invalid("EndpointConfig.extra", own, "hold no field that is sent anyway", "Remove it.")

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, so that no proxy is to be used."""
        return urllib.parse.urlsplit(self.base_url).hostname in LOCAL_HOSTS

    def body(
        self, messages: Sequence[Message], *, response_format: Mapping[str, Any] | None, sample: int
    ) -> dict[str, Any]:
        """Return the request's JSON body; it holds everything that decides the answer but `sample`."""
        seed = None if self.seed is None else self.seed + sample
        optional = {
            "temperature": self.temperature, "top_p": self.top_p, "seed": seed, "response_format": response_format,
        }  # fmt: skip
        return {
            "model": self.model,
            "messages": [{name: _sendable(text) for name, text in message.items()} for message in messages],
            self.token_field: self.max_tokens,
            **{name: value for name, value in optional.items() if value is not None},
            **self.extra,
        }

    def expected(self, messages: Sequence[Message]) -> Tokens:
        """Return the tokens one question is expected to take at most; see `estimated_tokens`."""
        reply = self.budget.reply_tokens
        return Tokens(
            sum(estimated_tokens(message["content"]) for message in messages),
            self.max_tokens if reply is None else min(reply, self.max_tokens),
        )

    def read_key(self) -> str | None:
        """Return the key; it must go nowhere but into the request's header.

        Raises:
          ConfigError: the variable is not set, or holds what no header can; the value is never named.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            fix = f"Set it (export {self.key_env}=...), or set key_env = None for a server that wants no key."
            raise invalid("EndpointConfig.key_env", self.key_env, "name an environment variable that is set", fix)
        if not all("!" <= character <= "~" for character in key):
            raise ConfigError(
                f"The environment variable {self.key_env} (EndpointConfig.key_env) must hold a key of printable "
                "ASCII characters without spaces. Copy the key again."
            )
        return key


def estimated_tokens(text: str) -> int:
    """Return a cautious estimate of the tokens of a message: a third of its UTF-8 bytes, and four for its frame.

    English has about four bytes a token, and most other writing about three.
    """
    return -(-len(text.encode("utf-8", errors="replace")) // 3) + 4


def _check_address(address: str) -> None:
    field = "EndpointConfig.base_url"
    fix = "Give the part before /chat/completions, such as https://api.openai.com/v1."
    try:
        url = urllib.parse.urlsplit(address)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError as error:
        raise ConfigError(f"{field} must be an http or https address ({error}). {fix}") from None
    if url.username is not None or url.password is not None:
        shown = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
        fix = "Put the key into an environment variable and its name into EndpointConfig.key_env."
        raise invalid(field, shown, "hold no name or password", fix)
    if not usable or url.query or url.fragment:
        raise invalid(field, address, "be an http or https address", fix)


def _sendable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
