"""One finished pipeline, shared by the tests of the stages."""

from __future__ import annotations

import fcntl
import pathlib

import pytest

from . import small


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a finished run; tests must leave it as it is."""
    base = tmp_path_factory.getbasetemp()
    # The processes of pytest-xdist have directories side by side: the first that needs the run makes it for all.
    directory = (base.parent if base.name.startswith("popen-") else base) / "whole"
    with (directory.parent / "whole.lock").open("w") as lock, small.devices(1):
        fcntl.flock(lock, fcntl.LOCK_EX)
        small.recipe(directory).run()
    return directory
