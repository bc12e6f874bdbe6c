"""No process outlives the test that has started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .together import STARTED


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    while STARTED:
        host = STARTED.pop()
        if host.process.poll() is None:
            host.kill()
