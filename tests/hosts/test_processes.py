"""Several real processes: what they do together, and what the others say when one is gone."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from pit_jax.core.errors import ConfigError
from pit_jax.core.rng import key_for
from pit_jax.sharding import processes
from pit_jax.sharding.place import fetch, put_batch
from pit_jax.sharding.processes import Cluster, cluster

from . import scene
from .together import Host, free_port, spawn


def play(name: str, directory: pathlib.Path, count: int, *, started: int | None = None) -> list[Host]:
    """Start a scene on `count` processes with one device each, `started` of which exist."""
    port = free_port()
    hosts = []
    for number in range(started or count):
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_PROCESS_COUNT": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        command = [sys.executable, str(pathlib.Path(scene.__file__)), name, str(directory / f"{number}.json")]
        hosts.append(spawn(command, directory / f"{number}.log", devices=1, environment=environment))
    return hosts


def results(directory: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """Return what the processes have written."""
    return [json.loads((directory / f"{number}.json").read_text()) for number in range(count)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of the scene in which all goes well."""
    directory = tmp_path_factory.mktemp("four")
    hosts = play("everything", directory, 4)
    for host in hosts:
        assert host.wait(120) == 0, host.said()
    return results(directory, 4)


def test_every_process_knows_its_place(four: list[dict[str, Any]]) -> None:
    assert [result["number"] for result in four] == [0, 1, 2, 3]
    assert all(result["count"] == 4 and result["devices"] == [4, 1] for result in four)
    assert all(result["gathered"] == [{"me": number} for number in range(4)] for result in four)


def test_process_0_works_for_all_and_its_errors_reach_all(four: list[dict[str, Any]]) -> None:
    assert [result["worked"] for result in four] == [1, 0, 0, 0]
    assert all(result["first"] == [0, "done"] for result in four)
    assert all(result["refused"] == "ConfigError: x = 1 must be 2. Set it." for result in four)


def test_the_process_that_differs_is_named_everywhere(four: list[dict[str, Any]]) -> None:
    assert all(result["agreed"] == "no error" for result in four)
    for result in four:
        assert result["differs"].startswith("ProcessError: settings: process 2 (")
        assert "in same.1.deep: 3, not 2" in result["differs"]


def test_a_barrier_names_who_is_missing(four: list[dict[str, Any]]) -> None:
    assert four[3]["absent"] == "no error"
    for result in four[:3]:
        missing, _, present = result["absent"].partition("did not come within 1 s")
        assert missing.startswith("AbsentError: compilation: process 3 (") and "process 0" not in missing
        assert all(f"process {number} (" in present for number in (0, 1, 2))


def test_arrays_are_those_of_one_process(four: list[dict[str, Any]]) -> None:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key_for(0, "rows"), np.arange(8))
    drawn = scene.ROWS + np.asarray(jax.vmap(jax.random.normal)(keys))[:, None]
    params = jax.random.normal(key_for(0, "init"), (4, 2))
    for result in four:
        assert result["shards"] == [[2, 3]]
        np.testing.assert_array_equal(result["arrays"]["rows"], scene.ROWS)
        np.testing.assert_allclose(result["arrays"]["drawn"], drawn, rtol=1e-6)
        np.testing.assert_allclose(result["arrays"]["params"]["w"], params, rtol=1e-6)


def test_a_directory_that_is_not_shared_is_found_out(four: list[dict[str, Any]]) -> None:
    for result in four:
        assert result["common"] == "no error"
        assert "is not shared: process 3 (" in result["apart"] and "gs://" in result["apart"]


def test_an_error_of_one_process_ends_the_others_with_its_reason(tmp_path: pathlib.Path) -> None:
    hosts = play("failing", tmp_path, 3)
    assert [host.wait(60) for host in hosts] == [7, 7, 7]
    for host in (hosts[0], hosts[2]):
        assert "has ended: the data of step 3 cannot be read" in host.said()


def test_a_killed_process_is_named_by_the_others(tmp_path: pathlib.Path) -> None:
    hosts = play("dying", tmp_path, 3)
    assert hosts[2].wait(60) == -signal.SIGKILL
    for host in hosts[:2]:
        assert host.wait(60) == processes.EXIT_LOST, host.said()
        assert "process 2 (" in host.said() and "no sign of life for 3 s" in host.said()


def test_flags_win_over_the_environment() -> None:
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}
    assert cluster(Cluster(), environment) == Cluster(coordinator="a:1", count=3, process=1)
    settings = Cluster(coordinator="b:2", count=4, process=0, silence=5.0)
    assert cluster(settings, environment) == settings


def test_a_process_on_its_own_joins_nobody() -> None:
    assert cluster(Cluster(), {"JAX_PLATFORMS": "cpu"}) is None
    assert cluster(Cluster(coordinator="a:1", count=1, process=0), {}) is None
    # `salloc` and `sbatch` set some of SLURM's variables; only `srun` starts tasks.
    assert cluster(Cluster(), {"JAX_PLATFORMS": "cpu", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None
    assert processes.gather("x", 1) == [1]
    assert processes.first("x", lambda: 2) == 2
    processes.agree("x", object())
    processes.leave(0, "done")


SLURM = dict(SLURM_JOB_ID="1", SLURM_NTASKS="4", SLURM_PROCID="2", SLURM_LOCALID="0", SLURM_STEP_NODELIST="n")


@pytest.mark.parametrize(
    "environment",
    [SLURM, {"OMPI_COMM_WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_NUM_SLICES": "2"}],
)
def test_launchers_are_recognised(environment: dict[str, str]) -> None:
    assert cluster(Cluster(), environment) == Cluster()


@pytest.mark.parametrize(
    ("settings", "environment", "told"),
    [
        ({"count": 2}, {}, "given together"),
        ({"process": 1}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, "given together"),
        ({}, {"JAX_PROCESS_COUNT": "two"}, "JAX_PROCESS_COUNT = 'two' must be a whole number"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "a"}, "HOST:PORT"),
        ({"coordinator": "a:1", "count": 2, "process": 2}, {}, "process_id = 2 must lie in 0..process_count - 1"),
        ({"silence": 0.0}, {}, "process_timeout"),
    ],
)
def test_what_is_said_about_processes_must_make_sense(
    settings: dict[str, Any], environment: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        cluster(Cluster(**settings), {"JAX_PLATFORMS": "cpu", **environment})


def test_a_batch_must_be_divisible_by_the_devices() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ConfigError, match="divisible by data x fsdp = 4"):
        put_batch(np.zeros((6, 2)), mesh, row_axis=0)


def test_fetch_keeps_the_tree_and_takes_what_is_on_the_host() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    placed = put_batch(np.arange(8.0), mesh, row_axis=0)
    found = fetch({"a": (placed, 3), "b": np.ones(2, np.int8)})
    np.testing.assert_array_equal(found["a"][0], np.arange(8.0))
    assert found["a"][1] == 3 and found["b"].dtype == np.int8
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))


def test_a_process_that_waits_in_vain_says_so(tmp_path: pathlib.Path) -> None:
    hosts = play("alone", tmp_path, 2, started=1)
    assert hosts[0].wait(60) == processes.EXIT_LOST
    assert "process 0: after 4 s the processes have not come together" in hosts[0].said()
