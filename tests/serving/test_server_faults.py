"""What must not harm the server: bad requests, clients that leave, load, failing batches, and its own end."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import shutil
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest

from pit_jax.serving.batch import Batch
from pit_jax.serving.engine import Engine
from pit_jax.serving.loaded import Models
from pit_jax.serving.settings import Limits
from pit_jax.serving.work import EngineError
from pit_jax.text.codec import Codec

from .hosting import ASK, CHAT, SLOW, TEXT, Host, Reply, hosted, slow_pieces, until

POLICY = ASK | {"model": "nano/policy"}


@pytest.fixture(scope="module")
def host(models: Models) -> Iterator[Host]:
    with hosted(models, limits=Limits(body=20_000, choices=4)) as host:
        yield host


@pytest.fixture(scope="module")
def answer(host: Host) -> str:
    """What the server answers to `ASK`."""
    return _text(host.post(CHAT, ASK))


def _text(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]["content"]


def _head(line: str) -> str:
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{line}\r\n\r\n"


BAD_BODIES = [
    (b"", "not JSON"),
    (b'{"model": "nano"', "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[1, 2]", "a JSON list"),
    (b"[" * 19_000, "nested too deeply"),
    (b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    (ASK | {"messages": []}, "not empty"),
    (ASK | {"messages": "hello"}, "list of messages"),
    (ASK | {"messages": ["hello"]}, "must be an object"),
    (ASK | {"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
    (ASK | {"messages": [{"role": "assistant", "content": "x"}]}, "must end with a user's message"),
    (ASK | {"messages": [{"role": "user", "content": "  "}]}, "is empty"),
    (ASK | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
    (ASK | {"messages": [{"role": "user", "content": "x" * 1000}]}, "reads at most"),
    (ASK | {"messages": [*ASK["messages"], {"role": "assistant", "content": "x" * 200}]}, "Lengths.targets"),
    (ASK | {"pit_reference": "a", "messages": [*ASK["messages"], {"role": "assistant", "content": "b"}]}, "twice"),
    (ASK | {"model": None}, "model is missing"),
    (ASK | {"n": 0}, "n = 0 must be a whole number between 1 and 4"),
    (ASK | {"n": True}, "n = true"),
    (ASK | {"max_tokens": 0}, "max_tokens = 0"),
    (ASK | {"temperature": float("nan")}, "temperature = NaN"),
    (ASK | {"temperature": 3}, "between 0.0 and 2.0"),
    (ASK | {"top_p": 0}, "top_p"),
    (ASK | {"stop": ["a"] * 5}, "1 to 4 texts"),
    (ASK | {"stop": ""}, "not be empty"),
    (ASK | {"seed": 1.5}, "seed = 1.5"),
    (ASK | {"stream": "yes"}, "stream"),
    (ASK | {"logprobs": True}, "logprobs is not supported"),
    (ASK | {"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    (ASK | {"temprature": 1}, "Did you mean 'temperature'"),
    (ASK | {"pit": {"iterations": 99}}, "pit.iterations = 99"),
    (ASK | {"pit": {"iteration": 1}}, "Did you mean 'iterations'"),
    (ASK | {"pit": {"accept": "sometimes"}}, "gap, always"),
    (ASK | {"pit": 3}, "pit = 3 must be an object"),
    (ASK | {"pit": {"iterations": 0}, "pit_reference": "a"}, "nothing is to improve it"),
]


@pytest.mark.parametrize(("body", "named"), BAD_BODIES)
def test_malformed_bodies_are_refused_by_name(host: Host, answer: str, body: Any, named: str) -> None:
    reply = host.post(CHAT, body)
    assert reply.status == 400
    assert named in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert _text(host.post(CHAT, ASK)) == answer


def test_other_refusals_have_their_own_status(host: Host) -> None:
    assert host.post(CHAT, ASK, content_type="text/plain").status == 415
    assert host.post(CHAT, b"x" * 20_001).status == 413
    assert host.post("/v1/other", ASK).status == 404
    assert host.get(CHAT).status == 405
    assert host.post(CHAT, ASK | {"model": "gpt-4"}).status == 404
    assert host.post(CHAT, ASK, x_pit_iterations="many").error["param"] == "x-pit-iterations"
    assert host.post(CHAT, ASK, x_pit_candidates="9" * 5000).status == 400
    assert host.post(TEXT, {"model": "nano", "prompt": ["a"] * 3, "n": 2}).error["param"] == "n"
    many = ASK | {"n": 4, "pit": {"candidates": 16, "iterations": 1}}
    assert host.post(CHAT, many | {"n": 5}).error["param"] == "n"
    assert host.post(TEXT, {"model": "nano", "prompt": [1, 2]}).error["param"] == "prompt[0]"
    assert host.post(TEXT, {"model": "nano", "prompt": ""}).status == 400


def test_headers_and_body_choose_how_much_is_improved(host: Host) -> None:
    def steps(reply: Reply) -> int:
        assert reply.status == 200
        return len(reply.json["choices"][0]["pit"]["steps"])

    always = {"x_pit_accept": "always", "x_pit_iterations": "2"}
    assert steps(host.post(CHAT, ASK, **always)) == 2
    assert steps(host.post(CHAT, ASK | {"pit": {"iterations": 3}}, **always)) == 3
    assert steps(host.post(CHAT, ASK, x_pit_iterations="0")) == 0


def test_endless_bodies_are_cut_off(host: Host, answer: str) -> None:
    head = _head("Transfer-Encoding: chunked")
    with socket.create_connection(("127.0.0.1", host.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"5000\r\n" + b" " * 0x5000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert _text(host.post(CHAT, ASK)) == answer


def test_what_is_no_http_is_refused(host: Host, answer: str) -> None:
    with socket.create_connection(("127.0.0.1", host.port), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert _text(host.post(CHAT, ASK)) == answer


def test_clients_that_leave_are_dropped_from_the_batch(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_pieces(monkeypatch, 0.03)
    with hosted(models, batching=SLOW) as host, concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(host.post, CHAT, POLICY | {"max_tokens": 20})
        streamed = json.dumps(POLICY | {"stream": True, "seed": 2}).encode()
        for body in (streamed, json.dumps(ASK | {"seed": 3}).encode()):
            head = _head(f"Content-Length: {len(body)}")
            with socket.create_connection(("127.0.0.1", host.port), timeout=30) as connection:
                connection.sendall(head.encode() + body)
                until(lambda: host.metric("pit_requests_active") >= 1)
                if body is streamed:
                    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
                    assert b"data: " in connection.recv(1000)
        until(lambda: host.metric("pit_clients_gone_total") == 2)
        together = _text(other.result())
        until(lambda: host.metric("pit_batches_running") == 0)
        sampled = host.metric('pit_sampled_tokens_total{kind="policy"}')
        assert sampled < 20 + 2 * 90, "what nobody waits for is not sampled to its end"
        assert host.metric("pit_requests_active") == 0
        assert host.metric(f'pit_requests_total{{route="{CHAT}",status="499"}}') == 2
        assert _text(host.post(CHAT, POLICY | {"max_tokens": 20})) == together


def test_too_many_requests_are_sent_away_and_the_rest_is_answered(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_pieces(monkeypatch, 0.02)
    with (
        hosted(models, batching=SLOW, limits=Limits(requests=2)) as host,
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        replies = list(pool.map(lambda _: host.post(CHAT, POLICY), range(6)))
        refused = [reply for reply in replies if reply.status == 429]
        served = [reply for reply in replies if reply.status == 200]
        assert len(refused) == 4 and len({_text(reply) for reply in served}) == 1
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert refused[0].error["type"] == "rate_limit_error"
        assert host.post(CHAT, POLICY).status == 200


def test_time_is_limited(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_pieces(monkeypatch, 0.05)
    with hosted(models, batching=SLOW, limits=Limits(seconds=0.7)) as host:
        reply = host.post(CHAT, POLICY)
        assert (reply.status, reply.error["code"]) == (504, "timeout")
        stream = host.post(CHAT, POLICY | {"stream": True}).body.decode().strip().split("\n\n")
        assert json.loads(stream[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        with socket.create_connection(("127.0.0.1", host.port), timeout=30) as connection:
            head = _head("Content-Length: 100")
            connection.sendall(head.encode() + b"{")
            assert connection.recv(100).startswith(b"HTTP/1.1 504"), "a client that does not finish its request"
        until(lambda: host.metric("pit_batches_running") == 0)
        assert host.post(CHAT, POLICY | {"max_tokens": 2}).status == 200


def test_a_batch_that_fails_takes_only_its_own_requests_along(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, failing = Batch.advance, [True]

    def breaks(self: Batch, seconds: float) -> Any:
        if any(sampling.draw.seed == 13 for sampling in self.rows) and failing:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return advance(self, seconds)

    monkeypatch.setattr(Batch, "advance", breaks)
    with hosted(models) as host:
        reply = host.post(CHAT, POLICY | {"seed": 13})
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert "RESOURCE_EXHAUSTED" in reply.error["message"]
        [event] = host.post(CHAT, POLICY | {"seed": 13, "stream": True}).events
        assert "RESOURCE_EXHAUSTED" in event["error"]["message"]
        assert host.post(CHAT, POLICY).status == 200
        failing.clear()
        assert host.post(CHAT, POLICY | {"seed": 13}).status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_engine_has_ended_says_so_and_stops(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine) -> None:
        if self._waiting:
            raise KeyError("a fault of our own")
        time.sleep(0.01)

    monkeypatch.setattr(Engine, "_turn", broken)
    with pytest.raises(EngineError, match="ended by itself"), hosted(models) as host:
        reply = host.post(CHAT, POLICY)
        assert (reply.status, reply.error["code"]) == (500, "engine_error")
        host.wait()


def test_requests_under_way_are_finished_before_the_end(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_pieces(monkeypatch, 0.02)
    with hosted(models, batching=SLOW) as host, concurrent.futures.ThreadPoolExecutor() as pool:
        whole, stream = (pool.submit(host.post, CHAT, POLICY | {"stream": flag}) for flag in (False, True))
        until(lambda: host.metric("pit_requests_active") == 2)
        host.stop()
        text = _text(whole.result())
        pieces = [event["choices"][0]["delta"].get("content", "") for event in stream.result().events]
        assert "".join(pieces) == text
        host.wait()
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            host.get("/health")


def test_the_key_is_asked_for_where_there_is_one(models: Models) -> None:
    with hosted(models, api_key="s3cret") as host:
        for headers in ({}, {"authorization": "Bearer s3crex"}, {"authorization": "Basic s3cret"}):
            for reply in (
                host.post(CHAT, ASK, **headers),
                host.get("/v1/models", **headers),
                host.get("/metrics", **headers),
            ):
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        assert host.get("/health").status == host.get("/ready").status == 200
        assert host.post(CHAT, ASK, authorization="Bearer s3cret").status == 200
        assert host.get("/v1/models", authorization="bearer s3cret").status == 200


def test_many_clients_at_once_get_what_each_gets_alone(host: Host) -> None:
    asks = [ASK | {"seed": seed, "stream": False} for seed in range(6)]
    alone = [_text(host.post(CHAT, ask)) for ask in asks]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda ask: _text(host.post(CHAT, ask)), asks * 4))
    assert together == alone * 4
    rows = host.metric('pit_batch_rows_sum{kind="improver"}')
    assert rows > host.metric('pit_batch_rows_count{kind="improver"}'), "requests share batches"


def test_a_server_that_still_compiles_asks_for_patience(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(Engine, "_warm_up", lambda self: compiled.wait(60))
    with hosted(models, warm_up=True, ready=False) as host:
        assert (host.get("/health").status, host.get("/ready").status) == (200, 503)
        reply = host.post(CHAT, ASK)
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "not_ready", "5")
        compiled.set()
        until(lambda: host.get("/ready").status == 200)
        assert host.post(CHAT, ASK).status == 200


def test_a_fault_of_the_server_is_an_error_object_too(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise KeyError("a fault of our own")

    with hosted(models) as host:
        with monkeypatch.context() as patch:
            patch.setattr(Codec, "text", broken)
            reply = host.post(CHAT, ASK)
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert host.post(CHAT, ASK).status == 200
        assert host.metric("pit_requests_active") == 0


def test_a_run_without_gap_model_or_policy_says_what_it_cannot_do(
    run_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copied = pathlib.Path(shutil.copytree(run_dir, tmp_path / "copied"))
    for stage in ("reward_gap", "sft_policy"):
        shutil.rmtree(copied / stage)
    with hosted(Models(str(copied), 4)) as host:
        assert [model["id"] for model in host.get("/v1/models").json["data"]] == ["nano"]
        assert "no policy" in host.post(CHAT, ASK).error["message"]
        drafted = ASK | {"pit_reference": "a draft"}
        assert "no gap model" in host.post(CHAT, drafted | {"pit": {"accept": "gap"}}).error["message"]
        assert "no gap model" in host.post(CHAT, drafted | {"pit": {"candidates": 2}}).error["message"]
        [step] = host.post(CHAT, drafted).json["choices"][0]["pit"]["steps"]
        assert step["accepted"] and step["gap"] is None
