"""A language model as a judge: its templates, how its replies are read, and the whole of it against a real server."""

from __future__ import annotations

import json
import logging
import math
import random
import time

import pytest

from pit_jax.cli import gin_config
from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation import judge_prompts
from pit_jax.evaluation.endpoint_config import EndpointConfig, Limits
from pit_jax.evaluation.llm_judge import LlmJudgeConfig
from pit_jax.evaluation.pairwise import PositionBias, Question
from pit_jax.io import serialize

from .chat_server import KEY, ChatServer, Turn


def judge_at(server: ChatServer, directory, *, limits: dict | None = None, **fields):
    quick = Limits(**{"first_wait": 0.01, "attempts": 3, "timeout": 5.0} | (limits or {}))
    config = EndpointConfig(base_url=server.url, model="judge", limits=quick)
    return LlmJudgeConfig(endpoint=config, **fields).build(directory, progress=False)


def answers(turn: Turn) -> tuple[str, str]:
    """Return the answers of assistants A and B as the question shows them."""
    _, _, rest = turn.call.text.partition("[The Start of Assistant A's Answer]\n")
    a, _, rest = rest.partition("\n[The End of Assistant A's Answer]")
    return a, rest.partition("[The Start of Assistant B's Answer]\n")[2].partition("\n[The End")[0]


def better(turn: Turn) -> str:
    a, b = answers(turn)
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C"


QUESTIONS = [Question(f"Ask {i}", "x" * (i % 3 + 1), "y" * 2) for i in range(12)]
TRUTH = [{0: -1.0, 1: 0.0, 2: 1.0}[i % 3] for i in range(12)]


def test_verdicts_are_right_in_both_orders_and_asked_in_both(tmp_path):
    with ChatServer(lambda turn: turn.reply(f"Compared. Verdict: [[{better(turn)}]]")) as server:
        judge = judge_at(server, tmp_path)
        found = judge.verdicts(QUESTIONS)
    assert [v.outcome for v in found] == TRUTH and judge.name == "judge"
    assert "[exchanged] Compared. Verdict: [[A]]" in found[0].reason
    assert judge.bias == PositionBias(consistent=12)
    assert len(server.calls) == 24
    system, user = server.calls[0].body["messages"]
    assert system["role"] == "system" and "impartial" in system["content"] and "response_format" not in user


def test_one_order_costs_half(tmp_path):
    with ChatServer(lambda turn: turn.reply(f"[[{better(turn)}]]")) as server:
        judge = judge_at(server, tmp_path, both_orders=False, name="quick")
        assert [v.outcome for v in judge.verdicts(QUESTIONS)] == TRUTH and judge.name == "quick"
    assert len(server.calls) == 12


def test_a_judge_that_always_says_a_is_found_out_and_decides_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with ChatServer(lambda turn: turn.reply("[[A]]")) as server:
        judge = judge_at(server, tmp_path)
        assert all(v.outcome == 0 for v in judge.verdicts(QUESTIONS))
    assert "always prefers the first answer" in caplog.text


def test_faults_of_every_kind_leave_the_other_verdicts_alone(tmp_path, caplog):
    faults = [
        lambda turn: turn.status(500, "oops"),
        lambda turn: turn.status(429, "{}", Retry_After="0"),
        lambda turn: turn.status(200, '{"choi'),
        Turn.cut,
        Turn.reset,
        Turn.stall,
    ]
    chance = random.Random(0)

    def unreliable(turn: Turn) -> None:
        if turn.attempt == 0 and chance.random() < 0.5:
            chance.choice(faults)(turn)
        elif turn.call.text.startswith("[User Question]\nAsk 3\n"):
            turn.status(500, "always")
        elif turn.call.text.startswith("[User Question]\nAsk 4\n"):
            turn.reply("Both have their merits, I think.")
        else:
            turn.reply(f"[[{better(turn)}]]")

    with ChatServer(unreliable) as server:
        found = judge_at(server, tmp_path, limits={"timeout": 1.0}).verdicts(QUESTIONS)
    wanted = [math.nan if i in (3, 4) else truth for i, truth in enumerate(TRUTH)]
    assert [v.outcome for v in found] == pytest.approx(wanted, nan_ok=True)
    assert "no reply: 3 tries failed; the last: HTTP 500: always" in found[3].reason
    assert "Both have their merits" in found[4].reason
    assert "2 of 24 questions have no reply" in caplog.text and "2 of 22 replies" not in caplog.text


