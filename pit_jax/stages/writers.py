"""What writes in Self-Refine: a policy of a run, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.rng import key_for
from pit_jax.core.types import Params
from pit_jax.decode.batches import Response, row_keys
from pit_jax.decode.sampling import Sampling
from pit_jax.evaluation.endpoint import Endpoint, Usage
from pit_jax.evaluation.endpoint_config import EndpointConfig, estimated_tokens
from pit_jax.evaluation.endpoint_http import Reply
from pit_jax.evaluation.llm_judge import REPLIES
from pit_jax.evaluation.verdict_cache import ReplyCache
from pit_jax.improve.self_refine import RefineCounts, RefineTrajectory, SelfRefine, Writer, Written, count, self_refine
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.sharding import processes
from pit_jax.stages import answering
from pit_jax.stages.answers import response_of
from pit_jax.stages.run import Run
from pit_jax.text.chat import Chat
from pit_jax.text.chat_template import TemplateChat
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer

_LOG = logging.getLogger(__name__)
FORMS = ("auto", "turn", "plain")
_SEAM = 2
"""Tokens that a text may take more where it is joined to others than alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalWriting:
    """How a policy of a run is asked for feedback and refinements.

    form: "turn": a request is a user's turn of a dialogue; "plain": it stands as it is; "auto": a turn where the run's
      prompts are dialogues or are written by a chat template.
    inputs: room for a request in tokens; None takes what the whole history of all rounds can need. targets: for what
      is written, the end-of-sequence token included; None takes the run's.
    """

    form: Literal["auto", "turn", "plain"] = "auto"
    inputs: int | None = None
    targets: int | None = None

    def __post_init__(self) -> None:
        """Check the choice; lengths are checked where they are used."""
        if self.form not in FORMS:
            raise invalid("LocalWriting.form", self.form, f"be one of {FORMS}", "Choose one of them.")


AS_THE_RUN = LocalWriting()


