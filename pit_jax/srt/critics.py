"""Critics: who says what is wrong with a response, writes a better one, and scores either in a fresh context."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from etils import epath

from pit_jax.core.errors import ConfigError, invalid, nearest
from pit_jax.evaluation.endpoint import Endpoint
from pit_jax.evaluation.endpoint_config import EndpointConfig
from pit_jax.evaluation.endpoint_http import Reply
from pit_jax.evaluation.verdict_cache import ReplyCache
from pit_jax.srt import critic_prompts
from pit_jax.text.prompt_files import TwoParts

REPLIES = "replies.jsonl"
"""The cache of replies in a critic's directory."""


class Draft(NamedTuple):
    """A prompt with a response to it, as texts."""

    prompt: str
    response: str


class Said(NamedTuple):
    """What a critic says: its raw text, or why there is none. cut: the text was cut at the longest it may have."""

    text: str
    failure: str = ""
    cut: bool = False


class Critic(Protocol):
    """Anything that criticises and scores responses; many at once, in order."""

    @property
    def name(self) -> str:
        """Name shown in reports."""
        ...

    @property
    def tokens_spent(self) -> int:
        """Tokens paid for so far, read and written."""
        ...

    def critiques(self, drafts: Sequence[Draft]) -> list[Said]:
        """Return for each draft weaknesses, suggestions, score and an improved response (`critique.read_critique`)."""
        ...

    def scores(self, drafts: Sequence[Draft]) -> list[Said]:
        """Return for each draft a text with a score from 1 to 10, given without knowledge of any other draft."""
        ...


class CriticConfig(Protocol):
    """Settings of a critic: a frozen dataclass."""

    def build(self, directory: epath.PathLike, *, progress: bool = True) -> Critic:
        """Return the critic; `directory` is where it keeps what it was told."""
        ...


class EndpointCritic:
    """Asks a model behind an OpenAI-compatible endpoint; every question is a conversation of its own."""

    def __init__(self, endpoint: Endpoint, critique: TwoParts, score: TwoParts) -> None:
        self._endpoint, self._critique, self._score = endpoint, critique, score

    @property
    def name(self) -> str:
        """The model's name."""
        return self._endpoint.config.model

    @property
    def tokens_spent(self) -> int:
        """Tokens paid for by this process."""
        return self._endpoint.usage.spent.total

    def critiques(self, drafts: Sequence[Draft]) -> list[Said]:
        """Return the model's critiques."""
        return self._ask(self._critique, drafts)

    def scores(self, drafts: Sequence[Draft]) -> list[Said]:
        """Return the model's ratings; a draft that is given twice is asked about once."""
        return self._ask(self._score, drafts)

    def _ask(self, prompt: TwoParts, drafts: Sequence[Draft]) -> list[Said]:
        if not drafts:
            return []
        return [_said(reply) for reply in self._endpoint.ask([prompt.messages(**draft._asdict()) for draft in drafts])]


def _said(reply: Reply) -> Said:
    return Said(reply.text, reply.failure, cut=reply.finish == "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointCriticConfig:
    """A language model as the critic (in the paper one that is stronger than the base, at temperature 0).

    endpoint: the model; its max_tokens must have room for feedback and improved response together.
    critique, score: templates, by a shipped name or as a .txt file (see `critic_prompts`).
    """

    endpoint: EndpointConfig
    critique: str = "critique"
    score: str = "score"

    def __post_init__(self) -> None:
        """Load the templates, so that a mistake shows before anything is paid."""
        for name in (self.critique, self.score):
            critic_prompts.load(name)

    def build(self, directory: epath.PathLike, *, progress: bool = True) -> Critic:
        """Return the critic, with its cache of replies in `directory`, which critics and runs may share."""
        endpoint = Endpoint(self.endpoint, ReplyCache(epath.Path(directory) / REPLIES), progress=progress)
        return EndpointCritic(endpoint, critic_prompts.load(self.critique), critic_prompts.load(self.score))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionCritic:
    """A program as the critic: `critique(prompt, response) -> text`, `score(prompt, response) -> 1 to 10`."""

    name: str
    critique: Callable[[str, str], str]
    score: Callable[[str, str], float]

    @property
    def tokens_spent(self) -> int:
        """Nothing is paid."""
        return 0

    def critiques(self, drafts: Sequence[Draft]) -> list[Said]:
        """Return the function's texts."""
        return [Said(self.critique(*draft)) for draft in drafts]

    def scores(self, drafts: Sequence[Draft]) -> list[Said]:
        """Return the function's scores."""
        return [Said(f"[[{self.score(*draft):g}]]") for draft in drafts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionCriticConfig:
    """A program as the critic, by import paths `package.module:name` of its two functions (see `FunctionCritic`)."""

    critique: str
    score: str

    def __post_init__(self) -> None:
        """Look both functions up, so that a misspelt name shows at once."""
        for field in ("critique", "score"):
            _function(f"FunctionCriticConfig.{field}", vars(self)[field])

    def build(self, directory: epath.PathLike, *, progress: bool = True) -> Critic:
        """Return the critic; it keeps nothing."""
        del directory, progress
        return FunctionCritic(
            name=self.critique,
            critique=_function("FunctionCriticConfig.critique", self.critique),
            score=_function("FunctionCriticConfig.score", self.score),
        )


def _function(field: str, path: str) -> Callable[[str, str], Any]:
    """Return the function that an import path stands for.

    Raises:
      ConfigError: there is no such module, or no such function in it.
    """
    module, _, name = path.partition(":")
    fix = "Give 'module:function', such as 'pit_jax.data.synthetic:critique'."
    try:
        found = vars(importlib.import_module(module))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{field} = {path!r} must be an import path; {error}. {fix}") from error
    if not callable(found.get(name)):
        raise invalid(field, path, "name a function of its module", fix + nearest(name, found))
    return found[name]
