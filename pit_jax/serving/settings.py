"""Settings of the server: where it listens, what it batches, and what it refuses."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Literal

from pit_jax.core.errors import invalid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """How waiting rows become batches.

    max_batch: most rows of a batch.
    linger: seconds without an arrival after which a batch that is not full starts. Nobody waits where nobody else is
      to come: the wait is for other requests only.
    patience: seconds for which fewer rows than are under way wait for more, before they hold those up.
    running: most batches that are sampled in turns. With 1 a new request waits for the end of the batch under way.
    piece: seconds between two looks at a batch under way: how often tokens are sent and abandoned rows dropped.
    """

    max_batch: int = 64
    linger: float = 0.01
    patience: float = 0.5
    running: int = 2
    piece: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_batch", "running"):
            if vars(self)[name] < 1:
                raise invalid(f"Batching.{name}", vars(self)[name], "be at least 1", "Give a larger number.")
        if not 0.0 <= self.linger <= 10.0:
            raise invalid("Batching.linger", self.linger, "be between 0 and 10 seconds", "0.01 is usual.")
        if not 0.0 <= self.patience <= 60.0:
            raise invalid("Batching.patience", self.patience, "be between 0 and 60 seconds", "0.5 is usual.")
        if not 0.0 < self.piece <= 10.0:
            raise invalid("Batching.piece", self.piece, "be above 0 and at most 10 seconds", "0.05 is usual.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for, and all requests together.

    requests: most requests that are answered or waiting; the next gets status 429.
    body: most bytes of a request.
    prompt: most tokens of a prompt; None: as many as the models read. Of a longer one they would read the end alone.
    choices: most answers of one request, `n` times its prompts. rows: the same times `candidates`.
    iterations, candidates: most improvement steps, and proposals of a step.
    seconds: for a request to come in, be answered, and be read by the client.
    """

    requests: int = 256
    body: int = 1_000_000
    prompt: int | None = None
    choices: int = 16
    rows: int = 64
    iterations: int = 8
    candidates: int = 16
    seconds: float = 120.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("requests", "body", "choices", "rows", "iterations", "candidates"):
            if vars(self)[name] < 1:
                raise invalid(f"Limits.{name}", vars(self)[name], "be at least 1", "Give a larger number.")
        if self.prompt is not None and self.prompt < 1:
            raise invalid("Limits.prompt", self.prompt, "be at least 1", "Leave it out for what the models read.")
        if not 0.0 < self.seconds < float("inf"):
            raise invalid("Limits.seconds", self.seconds, "be a positive number", "120 is usual.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What `pit-jax serve` is asked for.

    checkpoint: a run (its finished improver is taken), the stage of an improver, or `STAGE:SNAPSHOT`.
    host, port: where it listens; port 0 takes a free one.
    name: of the model in `/v1/models`; None: the name of the run's directory.
    api_key: what clients must send as bearer token; None: nothing.
    warm_up: compile before the first request rather than during it.
    iterations, candidates, accept: what a request gets that asks for nothing. accept None: "gap" where the run has a
      gap model, else "always".
    temperature, max_tokens: the same; max_tokens None: as many as the models can say.
    drain: seconds that requests under way are given when the server is told to stop.
    draft_tokens: by which the improver's answers are guessed ahead (`decode.sampling.Sampling`); None: as many as the
      run says. Answers are the same.
    """

    checkpoint: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)
    warm_up: bool = True
    iterations: int = 1
    candidates: int = 1
    accept: Literal["gap", "always"] | None = None
    temperature: float = 1.0
    max_tokens: int | None = None
    drain: float = 30.0
    draft_tokens: int | None = None
    batching: Batching = Batching()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.port <= 65535:
            raise invalid("Serving.port", self.port, "be between 0 and 65535", "8000 is usual; 0 takes a free one.")
        if self.api_key is not None and not self.api_key:
            raise invalid("Serving.api_key", "", "not be empty", "Leave it out, or give a secret.")
        if not 0 <= self.iterations <= self.limits.iterations:
            rule = f"be between 0 and Limits.iterations = {self.limits.iterations}"
            raise invalid("Serving.iterations", self.iterations, rule, "0 gives the policy's answers as they are.")
        if not 1 <= self.candidates <= self.limits.candidates:
            rule = f"be between 1 and Limits.candidates = {self.limits.candidates}"
            raise invalid("Serving.candidates", self.candidates, rule, "Use 1 for one proposal per step.")
        if not 0.0 <= self.temperature <= 2.0:
            raise invalid("Serving.temperature", self.temperature, "be between 0 and 2", "1 is usual, 0 is greedy.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise invalid("Serving.max_tokens", self.max_tokens, "be at least 1", "Leave it out for no limit.")
        if not 0.0 <= self.drain < float("inf"):
            raise invalid("Serving.drain", self.drain, "be >= 0", "30 is usual.")
        if self.draft_tokens is not None and self.draft_tokens < 0:
            raise invalid("Serving.draft_tokens", self.draft_tokens, "be >= 0", "Use 0 to guess no tokens.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
