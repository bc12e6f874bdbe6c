"""SRT's data are asked of a real server by a real process, which is killed: nothing is paid twice."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import pytest

from pit_jax.data.synthetic import critique, rating
from pit_jax.srt.critics import REPLIES
from pit_jax.stages.pipeline import Recipe

from ..evaluation.chat_server import ChatServer, Turn
from . import small, srt_small

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with a base model that can end a response, and the records of a program as the critic."""
    directory = tmp_path_factory.mktemp("base") / "run"
    stages = (small.sft("policy", training=srt_small.training(20)), srt_small.data())
    with small.devices(1):
        Recipe(model_dir=str(directory), seed=0, experiment=srt_small.experiment(), stages=stages).run()
    return directory


class Gate:
    """A critic's server: answers the first `free` questions, and all of them once it is open; counts the answered."""

    def __init__(self, free: int) -> None:
        self.free, self.open = free, threading.Event()
        self.answered: list[str] = []
        self._mutex = threading.Lock()

    def __call__(self, turn: Turn) -> None:
        with self._mutex:
            let_through = self.open.is_set() or len(self.answered) < self.free
            if let_through:
                self.answered.append(turn.call.text)
        if not let_through:
            turn.stall()
            return
        prompt, _, rest = turn.call.text.removeprefix("[Instruction]\n").partition("\n\n[Response]\n")
        response = rest.partition("\n\n[Your task]")[0]
        asks_for_critique = "### Improved Response" in rest
        turn.reply(critique(prompt, response) if asks_for_critique else f"[[{rating(prompt, response)}]]")


def start(directory: pathlib.Path, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.stages.srt_data_program", str(directory), url]
    settings = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}  # pyright: ignore
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, text=True, stderr=subprocess.PIPE)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 1.7], ids=["critiques", "scores"])
def test_after_kill_9_no_answered_question_is_asked_again(
    base: pathlib.Path, tmp_path: pathlib.Path, share: float
) -> None:
    copied = pathlib.Path(shutil.copytree(base, tmp_path / "run"))
    expected = (base / "srt_data" / "records.jsonl").read_text()
    shutil.rmtree(copied / "srt_data")
    kept = len(expected.splitlines())
    assert kept > 20
    free = int(share * kept)
    gate, replies = Gate(free), copied / "srt_data" / "critic" / REPLIES
    with ChatServer(gate) as server:
        process = start(copied, server.url)
        wait_until(lambda: replies.exists() and replies.read_bytes().count(b"\n") == free and server.busy, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
        assert len(gate.answered) == free and not (copied / "srt_data" / "records.jsonl").exists()
        gate.open.set()
        process = start(copied, server.url)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert len(gate.answered) == len(set(gate.answered)), "every question was answered, and so paid for, exactly once"
    # The same critic by program and by server, with and without a kill: the same records.
    assert (copied / "srt_data" / "records.jsonl").read_text() == expected
    drafts, refined = set(), set()
    for record in map(json.loads, expected.splitlines()):
        drafts.add((record["prompt"], record["response"]))
        refined.add((record["prompt"], record["refinement"]))
    assert len(gate.answered) == len(drafts) + len(drafts | refined)
