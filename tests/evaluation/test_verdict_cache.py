"""Nothing is paid twice: not after kill -9, not by two processes, not for a line that was cut short."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from pit_jax.core.errors import DataError
from pit_jax.evaluation.endpoint import Endpoint
from pit_jax.evaluation.endpoint_config import Budget, EndpointConfig
from pit_jax.evaluation.llm_judge import REPLIES
from pit_jax.evaluation.verdict_cache import ReplyCache, key_of

from .chat_server import ChatServer, Turn

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(__file__).with_name("asking_program.py")
KEY = key_of({"question": 1})


def start(server: ChatServer, directory: pathlib.Path, count: int, concurrency: int = 4) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), server.url, str(directory), str(count), str(concurrency)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> list[float]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


def lines(directory: pathlib.Path) -> int:
    path = directory / REPLIES
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


class Gate:
    """Answers the first `free` questions, and all of them once it is open; counts what was answered."""

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
        else:
            turn.reply("[[A]]" if "Answer]\none" in turn.call.text.partition("Assistant B")[0] else "[[B]]")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_answered_question_is_asked_again_after_a_kill(tmp_path, end):
    gate = Gate(free=21)
    with ChatServer(gate) as server:
        process = start(server, tmp_path, 30)
        wait_until(lambda: lines(tmp_path) == 21 and server.busy == 4)
        process.send_signal(end)
        _, err = process.communicate(timeout=20)
        assert process.returncode != 0
        assert end == signal.SIGKILL or "replies so far are kept" in err
        assert len(gate.answered) == 21 == lines(tmp_path)
        gate.open.set()
        assert finished(start(server, tmp_path, 30)) == [1.0] * 30
    # 30 questions in two orders, each answered, and so paid for, exactly once.
    assert len(gate.answered) == len(set(gate.answered)) == 60
    assert lines(tmp_path) == 60


def test_two_processes_pay_once_and_get_the_same(tmp_path):
    gate = Gate(free=0)
    gate.open.set()

    def slow(turn: Turn) -> None:
        time.sleep(0.01)
        gate(turn)

    with ChatServer(slow) as server:
        processes = [start(server, tmp_path, 60, concurrency) for concurrency in (3, 8)]
        first, second = map(finished, processes)
    assert first == second == [1.0] * 60
    assert len(gate.answered) == len(set(gate.answered)) == 120


def test_two_threads_with_caches_of_their_own_pay_once(tmp_path):
    with ChatServer(lambda turn: (time.sleep(0.01), turn.reply("ok"))) as server:
        config = EndpointConfig(base_url=server.url, model="judge")
        asked = [[{"role": "user", "content": str(i)}] for i in range(30)]

        def work() -> None:
            with ReplyCache(tmp_path / REPLIES) as cache:
                assert all(reply.ok for reply in Endpoint(config, cache, progress=False).ask(asked))
                done.append(None)

        done: list[None] = []
        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert len(done) == 3 and max(server.seen.values()) == 1


def test_everything_that_decides_the_answer_is_in_the_key(tmp_path):
    base = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "max_tokens": 10, "temperature": 0.0}
    changes = [{}, {"model": "n"}, {"max_tokens": 11}, {"temperature": 1.0}, {"top_p": 0.5}, {"seed": 1},
               {"extra": {"reasoning_effort": "low"}}, {"base_url": "http://127.0.0.1:2/v1"}]  # fmt: skip
    asked = [[{"role": "user", "content": "q"}]]
    keys = [Endpoint(EndpointConfig(**base | change))._jobs(asked, None, 0)[0][0] for change in changes]
    plain = Endpoint(EndpointConfig(**base))
    keys += [plain._jobs(asked, {"type": "json_object"}, 0)[0][0], plain._jobs(asked, None, 1)[0][0]]
    keys += [plain._jobs([[{"role": "system", "content": "q"}]], None, 0)[0][0]]
    assert len(set(keys)) == len(keys)
    assert keys[0] == Endpoint(EndpointConfig(**base, key_env="OTHER"))._jobs(asked, None, 0)[0][0]


def test_a_known_reply_is_free_and_needs_neither_server_nor_budget_nor_key(tmp_path):
    asked = [[{"role": "user", "content": "q"}]]
    with ChatServer(lambda turn: turn.reply("paid")) as server, ReplyCache(tmp_path / REPLIES) as cache:
        url = server.url
        assert Endpoint(EndpointConfig(base_url=url, model="m"), cache, progress=False).ask(asked)[0].text == "paid"
    with ReplyCache(tmp_path / REPLIES) as cache:
        config = EndpointConfig(base_url=url, model="m", key_env="NOT_SET_ANYWHERE", budget=Budget(tokens=0))
        endpoint = Endpoint(config, cache)
        assert endpoint.estimate(asked).known == 1 and endpoint.estimate(asked).tokens.total == 0
        reply = endpoint.ask(asked)[0]
    assert reply.text == "paid" and reply.known and endpoint.usage.spent.total == 0 and endpoint.usage.known == 1


def test_failures_are_not_kept(tmp_path):
    def better_the_second_time(turn: Turn) -> None:
        turn.status(400, "{}") if turn.attempt == 0 else turn.reply("now")

    with ChatServer(better_the_second_time) as server, ReplyCache(tmp_path / REPLIES) as cache:
        endpoint = Endpoint(EndpointConfig(base_url=server.url, model="m"), cache, progress=False)
        asked = [[{"role": "user", "content": "q"}]]
        assert not endpoint.ask(asked)[0].ok
        assert endpoint.ask(asked)[0].text == "now"


@pytest.mark.parametrize("text", ["plain", "line\nbreak\r\u2028\x85", "ünï漢字\U0001f600", "half \ud83d of a pair", ""])
def test_any_text_comes_back_as_it_was(tmp_path, text):
    with ReplyCache(tmp_path / "a" / "b.jsonl") as cache:
        cache.put(KEY, {"text": text, "finish": "stop"})
        assert cache.get(KEY) == {"key": KEY, "text": text, "finish": "stop"}
    with ReplyCache(tmp_path / "a" / "b.jsonl") as cache:
        assert len(cache) == 1 and cache.get(KEY)["text"] == text and cache.get(key_of({})) is None


@pytest.mark.parametrize("rest", [b'{"key": "ab', b"\x00\xff\xfe", b'{"key": 3, "text": "x"}\n', b"[]\n", b"7"])
def test_lines_that_are_no_replies_are_skipped_and_said(tmp_path, caplog, rest):
    path = tmp_path / REPLIES
    with ReplyCache(path) as cache:
        cache.put(KEY, {"text": "one"})
    with path.open("ab") as file:
        file.write(rest)
    other = key_of({"question": 2})
    with ReplyCache(path) as cache:
        cache.put(other, {"text": "two"})
        assert cache.get(other)["text"] == "two"
    caplog.set_level(logging.WARNING)
    with ReplyCache(path) as cache:
        assert len(cache) == 2 and cache.get(KEY)["text"] == "one" and cache.get(other)["text"] == "two"
    assert "1 lines are no replies" in caplog.text


def test_a_cache_sees_what_another_appends(tmp_path):
    with ReplyCache(tmp_path / REPLIES) as one, ReplyCache(tmp_path / REPLIES) as two:
        one.put(KEY, {"text": "x"})
        assert two.get(KEY)["text"] == "x"
        with one.claim(KEY) as mine, two.claim(KEY) as theirs:
            assert mine and not theirs
        with two.claim(KEY) as free:
            assert free


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / REPLIES
    with ReplyCache(path) as cache:
        cache.put(KEY, {"text": "one"})
        full = pathlib.Path("/dev/full")
        if not full.exists():
            pytest.skip("no /dev/full here")
        kept, cache._file = cache._file, os.open(full, os.O_RDWR)
        with pytest.raises(DataError, match="No space left"):
            cache.put(key_of({}), {"text": "two"})
        os.close(cache._file)
        cache._file = kept
        assert cache.get(KEY)["text"] == "one"


def test_a_remote_cache_is_refused():
    with pytest.raises(DataError, match="disk of this machine"):
        ReplyCache("gs://bucket/replies.jsonl")