class LocalWriter:
    """A language model of ours; a text depends on its request, the seed and the temperature alone.

    Args:
      lm, params: the model.
      codec: of requests, with room for them; its policy template is what they are put into.
      chat: how a request is written as a user's turn; None leaves it as it is.
      batch_size: rows of a batch.
      mesh: the devices that share them, None for one.
    """

    def __init__(
        self, lm: ConditionalLM, params: Params, codec: Codec, chat: Chat | None, batch_size: int, mesh: Mesh | None
    ) -> None:
        self._lm, self._params, self._codec, self._chat = lm, params, codec, chat
        self._batch_size, self._mesh = batch_size, mesh

    def fits(self, prompt: str) -> bool:
        """Return whether there is room for a request."""
        return len(self._ids(prompt)) <= self._codec.prompt_room

    def write(self, prompts: Sequence[str], *, seed: int, temperature: float) -> list[Written]:
        """Return one sample for each request.

        Raises:
          DataError: a request does not fit.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        for row in ids:
            if len(row) > self._codec.prompt_room:
                raise DataError(
                    f"A request has {len(row)} tokens, and there is room for {self._codec.prompt_room}. "
                    "Raise LocalWriting.inputs, or shorten the prompt set."
                )
        keys = row_keys(key_for(seed, "writer"), np.array([_number(prompt) for prompt in prompts], np.int64))
        sampler = answering.make_sampler(
            self._lm, self._codec, "policy", Sampling(temperature=temperature), self._batch_size, self._mesh
        )
        found = sampler.answer(self._params, [self._codec.policy_prompt(row) for row in ids], keys)
        return [Written(self._codec.text(answer.ids), answer.finished) for answer in found]

    def _ids(self, prompt: str) -> list[int]:
        return self._codec.tokenizer.encode(_framed(self._chat, prompt))


def _number(text: str) -> int:
    """Return a number of 32 bits for a text: equal texts get equal random streams, whatever stands beside them."""
    return int.from_bytes(hashlib.blake2s(text.encode("utf-8", errors="replace"), digest_size=4).digest(), "little")


def _framed(chat: Chat | None, text: str) -> str:
    return text if chat is None else chat.prompt([{"role": "user", "content": text}])


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointWriting:
    """A served model that writes.

    endpoint: the model; the temperature is that of each call (`SelfRefine.temperature`).
    context: tokens that the model reads and writes at most, None for no limit; estimated as for budgets, cautiously.
    """

    endpoint: EndpointConfig
    context: int | None = None

    def __post_init__(self) -> None:
        """Check that there is room for a question."""
        if self.context is not None and self.context <= self.endpoint.max_tokens:
            rule = f"be more than EndpointConfig.max_tokens ({self.endpoint.max_tokens}), or None"
            raise invalid("EndpointWriting.context", self.context, rule, "Give the model's context in tokens.")

    def build(self, directory: epath.PathLike, *, progress: bool = True) -> EndpointWriter:
        """Return the writer, with its cache of replies in `directory`, which judges and runs may share.

        Only process 0 opens the cache, for it alone asks.
        """
        cache = ReplyCache(epath.Path(directory) / REPLIES) if processes.is_first() else None
        return EndpointWriter(self, cache, progress=progress)


class EndpointWriter:
    """A model behind an endpoint; the same request with the same seed is paid for once, for the cache keeps replies.

    Args:
      config: the model.
      cache: of replies; None keeps none.
      progress: show how far a call is.
    """

    def __init__(self, config: EndpointWriting, cache: ReplyCache | None, *, progress: bool = True) -> None:
        self._config, self._cache, self._progress = config, cache, progress
        self.usage = Usage()

    def fits(self, prompt: str) -> bool:
        """Return whether a request and its reply are within the model's context, by a cautious estimate."""
        context = self._config.context
        return context is None or estimated_tokens(prompt) + self._config.endpoint.max_tokens <= context

    def write(self, prompts: Sequence[str], *, seed: int, temperature: float) -> list[Written]:
        """Return the replies; process 0 asks, and all get what it got.

        Raises:
          ConfigError: the budget does not cover the requests, and nothing was sent; or there is no key.
        """

        def ask() -> list[Written]:
            settings = dataclasses.replace(self._config.endpoint, temperature=temperature)
            endpoint = Endpoint(settings, self._cache, progress=self._progress)
            endpoint.usage = self.usage  # The budget is that of all calls, whatever their temperature.
            replies = endpoint.ask([[{"role": "user", "content": prompt}] for prompt in prompts], sample=seed)
            return [_written(reply) for reply in replies]

        return [Written(*row) for row in processes.first(f"replies of {self._config.endpoint.model}", ask)]


def _written(reply: Reply) -> Written:
    if not reply.ok:
        return Written("", finished=False, failure=reply.failure)
    text = reply.text.strip()
    if not text:
        return Written(
            "", finished=False, failure=f"the reply is empty (finish_reason {reply.finish or 'not given'!r})"
        )
    return Written(text, finished=reply.finish != "length")


class Refined(NamedTuple):
    """Responses of a run's prompts, refined.

    answers: after 1, 2, ... rounds, one response for each prompt in each; chosen: those that Self-Refine returns.
    """

    answers: list[list[Response]]
    chosen: list[Response]
    trajectories: list[RefineTrajectory]
    counts: RefineCounts


