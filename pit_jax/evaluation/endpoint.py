"""Questions to a chat model behind any OpenAI-compatible endpoint: many at once, patiently, and paid for once.

    endpoint = Endpoint(EndpointConfig(base_url=..., model=..., key_env="OPENAI_API_KEY"), ReplyCache(path))
    replies = endpoint.ask([[{"role": "user", "content": "..."}], ...])

Replies come in the order of the questions. A question that cannot be answered comes back as a failed reply, not as an
exception; the others are unaffected. Replies that arrived are in the cache at once, so after Ctrl-C, a crash or a
failure the same call asks only for the rest. Calls under way at the moment of a `kill -9` are lost, and only these may
be paid again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pit_jax.core.errors import invalid
from pit_jax.evaluation.endpoint_config import Budget, EndpointConfig, Limits, Tokens
from pit_jax.evaluation.endpoint_http import Client, Problem, Reply
from pit_jax.evaluation.verdict_cache import ReplyCache, key_of
from pit_jax.io.progress import Progress
from pit_jax.text.chat import Message

_LOG = logging.getLogger(__name__)
CLAIM_SECONDS = 0.2
"""How often a question that another process is asking is looked up."""
Messages = Sequence[Message]


@dataclasses.dataclass(kw_only=True)
class Usage:
    """What an endpoint has been asked so far.

    requests: tries sent, failed ones included. answered: replies of the server. known: replies from the cache.
    failed: questions without a reply. spent: tokens paid for; where a server did not say, or a paid answer was lost,
    those expected.
    """

    requests: int = 0
    answered: int = 0
    known: int = 0
    failed: int = 0
    spent: Tokens = Tokens(0, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What questions will take: how many there are, how many replies are known, and the tokens of the others."""

    questions: int
    known: int
    tokens: Tokens


class _Job(NamedTuple):
    """A question that is to be asked once, however often it was given."""

    key: str
    body: dict[str, Any]
    expected: Tokens


