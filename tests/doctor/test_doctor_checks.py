"""Each of the doctor's checks finds what it is for, says what to do, and is content otherwise."""

from __future__ import annotations

import io
import json
import os
import pathlib
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from pit_jax.cli import doctor
from pit_jax.doctor import devices, machine, report, storage, versions
from pit_jax.doctor.machine import Accelerators
from pit_jax.doctor.report import Check
from pit_jax.sharding.mesh import MeshConfig

ROOT = pathlib.Path(__file__).parents[2]
TPU = Accelerators(tpus=4, tpu="v5p")
GPU = Accelerators(gpus=True)
NONE = Accelerators()
GOOD = {"python": "3.12.1", "jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12.9", "numpy": "2.4.0"}


def _statuses(checks: list[Check]) -> list[str]:
    return [check.status for check in checks]


def test_installed_versions_fit_together() -> None:
    found = versions.installed()
    assert found["jax"] == jax.__version__
    assert not [check for check in versions.check_versions(found) if check.status == "problem"]


def test_missing_packages_are_named() -> None:
    found = {name: version for name, version in versions.installed().items() if name not in ("optax", "seqio")}
    checks = {check.name: check for check in versions.check_versions(found)}
    assert checks["packages"].status == "problem" and "optax" in checks["packages"].found
    assert (
        checks["optional packages"].status == "ok" and "seqio (live SeqIO tasks)" in checks["optional packages"].found
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"jax": "0.11.2", "flax": "0.12.8"}, "flax up to 0.12.8"),
        ({"jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"}, "two CUDA plugins"),
    ],
)
def test_known_bad_pairs(changed: dict[str, str], said: str) -> None:
    found = [check for check in versions.check_versions(GOOD | changed) if said in check.found]
    assert len(found) == 1 and found[0].status == "problem" and found[0].fix
    assert not [check for check in versions.check_versions(GOOD) if said in check.found]


@pytest.mark.parametrize(("package", "extra"), [("libtpu", "tpu"), ("jax-cuda13-plugin", "cuda13")])
def test_plugins_must_be_those_that_jax_asks_for(package: str, extra: str) -> None:
    lines = map(Requirement, metadata.requires("jax") or [])
    wanted = next(one for one in lines if one.name == package and f'"{extra}"' in str(one.marker))
    found = versions.installed() | {package: "0.0.1"}
    (wrong,) = [check for check in versions.check_versions(found) if package in check.fix]
    assert wrong.status == "problem" and wrong.fix == f"pip install '{package}{wanted.specifier}'"


def test_a_jaxlib_that_jax_refuses() -> None:
    found = versions.installed() | {"jaxlib": "0.4.30"}
    assert [
        check
        for check in versions.check_versions(found)
        if "jaxlib 0.4.30" in check.found or "0.4.30 is" in check.found
    ]


def test_supported_python_is_that_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert SpecifierSet(doctor.SUPPORTED_PYTHON) == SpecifierSet(declared)
    assert versions.check_python("3.11.7", declared).status == "ok"
    assert versions.check_python("3.13.0", declared).status == "warning"


def test_hosts_with_other_versions_are_named() -> None:
    (same,) = versions.differing({0: GOOD, 1: GOOD})
    assert same.status == "ok"
    (other,) = versions.differing({0: GOOD, 1: GOOD | {"flax": "0.12.10"}, 2: {**GOOD, "libtpu": "0.0.42"}})
    assert other.status == "problem"
    assert "flax: process 1 has 0.12.10, process 0 0.12.9" in other.found
    assert "libtpu: process 2 has 0.0.42, process 0 not installed" in other.found


@pytest.mark.parametrize(
    ("there", "packages", "environment", "status", "said"),
    [
        (NONE, (), {}, "ok", "no accelerators"),
        (TPU, ("libtpu",), {}, "ok", "4 TPU chips (v5p)"),
        (TPU, (), {}, "problem", "libtpu"),
        (TPU, ("libtpu",), {"JAX_PLATFORMS": "cpu"}, "warning", "hides"),
        (GPU, ("jax-cuda13-plugin",), {}, "ok", "NVIDIA"),
        (GPU, (), {}, "problem", "CPU only"),
        (GPU, (), {"JAX_PLATFORMS": "cpu"}, "warning", "CPU only"),
        (GPU, ("jax-cuda12-plugin",), {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}, "warning", "LD_LIBRARY_PATH"),
        (NONE, ("libtpu",), {"JAX_PLATFORMS": "tpu"}, "problem", "JAX_PLATFORMS=tpu"),
        (NONE, (), {"JAX_PLATFORMS": "cuda,cpu"}, "problem", "JAX_PLATFORMS=cuda"),
        (NONE, (), {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "warning", "fake"),
    ],
)
def test_accelerators_that_jax_would_not_see(
    there: Accelerators, packages: tuple[str, ...], environment: dict[str, str], status: str, said: str
) -> None:
    (check,) = machine.check_platform(there, packages, environment)
    assert check.status == status
    assert said in check.found
    assert bool(check.fix) == (status != "ok")


def test_accelerators_are_found_on_the_bus(tmp_path: pathlib.Path) -> None:
    for index, (vendor, device) in enumerate([("0x1ae0", "0x0062"), ("0x1ae0", "0x0062"), ("0x1ae0", "0x0042")]):
        folder = tmp_path / "sys" / "bus" / "pci" / "devices" / str(index)
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    assert machine.find_accelerators(tmp_path) == TPU.__class__(tpus=2, tpu="v5p")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert machine.find_accelerators(tmp_path).gpus


def test_low_limits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _statuses(machine.check_limits(NONE)) == ["ok"]
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, 256))
    found = machine.check_limits(TPU)
    assert _statuses(found) == ["warning", "warning"]
    assert "ulimit -n" in found[0].fix and "memlock" in found[1].fix


