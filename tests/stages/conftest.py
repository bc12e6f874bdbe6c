"""One finished pipeline, shared by the tests of the stages."""

from __future__ import annotations

import pathlib

import pytest

from . import small


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a finished run; tests must leave it as it is."""
    directory = tmp_path_factory.mktemp("run") / "whole"
    with small.devices(1):
        small.recipe(directory).run()
    return directory
