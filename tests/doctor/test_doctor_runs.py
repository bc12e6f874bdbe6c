"""`pit-jax doctor` as it is run: alone, on several hosts, without gin, and where something hangs or dies."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest

from pit_jax.doctor import probe

ROOT = pathlib.Path(__file__).parents[2]


def _environment(tmp_path: pathlib.Path, **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    here = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return plain | here | more


def _start(tmp_path: pathlib.Path, *words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pit_jax", "doctor", "--json", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path, **more), cwd=tmp_path,
    )  # fmt: skip


def _report(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, _ = process.communicate(timeout=120)
    return process.returncode, json.loads(out) if out else {}


def _checks(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [check for check in report["checks"] if check["name"] == name]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_alone_with_a_recipe(tmp_path: pathlib.Path) -> None:
    settings = ("--gin_file=recipes/demo.gin", f"--gin.MODEL_DIR='{tmp_path / 'run'}'")
    status, report = _report(_start(tmp_path, *settings, JAX_NUM_CPU_DEVICES="2"))
    assert status == 0 and report["ok"]
    names = [check["name"] for check in report["checks"]]
    assert names[-5:] == ["storage", "free disk", "devices", "mesh", "collective"]
    assert _checks(report, "mesh")[0]["found"] == "data=2 over 2 devices"
    assert _checks(report, "platform")[0]["status"] == "warning", "fake devices are told"
    assert not (tmp_path / "run").exists()


def test_problems_give_status_1_and_the_rest_is_still_looked_at(tmp_path: pathlib.Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()
    words = ("--gin_file=recipes/no_such.gin", f"--model_dir={blocked}", "--mesh=fsdp=3")
    status, report = _report(_start(tmp_path, *words))
    assert status == 1 and report["problems"] == 3
    found = {check["name"]: check["status"] for check in report["checks"]}
    assert (found["recipe"], found["storage"], found["mesh"]) == ("problem", "problem", "problem")
    assert found["devices"] == found["collective"] == "ok"


def test_hosts_report_to_process_0(tmp_path: pathlib.Path) -> None:
    shared = f"--model_dir={tmp_path / 'run'}"
    hosts = (shared, f"--coordinator_address=127.0.0.1:{_port()}", "--process_count=2", "--mesh=data=2", "--timeout=40")
    other = _start(tmp_path, *hosts, "--process_id=1", LD_LIBRARY_PATH="", LC_ALL="C", PYTHONIOENCODING="latin-1")
    status, report = _report(_start(tmp_path, *hosts, "--process_id=0"))
    assert status == 0, [check for check in report["checks"] if check["status"] != "ok"]
    assert "2 processes" in _checks(report, "hosts")[0]["found"]
    assert {check["name"] for check in report["checks"]} >= {"clocks", "same versions", "shared storage"}
    assert _checks(report, "collective")[0]["found"].startswith("sum of 1 MiB over 2 devices")
    foreign = [check for check in report["checks"] if check["host"] == 1]
    assert [check["name"] for check in foreign] == ["encoding"]
    assert _report(other) == (0, {}), "only process 0 prints"
    assert not (tmp_path / "run").exists()


def test_one_host_without_storage_does_not_keep_the_others_waiting(tmp_path: pathlib.Path) -> None:
    (tmp_path / "blocked").touch()
    hosts = (f"--coordinator_address=127.0.0.1:{_port()}", "--process_count=2", "--timeout=40")
    other = _start(tmp_path, *hosts, "--process_id=1", f"--model_dir={tmp_path / 'blocked'}")
    status, report = _report(_start(tmp_path, *hosts, "--process_id=0", f"--model_dir={tmp_path / 'run'}"))
    assert status == 1, "a problem of any host is one of the job"
    assert [check["host"] for check in _checks(report, "storage")] == [None, 1]
    assert not _checks(report, "shared storage")
    assert _report(other)[0] == 1


def test_a_host_that_does_not_come(tmp_path: pathlib.Path) -> None:
    hosts = (f"--coordinator_address=127.0.0.1:{_port()}", "--process_count=2", "--process_id=0", "--timeout=3")
    status, report = _report(_start(tmp_path, *hosts))
    assert status == 1
    (check,) = _checks(report, "hosts")
    assert "did not all come together" in check["found"]
    assert "every host" in check["fix"]


def test_wrong_flags(tmp_path: pathlib.Path) -> None:
    for words in (("--mesh=fsd=2",), ("--process_count=2",)):
        process = _start(tmp_path, *words)
        out, said = process.communicate(timeout=60)
        assert process.returncode == 1 and out == ""
        assert words[0].lstrip("-").split("=")[0] in said


def test_without_gin_and_tensorflow(tmp_path: pathlib.Path) -> None:
    for name in ("gin", "tensorflow", "seqio", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    status, report = _report(_start(tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"))
    assert status == 0 and report["ok"]
    status, report = _report(
        _start(tmp_path, "--gin_file=recipes/demo.gin", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    )
    assert status == 1
    assert "gin" in _checks(report, "recipe")[0]["found"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('import time; print(\'{"begin": "collective"}\', flush=True); time.sleep(60)', "no answer within 1 s"),
        ('import os; print(\'{"begin": "collective"}\', flush=True); os.abort()', "ended with status -6"),
        (
            'import sys; print(\'{"begin": "collective"}\', flush=True);'
            "sys.stderr.write('F1121 05:05:25 1 client.h] Bad. absl::Status: NO LINK\\n@ 0x1 main()\\n'); sys.exit(3)",
            "ended with status 3. NO LINK",
        ),
    ],
)
def test_a_probe_that_hangs_or_dies_is_reported(monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(probe.subprocess, "Popen", lambda _, **rest: popen([sys.executable, "-c", script], **rest))
    (check,) = probe.run({"kind": "devices"}, 1.0).checks
    assert check.status == "problem" and check.name == "collective"
    assert said in check.found
    assert "@ 0x1" not in check.found
    assert check.fix == probe.FIXES["collective"]