class Endpoint:
    """Asks one model; `usage` counts over all calls, and so does the budget.

    Args:
      config: what is asked, and how.
      cache: replies that are known already; None keeps none.
      progress: show how far a call is.
    """

    def __init__(self, config: EndpointConfig, cache: ReplyCache | None = None, *, progress: bool = True) -> None:
        self.config = config
        self.usage = Usage()
        self._cache = cache
        self._progress = progress

    def ask(
        self, questions: Sequence[Messages], *, response_format: Mapping[str, Any] | None = None, sample: int = 0
    ) -> list[Reply]:
        """Return one reply for each question, in their order; equal questions are asked once.

        Args:
          questions: conversations, each a list of messages that ends with the user's.
          response_format: of the request, for servers that bind their output to a JSON schema.
          sample: number of a sample: another one asks anew (temperature > 0), the same one is the same reply.

        Raises:
          ConfigError: the questions are expected to cost more than the rest of the budget (nothing is sent then), or
            the key's variable is not set.
          DataError: the cache cannot be written.
        """
        keys, jobs = self._jobs(questions, response_format, sample)
        found = self._known(jobs)
        rest = [job for key, job in jobs.items() if key not in found]
        estimate = Estimate(questions=len(jobs), known=len(found), tokens=_total(job.expected for job in rest))
        self._check_budget(estimate)
        self.usage.known += len(found)
        if rest:
            self._announce(estimate)
            try:
                found |= _run(self._ask_all(rest))
            except KeyboardInterrupt:
                kept = "lost: there is no cache" if self._cache is None else "kept: run again to ask for the rest"
                _LOG.warning("%s: interrupted; the replies so far are %s", self.config.model, kept)
                raise
            finally:
                if self._cache is not None:
                    self._cache.sync()
            self._report([found[job.key] for job in rest])
        return [found[key] for key in keys]

    def estimate(
        self, questions: Sequence[Messages], *, response_format: Mapping[str, Any] | None = None, sample: int = 0
    ) -> Estimate:
        """Return what `ask` would take, without asking."""
        _, jobs = self._jobs(questions, response_format, sample)
        known = self._known(jobs)
        rest = (job.expected for key, job in jobs.items() if key not in known)
        return Estimate(questions=len(jobs), known=len(known), tokens=_total(rest))

    def _jobs(
        self, questions: Sequence[Messages], response_format: Mapping[str, Any] | None, sample: int
    ) -> tuple[list[str], dict[str, _Job]]:
        keys, jobs = [], {}
        for messages in questions:
            body = self.config.body(messages, response_format=response_format, sample=sample)
            key = key_of({"url": self.config.base_url, "body": body, "sample": sample})
            keys.append(key)
            jobs.setdefault(key, _Job(key, body, self.config.expected(messages)))
        return keys, jobs

    def _known(self, keys: Mapping[str, _Job]) -> dict[str, Reply]:
        return {key: reply for key in keys if (reply := self._look_up(key)) is not None}

    def _look_up(self, key: str) -> Reply | None:
        stored = None if self._cache is None else self._cache.get(key)
        return None if stored is None else _from_cache(stored)

    def _check_budget(self, estimate: Estimate) -> None:
        budget = self.config.budget
        if not budget.covers(self.usage.spent.plus(estimate.tokens)):
            needed = f"{estimate.questions - estimate.known} questions are expected to take "
            needed += budget.describe(estimate.tokens)
            raise invalid(
                "Budget.tokens, .cost", (budget.tokens, budget.cost),
                f"cover what is asked: {needed}, after {budget.describe(self.usage.spent)} spent",
                "Raise it, ask fewer questions, or set Budget.reply_tokens to what replies really have. "
                "Nothing was sent.",
            )  # fmt: skip

    def _announce(self, estimate: Estimate) -> None:
        config = self.config
        _LOG.info(
            "%s at %s: %d questions, %d replies known, about %s to come",
            config.model, config.base_url, estimate.questions, estimate.known, config.budget.describe(estimate.tokens),
        )  # fmt: skip
        if config.key_env is not None and config.base_url.startswith("http:") and not config.is_local:
            _LOG.warning("%s: the key is sent without encryption; use https where you can", config.base_url)

    def _report(self, replies: Sequence[Reply]) -> None:
        failures = [reply.failure for reply in replies if not reply.ok]
        self.usage.failed += len(failures)
        self.usage.answered += sum(reply.ok and not reply.known for reply in replies)
        self.usage.known += sum(reply.known for reply in replies)
        if failures:
            _LOG.warning(
                "%s: %d of %d questions have no reply; the first: %s", self.config.model, len(failures), len(replies),
                failures[0],
            )  # fmt: skip
        _LOG.info("%s: %s spent so far", self.config.model, self.config.budget.describe(self.usage.spent))

    async def _ask_all(self, jobs: Sequence[_Job]) -> dict[str, Reply]:
        found: dict[str, Reply] = {}
        async with Client(self.config) as client:
            with Progress(f"ask {self.config.model}", len(jobs), start=0, enabled=self._progress) as progress:
                state = _State(self.config.limits, self.config.budget, self.usage)
                queue = iter(jobs)

                async def work() -> None:
                    for job in queue:
                        found[job.key] = await self._settle(job, client, state)
                        progress.advance(len(found))

                tasks = [asyncio.create_task(work()) for _ in range(min(self.config.limits.concurrency, len(jobs)))]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        return found

    async def _settle(self, job: _Job, client: Client, state: _State) -> Reply:
        """Return the reply to a question, asking unless another process does or has done so."""
        if self._cache is None:
            return await _persist(job, client, state)
        while True:
            with self._cache.claim(job.key) as mine:
                reply = self._look_up(job.key)
                if reply is not None:
                    return reply
                if mine:
                    reply = await _persist(job, client, state)
                    if reply.ok:
                        self._cache.put(job.key, _to_cache(reply))
                    return reply
            await asyncio.sleep(CLAIM_SECONDS)


