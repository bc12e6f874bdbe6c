"""Entry point of `pit-jax`: reads the command line, runs one verb, turns errors into messages.

exit status   0 done   1 a PitError or OSError, one message on stderr   2 wrong usage
              75 another host is gone: the same command on all hosts goes on from the newest checkpoint
              130, 143 stopped by Ctrl-C or SIGTERM (with a checkpoint, where training was under way)

With several hosts every one runs the same line; see `sharding.processes`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pit_jax.cli import arguments, environment
from pit_jax.core.errors import PitError

_CTRL_C = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = arguments.parse(sys.argv[1:] if argv is None else argv)
    environment.set_up_logging()
    environment.leave_absent_tpus_alone()
    environment.use_compilation_cache(args.compilation_cache)
    outcome = _Outcome()
    try:
        outcome = _run(args)
    finally:
        if "pit_jax.sharding.processes" in sys.modules:
            from pit_jax.sharding import processes

            processes.leave(outcome.status, outcome.reason)
    return outcome.status


class _Outcome(NamedTuple):
    """How a verb ended."""

    status: int = 1
    reason: str = "an unexpected error; see its log"


def _run(args: argparse.Namespace) -> _Outcome:
    """Run one verb, and say what is wrong if something is."""
    module, _, function = args.run.partition(":")
    try:
        _join(args)
        getattr(importlib.import_module(module), function)(args)
        sys.stdout.flush()
        return _Outcome(0, "done")
    except PitError as error:
        if args.debug:
            raise
        return _said(args, str(error), _status(error))
    except KeyboardInterrupt:
        if args.debug:
            raise
        text = "stopped. What is complete is kept; the same command again goes on from there."
        return _said(args, text, _CTRL_C)
    except BrokenPipeError:
        # The reader (`| head`) has gone; without this, Python complains once more when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _Outcome(0, "done")
    except OSError as error:  # No right to write, a full disk, no network: nothing a traceback would explain.
        if args.debug:
            raise
        fix = "Check the path, its permissions, free space and network, then run the same command again."
        return _said(args, f"{error}. {fix} --debug shows where.", 1)


def _join(args: argparse.Namespace) -> None:
    """Join the other hosts of a run, if this verb runs on several and there are any.

    Raises:
      ConfigError, ProcessError: what was said about them is wrong, or they did not come.
    """
    if "joins" not in args or not args.joins or ("print_config" in args and args.print_config):
        return
    cluster = environment.cluster(args)
    if cluster is not None:
        from pit_jax.sharding import processes

        processes.join(cluster)
        environment.speak_as(processes.number())


def _said(args: argparse.Namespace, text: str, status: int) -> _Outcome:
    """Print a message; with several processes it says which one this is."""
    processes = sys.modules.get("pit_jax.sharding.processes")
    which = f", process {processes.number()}" if processes is not None and processes.count() > 1 else ""
    print(f"pit-jax {args.verb}{which}: {text}", file=sys.stderr, flush=True)
    return _Outcome(status, text)


def _status(error: PitError) -> int:
    """Return a failure's exit status; training that was asked to stop brings its own."""
    processes = sys.modules.get("pit_jax.sharding.processes")
    if processes is not None and isinstance(error, processes.AbsentError):
        return processes.EXIT_LOST
    if "pit_jax.train.loop" not in sys.modules:  # Importing it imports jax; and then nothing was trained.
        return 1
    from pit_jax.train.loop import Interrupted

    return error.exit_status if isinstance(error, Interrupted) else 1
