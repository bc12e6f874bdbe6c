"""A request, understood: what is to be answered, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from pit_jax.core.errors import PitError
from pit_jax.decode.batches import Response
from pit_jax.improve.accept import Improve


class Refusal(PitError):
    """A request that is not answered, as OpenAI's API says it: a status and an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to be answered.

    ids: as the codec reads them, without template. draft: a given answer to be improved, None: the policy writes it;
    draft_text: as it was given.
    """

    ids: tuple[int, ...]
    draft: Response | None = None
    draft_text: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for.

    chat: whether it is a chat. model: as it named it. prompts: each gets `n` answers.
    improve: how answers are improved, None: not at all.
    limit: most tokens of an answer. stops: texts that end it.
    stream: whether it is sent in pieces; usage: whether the last of them says the usage.
    """

    chat: bool
    model: str
    prompts: tuple[Prompt, ...]
    n: int
    improve: Improve | None
    temperature: float
    top_p: float
    limit: int
    stops: tuple[str, ...]
    seed: int
    stream: bool
    usage: bool