def test_compilation_cache(tmp_path: pathlib.Path) -> None:
    def status(cache: str | None) -> str:
        return next(check.status for check in machine.check_folders(cache) if check.name == "compilation cache")

    assert status(str(tmp_path)) == "ok"
    assert status("gs://bucket/cache") == "ok"
    assert status(None) == "warning"
    assert status(str(tmp_path / "missing")) == "warning"


def test_tensorflow_beside_gpus() -> None:
    assert machine.check_tensorflow(NONE, ("tensorflow",), {}) == []
    assert _statuses(machine.check_tensorflow(GPU, ("tensorflow",), {})) == ["ok"]


def test_storage_is_left_as_it_was(tmp_path: pathlib.Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "new/run"):
        checks = storage.check_storage(str(tmp_path / name))
        assert checks[0].status == "ok" and checks[0].name == "storage"
        assert checks[1].name == "free disk"
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_hosts_that_make_and_remove_one_folder_do_not_disturb_each_other(tmp_path: pathlib.Path) -> None:
    directory = str(tmp_path / "new" / "run")
    with ThreadPoolExecutor(4) as hosts:
        found = list(hosts.map(storage.check_storage, [directory] * 40))
    assert {checks[0].status for checks in found} == {"ok"}
    assert not (tmp_path / "new").exists()


def test_storage_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    (check,) = storage.check_storage(str(tmp_path / "file" / "run"))
    assert check.status == "problem" and check.fix


def test_kind_of_disk(tmp_path: pathlib.Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda / ext4 rw 0 0\nnone /mnt tmpfs rw 0 0\nserver:/x /mnt/nfs nfs4 rw 0 0\n")
    kinds = [storage.file_system(pathlib.Path(path), mounts) for path in ("/home/a", "/mnt/b", "/mnt/nfs/c", "/mnt2")]
    assert kinds == ["ext4", "tmpfs", "nfs4", "ext4"]
    assert storage.file_system(tmp_path, tmp_path / "missing") == ""


def test_clocks() -> None:
    assert devices.judge_clocks([10.0, 10.2, 9.9]).status == "ok"
    late = devices.judge_clocks([10.0, 20.0, 10.1])
    assert late.status == "warning" and "process 1" in late.found
    assert devices.judge_clocks([10.0, 10.0, 100.0]).status == "problem"


def test_mesh_against_devices() -> None:
    assert devices.check_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()).found == "fsdp=2, tensor=2 over 4 devices"
    wrong = devices.check_mesh(MeshConfig(data=1, fsdp=3), jax.devices())
    assert wrong.status == "problem" and "4 devices" in wrong.found


def test_collective() -> None:
    check = devices.collective(jax.devices())
    assert check.status == "ok"
    assert "over 4 devices" in check.found and "GB/s" in check.found
    assert devices.collective(jax.devices()[:1]).status == "ok"


def test_a_wrong_or_slow_sum_is_seen() -> None:
    right, wrong = np.full(8, 10.0, np.float32), np.full(8, 9.0, np.float32)
    assert devices.judge_collective(4, 2**26, 1e-3, right, "gpu").status == "ok"
    assert devices.judge_collective(4, 2**26, 1.0, right, "gpu").status == "warning"
    assert devices.judge_collective(4, 2**26, 1.0, right, "cpu").status == "ok"
    assert devices.judge_collective(4, 2**26, 1e-3, wrong, "gpu").status == "problem"


def test_bandwidth_is_that_of_the_links() -> None:
    total = np.full(8, 10.0, np.float32)
    assert "1.50 GB/s" in devices.judge_collective(4, 10**9, 1.0, total, "gpu").found


def test_report_as_table_and_as_json() -> None:
    checks = [
        report.ok("a", "fine"),
        report.warning("b", "so so", "do this"),
        Check(name="c", status="problem", found="bad", fix="do that", host=3),
    ]
    data = json.loads(report.as_json(checks))
    assert (data["ok"], data["problems"], data["warnings"]) == (False, 1, 1)
    assert [report.from_dict(entry) for entry in data["checks"]] == checks
    out = io.StringIO()
    report.print_table(checks, Console(file=out, width=80))
    assert "host 3: bad" in out.getvalue() and "do this" in out.getvalue()
    assert "1 problem, 1 warning" in out.getvalue()


def test_encoding() -> None:
    assert machine.check_encoding().name == "encoding"
    assert machine.check_encoding().status == ("ok" if os.environ.get("PYTHONIOENCODING") is None else "warning")