def test_a_schema_is_sent_where_the_server_takes_it(tmp_path):
    def structured(turn: Turn) -> None:
        assert turn.call.body["response_format"] == judge_prompts.VERDICT_SCHEMA
        turn.reply(json.dumps({"explanation": "[[B]] would be wrong", "verdict": better(turn)}))

    with ChatServer(structured) as server:
        assert [v.outcome for v in judge_at(server, tmp_path, structured=True).verdicts(QUESTIONS)] == TRUTH
    assert len(server.calls) == 24
    assert '{"explanation": "a comparison' in server.calls[0].body["messages"][0]["content"]


def test_a_server_that_refuses_a_schema_is_asked_without(tmp_path, caplog):
    def plain(turn: Turn) -> None:
        if "response_format" in turn.call.body:
            turn.status(400, '{"error": {"message": "response_format is not supported"}}')
        else:
            turn.reply(f'```json\n{{"explanation": "", "verdict": "{better(turn)}"}}\n```')

    with ChatServer(plain) as server:
        judge = judge_at(server, tmp_path, structured=True)
        assert [v.outcome for v in judge.verdicts(QUESTIONS)] == TRUTH
        assert len(server.calls) == 25
        judge.verdicts([Question("another", "a", "bb")])
    assert len(server.calls) == 27 and "refuses a JSON schema" in caplog.text


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("[[A]]", 1), ("[[B]]", -1), ("[[C]]", 0), ("Final verdict: [[ b ]]", -1), ("[[Tie]]", 0),
        ("If I said [[A]] I would be wrong: [[B]]", -1),
        ('{"explanation": "x", "verdict": "A"}', 1), ('{"verdict": "tie"}', 0), ('{"verdict": "[[B]]"}', -1),
        ('<think>{"verdict": "A"}?</think> {"verdict": "B"}', -1),
        ('{"analysis": {"verdict": "A", "deep": {}}, "verdict": "C"}', 0),
        ('text {broken {"verdict": "B", "n": {"a": 1}} more', -1),
        ('{"explanation": "[[A]]", "verdict": 3}', 1),
        ("", math.nan), ("A", math.nan), ("[A]", math.nan), ("[[D]]", math.nan), ("I prefer A.", math.nan),
        ('{"explanation": "x", "verdict": "A', math.nan), ("{" * 50, math.nan),
        ('{"verdict": null} [[A]]', 1), ('{"verdict": ["A"]}', math.nan),
    ],
)  # fmt: skip
def test_replies_are_read(text, outcome):
    assert judge_prompts.read_verdict(text) == pytest.approx(outcome, nan_ok=True)


@pytest.mark.parametrize(
    "text",
    ['{"a":[' * 50_000, '{"a":' * 900 + '"' + "x{" * 50_000, "{" * 200_000, '{"a":1,' * 50_000],
    ids=["deep", "deep and long", "braces", "broken"],
)
def test_no_reply_takes_long_to_read(text):
    start = time.monotonic()
    assert judge_prompts.read_verdict(text + " [[B]]") == -1
    assert time.monotonic() - start < 5


def test_a_reply_without_verdict_keeps_its_words(tmp_path):
    cut = [{"message": {"role": "assistant", "content": "Let me think"}, "finish_reason": "length"}]
    with ChatServer(lambda turn: turn.reply("", choices=cut)) as server:
        verdict = judge_at(server, tmp_path, both_orders=False).verdicts(QUESTIONS[:1])[0]
    assert math.isnan(verdict.outcome) and verdict.reason == "Let me think (cut at max_tokens)"


