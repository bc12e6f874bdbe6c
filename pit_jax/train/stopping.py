"""Being asked to stop: Ctrl-C, SIGTERM, and JAX's preemption notice where there are several processes.

One process stops at the next step boundary after a signal. Several must stop at the same one, or those that go on wait
for the others for ever; which one that is, JAX's preemption service agrees upon in the background: after the notice of
any process each hears of it, all say how far they are, and the one after the farthest is where they stop. That takes no
collective operation, and asking takes less than a microsecond.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pit_jax.core.errors import PitError

EXIT_SIGINT = 130
EXIT_SIGTERM = 143
_BOUNDARIES = itertools.count(1)
"""Step boundaries of this process, of all its runs: the service's numbers may not start again with a new run."""


class Interrupted(PitError):
    """The run was asked to stop and did, with a checkpoint; `exit_status` is what the process should return."""

    def __init__(self, message: str, exit_status: int) -> None:
        """Keep both."""
        super().__init__(message)
        self.exit_status = exit_status


class Signals:
    """Remembers the first SIGINT or SIGTERM; a second SIGINT interrupts at once. Main thread only.

    With several processes SIGTERM is left to JAX, whose own handler is the notice. Python could replace that handler
    but never put it back, and what JAX gets before training starts is remembered too. SIGINT is sent on as SIGTERM.
    """

    def __init__(self) -> None:
        """Install nothing yet."""
        self.number: int | None = None
        """The signal: alone, as soon as it comes; with several processes, once all of them are to stop for it."""
        self._alone = jax.process_count() == 1
        self._sent_on = False
        self._old: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """Name of the signal that was received."""
        return signal.Signals(self.number or signal.SIGTERM).name

    @property
    def exit_status(self) -> int:
        """What the process should return."""
        return EXIT_SIGINT if self.number == signal.SIGINT else EXIT_SIGTERM

    def __enter__(self) -> Signals:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            taken = [signal.SIGINT, signal.SIGTERM] if self._alone else [signal.SIGINT]
            self._old = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Return whether all processes are to stop here; to be called at every step boundary."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(next(_BOUNDARIES)):
            by_hand = multihost_utils.process_allgather(np.asarray(self._sent_on))
            self.number = signal.SIGINT if np.any(by_hand) else signal.SIGTERM
        return self.number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self._sent_on or self.number is not None):
            raise KeyboardInterrupt
        # `print` may be interrupted in its own buffer; the system call may not.
        os.write(2, b"\nfinishing the step and saving a checkpoint; Ctrl-C again stops at once\n")
        if self._alone:
            self.number = number
        else:
            self._sent_on = True
            os.kill(os.getpid(), signal.SIGTERM)