class _State:
    """What the questions of one call share: pace, budget, and whether it is any use to go on."""

    def __init__(self, limits: Limits, budget: Budget, usage: Usage) -> None:
        self.limits, self.budget, self.usage = limits, budget, usage
        self.stopped = ""
        self._requests, self._tokens = _Pace(limits.requests_per_minute), _Pace(limits.tokens_per_minute)
        self._resume_at = 0.0
        self._failed = 0
        self._reserved = Tokens(0, 0)

    async def turn(self, expected: Tokens) -> None:
        """Wait until the pace, and a server that asked everybody to wait, allow another request."""
        clock = asyncio.get_running_loop().time
        starts = max(self._requests.book(1, clock()), self._tokens.book(expected.total, clock()))
        await asyncio.sleep(max(0.0, starts - clock()))
        while (left := self._resume_at - clock()) > 0:
            await asyncio.sleep(left * random.uniform(1.0, 1.1))

    def pause(self, seconds: float) -> None:
        """Let nobody send anything for so long."""
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)

    @contextlib.contextmanager
    def reserved(self, expected: Tokens) -> Iterator[bool]:
        """Hold back the tokens of a request while it is under way; yields False if the budget has not enough left."""
        enough = self.budget.covers(self.usage.spent.plus(self._reserved).plus(expected))
        held = expected if enough else Tokens(0, 0)
        self._reserved = self._reserved.plus(held)
        try:
            yield enough
        finally:
            self._reserved = self._reserved.minus(held)

    def settle(self, expected: Tokens, outcome: Reply | Problem) -> None:
        """Count what a request has cost, and let what it did not use go to others."""
        used = outcome.tokens if isinstance(outcome, Reply) else expected if outcome.paid else Tokens(0, 0)
        self.usage.requests += 1
        self.usage.spent = self.usage.spent.plus(used)
        self._tokens.give_back(expected.total - used.total)

    def answered(self) -> None:
        """Say that a question was answered."""
        self._failed = 0

    def failed(self, reason: str) -> None:
        """Say that a question will not be answered; after too many in a row, stop."""
        self._failed += 1
        if self._failed >= self.limits.give_up_after and not self.stopped:
            self.stopped = f"not asked, because {self._failed} questions in a row failed: {reason}"

    def stop(self, reason: str) -> None:
        """Ask nothing more: it would fail for the same reason."""
        self.stopped = self.stopped or f"not asked, because another question failed: {reason}"


class _Pace:
    """Spaces amounts evenly, so that no minute has more than `per_minute` of them."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else 60.0 / per_minute
        self._free_at = 0.0

    def book(self, amount: float, now: float) -> float:
        """Take the next free time for an amount and return it."""
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds
        return start

    def give_back(self, amount: float) -> None:
        """Return what was booked and not used."""
        self._free_at -= amount * self._seconds


async def _persist(job: _Job, client: Client, state: _State) -> Reply:
    """Send a question until it is answered, its tries are used up, or going on is no use."""
    limits = state.limits
    reason, status = "", None
    for attempt in range(limits.attempts):
        if state.stopped:
            return Reply(failure=state.stopped)
        with state.reserved(job.expected) as enough:
            if not enough:
                return Reply(failure=f"the budget is used up: {state.budget.describe(state.usage.spent)} spent")
            await state.turn(job.expected)
            outcome = await client.post(job.body, job.expected)
            state.settle(job.expected, outcome)
        if isinstance(outcome, Reply):
            state.answered()
            return outcome
        reason, status = outcome.reason, outcome.status
        if outcome.everyone:
            state.stop(reason)
        if not outcome.again:
            state.failed(reason)
            return Reply(failure=reason, status=status)
        if attempt + 1 < limits.attempts and not await _waited(outcome, attempt, state):
            reason += f"; the server asks to wait {outcome.wait:.0f} seconds, more than Limits.longest_wait"
            break
    state.failed(reason)
    return Reply(failure=f"{attempt + 1} tries failed; the last: {reason}", status=status)


async def _waited(problem: Problem, attempt: int, state: _State) -> bool:
    """Wait before the next try, at least as long as the server asks; return False where that is too long."""
    limits = state.limits
    if problem.wait is not None and problem.wait > limits.longest_wait:
        return False
    state.pause(problem.wait or 0.0)
    # Jitter keeps requests that failed together from coming back together.
    most = min(limits.longest_wait, limits.first_wait * 2.0**attempt)
    await asyncio.sleep(most * random.uniform(0.5, 1.0))
    return True


def _run(work: Any) -> dict[str, Reply]:
    """Run a coroutine to its end, also from a notebook, whose thread already has an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _total(tokens: Any) -> Tokens:
    total = Tokens(0, 0)
    for each in tokens:
        total = total.plus(each)
    return total


def _to_cache(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text, "finish": reply.finish, "model": reply.model,
        "prompt_tokens": reply.tokens.prompt, "completion_tokens": reply.tokens.completion,
    }  # fmt: skip


def _from_cache(stored: Mapping[str, Any]) -> Reply:
    return Reply(
        text=stored["text"],
        finish=stored.get("finish", ""),
        model=stored.get("model", ""),
        tokens=Tokens(stored.get("prompt_tokens", 0), stored.get("completion_tokens", 0)),
        known=True,
    )
