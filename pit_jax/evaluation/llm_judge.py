"""A language model as a judge of two responses, in the manner of MT-bench (arXiv 2306.05685)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from etils import epath

from pit_jax.core.errors import invalid
from pit_jax.evaluation import judge_prompts
from pit_jax.evaluation.endpoint import Endpoint, Messages
from pit_jax.evaluation.endpoint_config import EndpointConfig
from pit_jax.evaluation.endpoint_http import Reply
from pit_jax.evaluation.pairwise import NO_ANSWER, BothOrders, PairJudge, Question, Verdict, unless_identical
from pit_jax.evaluation.verdict_cache import ReplyCache
from pit_jax.text.prompt_files import TwoParts

_LOG = logging.getLogger(__name__)
REPLIES = "replies.jsonl"
"""The cache of replies in a judge's directory."""
NOT_UNDERSTOOD = (400, 415, 422, 501)
"""Statuses by which servers refuse a `response_format` they do not know."""


class LlmJudge:
    """Asks a model which of two responses is better, in the order given; wrap it in `BothOrders`.

    Args:
      endpoint: of the model.
      prompt: the template of the questions.
      structured: ask the server to bind the reply to a JSON schema. Where it refuses, replies are only parsed.
      name: shown in tables.
    """

    def __init__(self, endpoint: Endpoint, prompt: TwoParts, *, structured: bool, name: str) -> None:
        self._endpoint, self._prompt, self._structured = endpoint, prompt, structured
        self._name = name

    @property
    def name(self) -> str:
        """Name shown in tables and in report.json."""
        return self._name

    @property
    def endpoint(self) -> Endpoint:
        """What is asked; its `usage` says what was paid."""
        return self._endpoint

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return one verdict for each question; where there is none, the reason holds the reply or the failure."""
        return unless_identical(questions, self._ask)

    def _ask(self, questions: list[Question]) -> list[Verdict]:
        replies = self._replies([self._prompt.messages(**question._asdict()) for question in questions])
        verdicts = [_verdict(reply) for reply in replies]
        unread = [v for v, reply in zip(verdicts, replies, strict=True) if reply.ok and math.isnan(v.outcome)]
        if unread:
            _LOG.warning(
                "judge %s: %d of %d replies hold no verdict; the first: %r",
                self.name, len(unread), len(replies), unread[0].reason[-200:],
            )  # fmt: skip
        return verdicts

    def _replies(self, messages: list[Messages]) -> list[Reply]:
        if not self._structured:
            return self._endpoint.ask(messages)
        # One question shows whether the server knows the schema, at the price of one refusal.
        probe = self._endpoint.ask(messages[:1], response_format=judge_prompts.VERDICT_SCHEMA)[0]
        if probe.status in NOT_UNDERSTOOD:
            _LOG.warning(
                "judge %s: the server refuses a JSON schema (%s); replies are parsed", self.name, probe.failure
            )
            self._structured = False
            return self._endpoint.ask(messages)
        return [probe, *self._endpoint.ask(messages[1:], response_format=judge_prompts.VERDICT_SCHEMA)]


def _verdict(reply: Reply) -> Verdict:
    if not reply.ok:
        return Verdict(NO_ANSWER, f"no reply: {reply.failure}")
    outcome = judge_prompts.read_verdict(reply.text)
    cut = " (cut at max_tokens)" if math.isnan(outcome) and reply.finish == "length" else ""
    return Verdict(outcome, reply.text + cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmJudgeConfig:
    """Settings of a language model as a judge.

    endpoint: the model. name: shown in tables; None takes the model's.
    template: a shipped template's name or a .txt file (see `judge_prompts`); None takes mt_bench, or mt_bench_json.
    structured: bind replies to a JSON schema where the server can; the template must ask for JSON.
    both_orders: ask every question in both orders; half the price without, and no protection from position bias.
    """

    endpoint: EndpointConfig
    name: str | None = None
    template: str | None = None
    structured: bool = False
    both_orders: bool = True

    def __post_init__(self) -> None:
        """Load the template, so that a mistake shows before anything is paid."""
        prompt = self.prompt()
        if self.structured and "json" not in (prompt.system + prompt.user).lower():
            fix = "Use mt_bench_json, or say in your own how the JSON object is to look."
            raise invalid("LlmJudgeConfig.template", self.template, "ask for JSON where structured = True", fix)

    def prompt(self) -> TwoParts:
        """Return the template."""
        return judge_prompts.load(self.template or ("mt_bench_json" if self.structured else "mt_bench"))

    def build(self, directory: epath.PathLike, *, progress: bool = True) -> PairJudge:
        """Return the judge, with its cache of replies in `directory`, which judges and runs may share."""
        endpoint = Endpoint(self.endpoint, ReplyCache(epath.Path(directory) / REPLIES), progress=progress)
        name = self.name or self.endpoint.model
        judge = LlmJudge(endpoint, self.prompt(), structured=self.structured, name=name)
        return BothOrders(judge) if self.both_orders else judge
