"""A nano run, its models in memory, and real servers for them on loopback."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

import jax
import pytest

from pit_jax.serving.loaded import Models
from pit_jax.sharding.mesh import make_mesh
from pit_jax.stages import improve as improve_module
from pit_jax.stages import run as run_module

from . import nano


@pytest.fixture(scope="session", autouse=True)
def one_device() -> Iterator[None]:
    """Let runs use one of the fake devices: four take turns on the cores there are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_module, improve_module):
            patch.setattr(module, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, one_device: None) -> pathlib.Path:
    """The directory of a finished run; tests must leave it as it is."""
    return nano.make_run(tmp_path_factory.mktemp("serving") / "nano")


@pytest.fixture(scope="session")
def models(run_dir: pathlib.Path) -> Models:
    """The run in memory, at most four rows to a batch."""
    return Models(str(run_dir), 4)