@pytest.mark.parametrize("name", judge_prompts.shipped())
def test_shipped_templates_show_both_answers_once(name):
    prompt = judge_prompts.load(name)
    messages = prompt.messages(prompt="PROMPT", first="FIRST {second} {prompt}", second="SECOND [[A]] {x}")
    assert [message["role"] for message in messages] == ["system", "user"]
    user = messages[1]["content"]
    assert user.index("PROMPT") < user.index("FIRST {second} {prompt}") < user.index("SECOND [[A]] {x}")
    # What the template asks for is what is read.
    asked = messages[0]["content"]
    assert ("[[A]]" in asked and "[[C]]" in asked) or '"verdict": "A"' in asked
    assert not prompt.user.endswith("\n")


def test_shipped_templates_are_listed():
    assert judge_prompts.shipped() == ["mt_bench", "mt_bench_json", "summary"]


def test_own_templates_come_from_files(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("Q: {prompt}\n1: {first}\n2: {second}\nWhich? {{}} [[A]], [[B]] or [[C]]\n")
    assert judge_prompts.load(str(own)).messages(prompt="p", first="a", second="b") == [
        {"role": "user", "content": "Q: p\n1: a\n2: b\nWhich? {} [[A]], [[B]] or [[C]]"}
    ]
    own.write_text("### system\nBe fair. {{ok}}\n### user\n{prompt}{first}{second}")
    assert judge_prompts.load(str(own)).messages(prompt="p", first="a", second="b")[0]["content"] == "Be fair. {ok}"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{prompt} {first}", r"contain \{second\}"),
        ("{prompt} {first} {second} {first}", "each field once"),
        ("{prompt} {first} {second} {reference}", r"Remove \{reference\}"),
        ("{prompt} {first} {second} {", "matching braces"),
        ("### system\nJudge {prompt}\n### user\n{prompt}{first}{second}", "the system's part"),
    ],
)
def test_wrong_templates_are_refused_before_anything_is_asked(tmp_path, text, match):
    own = tmp_path / "own.txt"
    own.write_text(text)
    with pytest.raises(ConfigError, match=match):
        LlmJudgeConfig(endpoint=EndpointConfig(base_url="http://localhost/v1", model="m"), template=str(own))


def test_other_mistakes_in_templates_are_named(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'mt_bench'"):
        judge_prompts.load("mtbench")
    with pytest.raises(ConfigError, match="ask for JSON"):
        endpoint = EndpointConfig(base_url="http://localhost/v1", model="m")
        LlmJudgeConfig(endpoint=endpoint, template="mt_bench", structured=True)
    (tmp_path / "latin.txt").write_bytes(b"\xfc{prompt}{first}{second}")
    with pytest.raises(DataError, match="UTF-8"):
        judge_prompts.load(str(tmp_path / "latin.txt"))


def test_a_recipe_describes_the_judge_and_never_holds_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    recipe = tmp_path / "judge.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\n"
        "from pit_jax.evaluation import endpoint_config\n"
        "from pit_jax.evaluation import llm_judge\n"
        "llm_judge.LlmJudgeConfig.endpoint = @endpoint_config.EndpointConfig()\n"
        "endpoint_config.EndpointConfig.base_url = 'https://example.org/v1/'\n"
        "endpoint_config.EndpointConfig.model = 'large'\n"
        "endpoint_config.EndpointConfig.key_env = 'JUDGE_KEY'\n"
        "endpoint_config.EndpointConfig.extra = {'reasoning_effort': 'low'}\n"
        "endpoint_config.EndpointConfig.limits = @endpoint_config.Limits()\n"
        "endpoint_config.EndpointConfig.budget = @endpoint_config.Budget()\n"
        "endpoint_config.Limits.concurrency = 3\n"
        "endpoint_config.Budget.cost = 5\n"
        "endpoint_config.Budget.prompt_price = 2.5\n"
        "endpoint_config.Budget.completion_price = 10\n"
    )
    built = gin_config.build(gin_config.GinSource(files=(str(recipe),)), "pit_jax.evaluation.llm_judge:LlmJudgeConfig")
    config = built.value
    assert config.endpoint.limits.concurrency == 3 and config.endpoint.budget.cost == 5
    assert config.endpoint.base_url == "https://example.org/v1"
    stored = json.dumps(serialize.to_json(config))
    assert serialize.from_json(json.loads(stored)) == config
    assert KEY not in stored and KEY not in built.text and KEY not in repr(config)
