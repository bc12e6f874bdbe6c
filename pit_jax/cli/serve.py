"""`pit-jax serve`: an improver behind OpenAI's API."""

from __future__ import annotations

import argparse
import os

from pit_jax.core.errors import ConfigError

EXTRA = ("prometheus_client", "starlette", "uvicorn")
EPILOG = """\
DIR is a run (its improver is used) or one stage of it. Clients of OpenAI's API work as they are: the answer to a chat
that ends with a user's message is written by the run's policy and improved; where it ends with an assistant's message,
that is the draft.

examples
  pit-jax serve --checkpoint=runs/demo
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -H 'x-pit-iterations: 2' \\
      -d '{"model": "demo", "messages": [{"role": "user", "content": "goal from oak by red blue"}]}'
  PIT_KEY=secret pit-jax serve --checkpoint=runs/demo --host=0.0.0.0 --api-key-env=PIT_KEY
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pit-jax serve`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, or a stage of one")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    parser.add_argument("--name", metavar="MODEL", help="of the model, for clients (default: the run's directory)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key to ask for")
    group = parser.add_argument_group("what a request gets that asks for nothing else")
    group.add_argument("--iterations", type=int, default=1, metavar="N", help="0: the policy's own words (default: 1)")
    group.add_argument("--candidates", type=int, default=1, metavar="N", help="proposals of a step (default: 1)")
    group.add_argument("--accept", choices=("gap", "always"), help="default: gap where the run has a gap model")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: all the model can say)")
    group = parser.add_argument_group("batches")
    group.add_argument("--max-batch", type=int, default=64, metavar="N", help="rows of a batch (default: 64)")
    group.add_argument("--batches", type=int, default=2, metavar="N", help="sampled in turns (default: 2)")
    group.add_argument(
        "--linger", type=float, default=0.01, metavar="SECONDS", help="to wait for others who may come (default: 0.01)"
    )
    group.add_argument(
        "--patience", type=float, default=0.5, metavar="SECONDS",
        help="for which fewer rows than are under way wait for more (default: 0.5)",
    )  # fmt: skip
    group.add_argument(
        "--draft-tokens", type=int, metavar="N",
        help="that are guessed from what is improved and checked at once: the same answers (default: as the run's)",
    )  # fmt: skip
    group.add_argument("--no-warm-up", action="store_true", help="compile during the first requests, not before them")
    group = parser.add_argument_group("limits")
    group.add_argument("--max-requests", type=int, default=256, metavar="N", help="at a time (default: 256)")
    group.add_argument("--max-body", type=int, default=1_000_000, metavar="BYTES", help="default: 1000000")
    group.add_argument("--max-prompt", type=int, metavar="TOKENS", help="default: as many as the models read")
    group.add_argument("--max-choices", type=int, default=16, metavar="N", help="answers of a request (default: 16)")
    group.add_argument("--max-rows", type=int, default=64, metavar="N", help="answers times candidates (default: 64)")
    group.add_argument("--max-iterations", type=int, default=8, metavar="N", help="default: 8")
    group.add_argument("--max-candidates", type=int, default=16, metavar="N", help="default: 16")
    group.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of a request (default: 120)")
    group.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="to finish requests after SIGTERM (default: 30)"
    )


def serve(args: argparse.Namespace) -> None:
    """`pit-jax serve`: serve a run until Ctrl-C or SIGTERM.

    Raises:
      ConfigError: a flag is wrong, the key is not there, or the extra `serve` is not installed.
    """
    from pit_jax.serving.settings import Batching, Limits, Serving

    serving = Serving(
        checkpoint=args.checkpoint,
        host=args.host,
        port=args.port,
        name=args.name,
        api_key=_key(args.api_key_env),
        warm_up=not args.no_warm_up,
        iterations=args.iterations,
        candidates=args.candidates,
        accept=args.accept,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        drain=args.drain,
        draft_tokens=args.draft_tokens,
        batching=Batching(max_batch=args.max_batch, linger=args.linger, patience=args.patience, running=args.batches),
        limits=Limits(
            requests=args.max_requests,
            body=args.max_body,
            prompt=args.max_prompt,
            choices=args.max_choices,
            rows=args.max_rows,
            iterations=args.max_iterations,
            candidates=args.max_candidates,
            seconds=args.timeout,
        ),
    )
    try:
        from pit_jax.serving.server import serve as run
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ConfigError(
            f"Serving needs {error.name}, which is not installed: pip install 'pit_jax[serve]'."
        ) from error
    run(serving)


def _key(variable: str | None) -> str | None:
    """Return the API key; it comes from the environment alone, for flags are seen by every user of a machine."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"--api-key-env={variable}: the environment has no {variable}, or it is empty. Set it.")
    return key