def refined(
    run: Run,
    checkpoint: str,
    config: SelfRefine,
    prompts: Sequence[Sequence[int]],
    originals: Sequence[Response],
    temperature: float,
    batch_size: int,
    writing: LocalWriting = AS_THE_RUN,
) -> Refined:
    """Refine responses to prompts (raw ids) with a policy of a run, under the run's seed.

    Args:
      run: whose tokenizer and templates are used.
      checkpoint: the policy that criticises and rewrites, such as `rl_policy:50`.
      config: of the method; its temperature is replaced.
      prompts, originals: x and y_0.
      temperature: of both calls.
      batch_size: rows of a batch.
      writing: form and lengths of requests.
    """
    chat = _chat(run, writing.form, prompts)
    codec = Codec(run.tokenizer, run.codec.templates, _lengths(run, config, writing, chat))
    rows = answering.shared_out(run.mesh, batch_size)
    writer = LocalWriter(run.lm, run.language_model(checkpoint, "policy"), codec, chat, rows, run.mesh)
    config = dataclasses.replace(config, temperature=temperature)
    return refined_by(writer, config, run.codec, prompts, originals, run.seed)


def refined_by(
    writer: Writer,
    config: SelfRefine,
    codec: Codec,
    prompts: Sequence[Sequence[int]],
    originals: Sequence[Response],
    seed: int,
) -> Refined:
    """Refine responses to prompts (raw ids) with any writer, such as an endpoint's.

    A refinement that has more tokens than `codec.lengths.targets` has room for is cut there, and is not finished. A
    response that was never rewritten is the original itself. Special tokens of a prompt have no text and are left out.
    """
    texts = [codec.tokenizer.decode([int(i) for i in prompt]) for prompt in prompts]
    first = [Written(codec.text(original.ids), original.finished) for original in originals]
    trajectories = self_refine(config, writer, texts, first, seed)
    counts = count(trajectories)
    _LOG.log(
        logging.WARNING if counts.doubtful else logging.INFO,
        "Self-Refine with prompts %s: %s", config.templates.name, counts.summary(),
    )  # fmt: skip

    def response(number: int, k: int) -> Response:
        row = trajectories[number]
        if min(k, row.rounds) == 0:
            return originals[number]
        written = row.answer(k)
        return response_of(codec, written.text, written.finished)

    return Refined(
        answers=[[response(n, k) for n in range(len(trajectories))] for k in range(1, config.iterations + 1)],
        chosen=[response(n, row.number) for n, row in enumerate(trajectories)],
        trajectories=trajectories,
        counts=counts,
    )


def _chat(run: Run, form: str, prompts: Sequence[Sequence[int]]) -> Chat | None:
    """Return how requests are written as a user's turn, None where they stand as they are."""
    tokenizer = run.tokenizer
    template = tokenizer.chat_template if isinstance(tokenizer, HuggingFaceTokenizer) else None
    if form != "plain" and template is not None and template.matches(run.codec.templates):
        return TemplateChat(path=str(run.directory / "tokenizer"))
    read = run.experiment.data.read.chat.text
    dialogues = sum(read.messages(tokenizer.decode([int(i) for i in prompt])) is not None for prompt in prompts)
    # Most of them, for a long dialogue may have lost its beginning, by which it is recognised.
    return read if form == "turn" or (form == "auto" and 2 * dialogues > len(prompts)) else None


def _lengths(run: Run, config: SelfRefine, writing: LocalWriting, chat: Chat | None) -> Lengths:
    """Return the room for requests and what is written; by default no history has to be shortened."""
    targets = run.codec.lengths.targets if writing.targets is None else writing.targets
    if writing.inputs is not None:
        return Lengths(inputs=writing.inputs, targets=targets)
    templates, longest = config.templates, max(targets, run.codec.lengths.targets)
    size = lambda text: len(run.tokenizer.encode(_framed(chat, text)))  # noqa: E731
    shown = 1 if config.style == "pit" else config.iterations
    history = [("", "")] * shown
    refine = size(templates.ask_refinement("", history)) + 2 * shown * longest
    feedback = size(templates.ask_feedback("", "")) + longest
    inputs = run.codec.lengths.inputs + max(refine, feedback) + _SEAM * (2 + 2 * shown)
    model = run.lm.config
    if isinstance(model, DecoderOnlyConfig) and model.max_positions is not None:
        inputs = min(inputs, model.max_positions - targets)
    return Lengths(inputs=inputs, targets=targets)
