"""`pit-jax serve` as a process: flags, key, warm-up, SIGTERM."""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from pit_jax.cli import serve
from pit_jax.core.errors import ConfigError
from pit_jax.serving.settings import Batching, Limits, Serving

from .hosting import ASK, CHAT, Host, until

PROGRAM = """
import argparse, sys
from pit_jax.cli import environment, serve
parser = argparse.ArgumentParser()
serve.add_flags(parser)
environment.set_up_logging()
serve.serve(parser.parse_args())
"""


class Process(Host):
    """A server in a process of its own."""

    def __init__(self, port: int) -> None:
        self.port = port


@pytest.mark.slow
def test_a_process_serves_and_ends_by_sigterm(run_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, f"--checkpoint={run_dir}", "--port=0", "--max-batch=1", "--name=nano"]
    environment = os.environ | {"PIT_TEST_KEY": "s3cret\n", "JAX_PLATFORMS": "cpu"}
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--api-key-env=PIT_TEST_KEY"], stderr=file, env=environment)
    try:
        until(lambda: process.poll() is not None or b"/v1" in log.read_bytes(), 120)
        found = re.search(r"http://127.0.0.1:(\d+)/v1", log.read_text())
        assert found is not None, log.read_text()
        host = Process(int(found[1]))
        until(lambda: process.poll() is not None or host.get("/ready").status == 200, 300)
        assert host.post(CHAT, ASK).status == 401
        assert host.post(CHAT, ASK, authorization="Bearer s3cret").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "compiled" in log.read_text() and "s3cret" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def _args(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_flags(parser)
    return parser.parse_args(["--checkpoint=nowhere", *words])


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--port=70000", "Serving.port"),
        ("--max-batch=0", "Batching.max_batch"),
        ("--batches=0", "Batching.running"),
        ("--linger=-1", "Batching.linger"),
        ("--patience=-1", "Batching.patience"),
        ("--max-body=0", "Limits.body"),
        ("--max-prompt=0", "Limits.prompt"),
        ("--timeout=0", "Limits.seconds"),
        ("--drain=-1", "Serving.drain"),
        ("--iterations=9", "Limits.iterations = 8"),
        ("--candidates=0", "Serving.candidates"),
        ("--temperature=nan", "Serving.temperature"),
        ("--max-tokens=0", "Serving.max_tokens"),
        ("--api-key-env=PIT_NO_SUCH_KEY", "has no PIT_NO_SUCH_KEY"),
    ],
)
def test_bad_flags_are_named_before_anything_is_loaded(flag: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        serve.serve(_args(flag))


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pit_jax.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"uvicorn.*pit_jax\[serve\]"):
        serve.serve(_args())


def test_settings_check_themselves_and_hide_the_key() -> None:
    for text, local in (("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("pit", False)):
        assert Serving(checkpoint="x", host=text).is_local == local
    assert "s3cret" not in repr(Serving(checkpoint="x", api_key="s3cret"))
    with pytest.raises(ConfigError, match="api_key"):
        Serving(checkpoint="x", api_key="")
    with pytest.raises(ConfigError, match=r"Batching\.piece"):
        Batching(piece=0.0)
    with pytest.raises(ConfigError, match=r"Limits\.rows = 0"):
        Limits(rows=0)
