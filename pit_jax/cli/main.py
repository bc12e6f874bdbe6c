"""Entry point of `pit-jax`: reads the command line, runs one verb, turns errors into messages.

exit status   0 done   1 a PitError or OSError, one message on stderr   2 wrong usage
              130, 143 stopped by Ctrl-C or SIGTERM (with a checkpoint, where training was under way)
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from pit_jax.cli import arguments, environment
from pit_jax.core.errors import PitError

_CTRL_C = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = arguments.parse(sys.argv[1:] if argv is None else argv)
    environment.set_up_logging()
    environment.use_compilation_cache(args.compilation_cache)
    module, _, function = args.run.partition(":")
    try:
        getattr(importlib.import_module(module), function)(args)
        sys.stdout.flush()
        return 0
    except PitError as error:
        if args.debug:
            raise
        print(f"pit-jax {args.verb}: {error}", file=sys.stderr)
        return _status(error)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(
            f"pit-jax {args.verb}: stopped. What is complete is kept; the same command again goes on from there.",
            file=sys.stderr,
        )
        return _CTRL_C
    except BrokenPipeError:
        # The reader (`| head`) has gone; without this, Python complains once more when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # No right to write, a full disk, no network: nothing a traceback would explain.
        if args.debug:
            raise
        fix = "Check the path, its permissions, free space and network, then run the same command again."
        print(f"pit-jax {args.verb}: {error}. {fix} --debug shows where.", file=sys.stderr)
        return 1


def _status(error: PitError) -> int:
    """Return a failure's exit status; training that was asked to stop brings its own."""
    if "pit_jax.train.loop" not in sys.modules:  # Importing it imports jax; and then nothing was trained.
        return 1
    from pit_jax.train.loop import Interrupted

    return error.exit_status if isinstance(error, Interrupted) else 1
