"""The endpoint's client against a real server that fails in every way a server can."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import logging
import socket
import threading
import time
import traceback

import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation import endpoint_http
from pit_jax.evaluation.endpoint import Endpoint
from pit_jax.evaluation.endpoint_config import Budget, EndpointConfig, Limits, Tokens
from pit_jax.evaluation.verdict_cache import ReplyCache

from .chat_server import KEY, ChatServer, Turn

QUICK = {"first_wait": 0.01, "timeout": 5.0, "attempts": 4}


def config(server: ChatServer | str, *, limits: dict | None = None, **fields) -> EndpointConfig:
    url = server if isinstance(server, str) else server.url
    return EndpointConfig(base_url=url, model="judge", limits=Limits(**QUICK | (limits or {})), **fields)


def ask(settings: EndpointConfig, texts: list[str], **how) -> tuple[Endpoint, list[endpoint_http.Reply]]:
    endpoint = Endpoint(settings, how.pop("cache", None), progress=False)
    return endpoint, endpoint.ask([[{"role": "user", "content": text}] for text in texts], **how)


def echo(turn: Turn) -> None:
    turn.reply("re: " + turn.call.text)


def first_fails(fault) -> object:
    """Return a script whose first try at each question meets a fault."""
    return lambda turn: fault(turn) if turn.attempt == 0 else echo(turn)


def test_replies_come_in_order_and_hold_what_the_server_says():
    def slow_for_the_first(turn: Turn) -> None:
        time.sleep(0.2 if turn.call.text == "0" else 0)
        echo(turn)

    texts = [str(i) for i in range(40)]
    with ChatServer(slow_for_the_first) as server:
        endpoint, replies = ask(config(server, temperature=0.5, seed=3, extra={"user": "x"}), texts)
    assert [reply.text for reply in replies] == ["re: " + text for text in texts]
    assert replies[0].tokens == Tokens(11, 7) and replies[0].finish == "stop" and replies[0].model == "judge-2026"
    assert endpoint.usage.spent == Tokens(440, 280)
    call = next(call for call in server.calls if call.text == "0")
    body = call.body
    assert body.pop("messages") == [{"role": "user", "content": "0"}]
    assert body == {"model": "judge", "max_tokens": 1024, "temperature": 0.5, "seed": 3, "user": "x"}
    assert "authorization" not in call.headers


def test_concurrency_is_used_and_never_exceeded():
    together = threading.Barrier(5, timeout=20)

    def five_at_once(turn: Turn) -> None:
        together.wait()
        echo(turn)

    with ChatServer(five_at_once) as server:
        _, replies = ask(config(server, limits={"concurrency": 5, "timeout": 20}), [str(i) for i in range(30)])
    assert all(reply.ok for reply in replies) and server.busiest == 5 and len(server.calls) == 30


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda turn: turn.status(500, "oops"), id="500"),
        pytest.param(lambda turn: turn.status(503, '{"error": {"message": "loading"}}'), id="503"),
        pytest.param(lambda turn: turn.status(429, '{"error": {"message": "slow down"}}'), id="429"),
        pytest.param(lambda turn: turn.status(200, "<html>gateway</html>"), id="no JSON"),
        pytest.param(lambda turn: turn.status(200, '{"choices": [{"message": {"content": "re'), id="half a JSON"),
        pytest.param(lambda turn: turn.status(200, '{"choices": []}'), id="no choices"),
        pytest.param(lambda turn: turn.status(200, '["nonsense"]'), id="a list"),
        pytest.param(lambda turn: turn.status(200, '{"choices": [{"message": {"content": 7}}]}'), id="a number"),
        pytest.param(lambda turn: turn.status(200, "[" * 100_000), id="a deep list"),
        pytest.param(lambda turn: turn.status(500, "[" * 100_000), id="a deep error"),
        pytest.param(lambda turn: turn.status(200, '{"error": {"message": "upstream"}}'), id="error with 200"),
        pytest.param(Turn.cut, id="half a body"),
        pytest.param(Turn.reset, id="reset"),
        pytest.param(Turn.stall, id="stall"),
        pytest.param(Turn.drip, id="drip"),
    ],
)
def test_a_passing_fault_is_tried_again_and_others_are_unaffected(fault):
    with ChatServer(lambda turn: first_fails(fault)(turn) if turn.call.text == "b" else echo(turn)) as server:
        timeout = 1.0 if fault in (Turn.stall, Turn.drip) else 20.0
        _, replies = ask(config(server, limits={"timeout": timeout}), ["a", "b", "c"])
    assert [reply.text for reply in replies] == ["re: a", "re: b", "re: c"]
    assert server.seen == {"a": 1, "b": 2, "c": 1}


def test_a_lasting_fault_fails_its_question_alone():
    with ChatServer(lambda turn: turn.status(500, "oops") if turn.call.text == "b" else echo(turn)) as server:
        endpoint, replies = ask(config(server), ["a", "b", "c"])
    assert [reply.ok for reply in replies] == [True, False, True]
    assert replies[1].failure == "4 tries failed; the last: HTTP 500: oops" and replies[1].status == 500
    assert server.seen["b"] == 4
    assert (endpoint.usage.requests, endpoint.usage.answered, endpoint.usage.failed) == (6, 2, 1)


def test_a_request_that_cannot_succeed_is_sent_once():
    body = '{"error": {"message": "context too long", "code": "context_length_exceeded"}}'
    with ChatServer(lambda turn: turn.status(400, body) if turn.call.text == "b" else echo(turn)) as server:
        _, replies = ask(config(server), ["a", "b", "c"])
    assert server.seen["b"] == 1 and replies[1].failure == "HTTP 400: context too long" and replies[2].ok


def test_retry_after_holds_everybody_back():
    def limited(turn: Turn) -> None:
        if turn.call.text == "0" and turn.attempt == 0:
            turn.status(429, "{}", Retry_After="1")
        else:
            echo(turn)

    with ChatServer(limited) as server:
        _, replies = ask(config(server, limits={"concurrency": 1}), ["0", "1", "2"])
    assert all(reply.ok for reply in replies)
    assert server.calls[1].at - server.calls[0].at >= 1.0
    assert server.calls[1].text == "0"


def test_a_server_that_asks_for_too_long_a_wait_is_given_up():
    with ChatServer(lambda turn: turn.status(503, "{}", Retry_After="3600")) as server:
        _, replies = ask(config(server), ["a"])
    assert "asks to wait 3600 seconds" in replies[0].failure and len(server.calls) == 1


def test_retry_after_is_read_in_all_its_forms():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    assert endpoint_http.asked_wait({"retry-after": "7"}) == 7
    assert endpoint_http.asked_wait({"retry-after": "7", "retry-after-ms": "250"}) == 0.25
    assert endpoint_http.asked_wait({"retry-after": email.utils.format_datetime(soon, usegmt=True)}) == pytest.approx(
        30, abs=3
    )
    assert endpoint_http.asked_wait({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0
    assert endpoint_http.asked_wait({"retry-after": "soon"}) is None
    assert endpoint_http.asked_wait({}) is None


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, '{"error": {"message": "bad key"}}', "check the key"),
        (404, '{"detail": "Not Found"}', "check base_url"),
        (429, '{"error": {"message": "pay", "code": "insufficient_quota"}}', "pay"),
        (307, "", "redirects"),
    ],
)
def test_a_fault_that_everybody_meets_stops_the_rest(status, body, words):
    with ChatServer(lambda turn: turn.status(status, body)) as server:
        _, replies = ask(config(server, limits={"concurrency": 2}), [str(i) for i in range(50)])
    assert len(server.calls) <= 2
    assert all(words in reply.failure for reply in replies)
    assert replies[-1].failure.startswith("not asked, because another question failed")


def test_an_endpoint_that_is_down_is_given_up_soon():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        start = time.monotonic()
        limits = {"attempts": 3, "give_up_after": 4, "concurrency": 2}
        endpoint, replies = ask(config(url, limits=limits), [str(i) for i in range(1000)])
    assert time.monotonic() - start < 20
    assert not any(reply.ok for reply in replies) and endpoint.usage.spent.total == 0
    assert "no connection to" in replies[0].failure and "4 questions in a row" in replies[-1].failure
    assert endpoint.usage.requests <= 5 * 3


def test_a_slow_start_of_the_server_is_survived():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    opened: list[ChatServer] = []
    threading.Timer(0.4, lambda: opened.append(ChatServer(echo, port).__enter__())).start()
    settings = config(f"http://127.0.0.1:{port}/v1", limits={"first_wait": 0.2, "attempts": 6})
    _, replies = ask(settings, ["a", "b"])
    opened[0].__exit__()
    assert [reply.text for reply in replies] == ["re: a", "re: b"]


def test_requests_per_minute_are_kept():
    with ChatServer(echo) as server:
        start = time.monotonic()
        ask(config(server, limits={"requests_per_minute": 600}), [str(i) for i in range(8)])
    times = [call.at - start for call in server.calls]
    assert all(at >= 0.1 * i for i, at in enumerate(times))


def test_tokens_per_minute_count_what_was_used_and_not_what_was_booked():
    # Booked: 1030 tokens each, used: 18. At 60,000 a minute that is 1.03 s against 0.018 s a question.
    with ChatServer(echo) as server:
        start = time.monotonic()
        ask(config(server, limits={"tokens_per_minute": 60_000, "concurrency": 1}), [str(i) for i in range(10)])
    assert 9 * 0.018 <= server.calls[-1].at - start < 6
    with ChatServer(echo) as server:
        start = time.monotonic()
        ask(config(server, limits={"tokens_per_minute": 60_000, "concurrency": 3}), ["0", "1", "2"])
    # All three are booked before any is answered.
    assert server.calls[-1].at - start >= 2 * 1.03


def test_the_budget_is_checked_before_anything_is_sent():
    with ChatServer(echo) as server:
        prices = Budget(cost=0.5, prompt_price=10.0, completion_price=30.0)
        with pytest.raises(ConfigError, match=r"Budget.*100 questions are expected to take .* tokens for 3\.08"):
            ask(config(server, budget=prices), ["word"] * 1 + [f"w{i}" for i in range(99)])
        with pytest.raises(ConfigError, match="Nothing was sent"):
            ask(config(server, budget=Budget(tokens=1000)), ["word"])
        assert not server.calls
        typical = Budget(tokens=1000, reply_tokens=100)
        assert ask(config(server, budget=typical), ["word"])[1][0].ok


def test_the_budget_holds_while_asking_and_counts_over_calls():
    def dear(turn: Turn) -> None:
        turn.reply("x", usage={"prompt_tokens": 100, "completion_tokens": 300})

    with ChatServer(dear) as server:
        settings = config(server, budget=Budget(tokens=1000, reply_tokens=10), limits={"concurrency": 1})
        endpoint, replies = ask(settings, [str(i) for i in range(10)])
        assert [reply.ok for reply in replies] == [True] * 3 + [False] * 7
        assert "budget is used up: 1,200 tokens spent" in replies[-1].failure
        with pytest.raises(ConfigError, match="after 1,200 tokens spent"):
            endpoint.ask([[{"role": "user", "content": "more"}]])
    assert len(server.calls) == 3


def test_lost_answers_count_as_spent():
    with ChatServer(first_fails(Turn.cut)) as server:
        endpoint, _ = ask(config(server, max_tokens=50), ["abc"])
    assert endpoint.usage.spent == Tokens(11 + 5, 7 + 50)


def test_equal_questions_are_asked_once_and_samples_anew():
    with ChatServer(echo) as server:
        endpoint, replies = ask(config(server, temperature=1.0, seed=5), ["a", "b", "a"])
        assert [reply.text for reply in replies] == ["re: a", "re: b", "re: a"]
        assert server.seen == {"a": 1, "b": 1}
        endpoint.ask([[{"role": "user", "content": "a"}]], sample=1)
    assert server.seen["a"] == 2 and server.calls[-1].body["seed"] == 6


def test_empty_and_refused_replies_are_replies(tmp_path):
    def refuse(turn: Turn) -> None:
        message = {"role": "assistant", "content": None, "refusal": "I will not." if turn.call.text == "a" else None}
        turn.reply(None, choices=[{"message": message, "finish_reason": "content_filter"}])

    with ChatServer(refuse) as server, ReplyCache(tmp_path / "replies.jsonl") as cache:
        for _ in range(2):
            _, replies = ask(config(server), ["a", "b"], cache=cache)
    assert [reply.text for reply in replies] == ["I will not.", ""] and all(reply.ok for reply in replies)
    assert replies[0].finish == "content_filter" and len(server.calls) == 2


def test_the_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, caplog):
    def echoes_the_key(turn: Turn) -> None:
        token = turn.call.headers["authorization"]
        assert token == f"Bearer {KEY}"
        if turn.call.text == "good":
            turn.reply("fine")
        else:
            turn.status(400, f'{{"error": {{"message": "Bad request by {token}"}}}}')

    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "replies.jsonl"
    with ChatServer(echoes_the_key) as server, ReplyCache(path) as cache:
        endpoint, replies = ask(config(server, key_env="JUDGE_KEY"), ["good", "bad"], cache=cache)
    assert replies[0].ok and replies[1].failure == "HTTP 400: Bad request by Bearer [key]"
    shown = [repr(endpoint.config), repr(vars(endpoint)), repr(replies), caplog.text, path.read_text()]
    assert not any(KEY in text for text in shown)
    client = endpoint_http.Client(endpoint.config)
    assert not any(KEY in text for text in (repr(vars(client)), repr(client._http.headers), repr(vars(client._http))))


@pytest.mark.parametrize("value", [None, "", "  ", "sk-ünsafe", "two words", "line\nbreak"])
def test_a_key_that_cannot_be_used_is_refused_without_showing_it(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="JUDGE_KEY") as caught:
        ask(config("http://127.0.0.1:9/v1", key_env="JUDGE_KEY"), ["a"])
    shown = "".join(traceback.format_exception(caught.value))
    assert not value or not value.strip() or value not in shown


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"base_url": "api.example.org/v1"}, "http or https"),
        ({"base_url": "https://me:secret@example.org/v1"}, "no name or password"),
        ({"base_url": "https://example.org/v1?key=1"}, "http or https"),
        ({"base_url": "http://[::1/v1"}, "http or https"),
        ({"base_url": "http://me:secret@example.org:port/v1"}, "http or https"),
        ({"base_url": "http://example.org:99999/v1"}, "http or https"),
        ({"model": ""}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"token_field": "tokens"}, "token_field"),
        ({"extra": {"stream": True}}, "extra"),
    ],
)
def test_wrong_settings_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match) as caught:
        EndpointConfig(**{"base_url": "http://localhost/v1", "model": "m"} | fields)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Limits(concurrency=0), "concurrency"),
        (lambda: Limits(requests_per_minute=0), "requests_per_minute"),
        (lambda: Limits(timeout=float("inf")), "timeout"),
        (lambda: Budget(tokens=-1), "tokens"),
        (lambda: Budget(cost=1.0), "prices"),
        (lambda: Budget(prompt_price=1.0), "together"),
    ],
)
def test_wrong_limits_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_any_text_can_be_sent():
    texts = ["half \ud83d of a pair", "nul \x00 \u2028 \U0001f600", "ünï漢字"]
    with ChatServer(echo) as server:
        _, replies = ask(config(server), texts)
    assert [reply.text for reply in replies] == ["re: half ? of a pair", *("re: " + text for text in texts[1:])]


def test_a_cache_that_cannot_be_written_ends_the_call_with_its_own_error(tmp_path, monkeypatch):
    def full(key, reply):
        raise DataError("the disk is full")

    with ChatServer(echo) as server, ReplyCache(tmp_path / "replies.jsonl") as cache:
        monkeypatch.setattr(cache, "put", full)
        with pytest.raises(DataError, match="disk is full"):
            ask(config(server, limits={"concurrency": 4}), [str(i) for i in range(100)], cache=cache)
    assert len(server.calls) <= 12


def test_asking_works_where_an_event_loop_runs_already():
    async def notebook(settings: EndpointConfig) -> list[endpoint_http.Reply]:
        return ask(settings, ["a"])[1]

    with ChatServer(echo) as server:
        assert asyncio.run(notebook(config(server)))[0].text == "re: a"
