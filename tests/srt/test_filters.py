"""Both filters, with a program as the critic and with a real endpoint."""

from __future__ import annotations

import collections

import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.data.synthetic import SyntheticConfig, generate, quality
from pit_jax.evaluation.endpoint_config import EndpointConfig, Limits
from pit_jax.io import serialize
from pit_jax.srt import critic_prompts
from pit_jax.srt.critics import Draft, EndpointCriticConfig, FunctionCritic, FunctionCriticConfig
from pit_jax.srt.critique import Drop
from pit_jax.srt.filters import Judged, judge

from ..evaluation.chat_server import ChatServer, Turn

FORM = "### Weaknesses\n{w}\n### Suggestions\n{s}\nOverall Score: [[{n}]]\n### Improved Response\n{r}"
SYNTHETIC = FunctionCriticConfig(critique="pit_jax.data.synthetic:critique", score="pit_jax.data.synthetic:rating")


def reasons(found) -> list[str]:
    return [entry.reason if isinstance(entry, Drop) else "kept" for entry in found]


def test_a_refinement_is_kept_if_its_own_score_is_not_lower():
    independent = {"a": 5.0, "b": 5.0, "c": 6.0, "better": 5.5, "same": 5.0, "worse": 4.9}
    written = {"a": "better", "b": "same", "c": "worse"}
    critic = FunctionCritic(
        name="program",
        # The score inside the critique is another one, and plays no part.
        critique=lambda prompt, response: FORM.format(w="w", s="s", n=9, r=written[response]),
        score=lambda prompt, response: independent[response],
    )
    found = judge([Draft("x", response) for response in "abc"], critic)
    assert reasons(found) == ["kept", "kept", "refinement_worse"]
    first = found[0]
    assert isinstance(first, Judged)
    assert (first.response_score, first.refinement_score, first.critique.score) == (5.0, 5.5, 9.0)
    assert first.draft == Draft("x", "a") and first.critique.refinement == "better"


def test_the_synthetic_critic_passes_its_own_filters():
    critic = SYNTHETIC.build("unused")
    records = list(generate(SyntheticConfig(num_records=60)))
    drafts = [Draft(record["prompt"], record[name]) for record in records for name in ("chosen", "rejected")]
    found = judge(drafts, critic)
    assert reasons(found) == ["kept"] * 120 and critic.tokens_spent == 0
    for entry in found:
        assert isinstance(entry, Judged) and entry.refinement_score == 10
        assert (entry.response_score == 10) == (quality(*entry.draft) == 1.0)


def endpoint(server: ChatServer, **fields) -> EndpointCriticConfig:
    limits = Limits(first_wait=0.01, attempts=2, timeout=5.0, give_up_after=1000)
    return EndpointCriticConfig(endpoint=EndpointConfig(base_url=server.url, model="critic", limits=limits), **fields)


def response_in(turn: Turn) -> str:
    return turn.call.text.partition("[Response]\n")[2].partition("\n\n[Your task]")[0]


def scripted(turn: Turn) -> None:
    """Answer as the response under criticism says; a refinement r7 is worth 7."""
    response = response_in(turn)
    if "### Improved Response" in turn.call.text:
        kind = response.partition(" ")[0]
        if kind == "cut":
            text = FORM.format(w="w", s="s", n=5, r="half of")
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
            turn.reply(None, choices=[choice])
        elif kind == "refused":
            turn.status(400, '{"error": {"message": "content policy"}}')
        else:
            turn.reply(kind if kind == "nonsense" else FORM.format(w="w", s="s", n=5, r=kind))
    elif response == "rnone":
        turn.reply("I cannot say.")
    elif response == "rrefused":
        turn.status(400, '{"error": {"message": "content policy"}}')
    else:
        # A draft has two words.
        turn.reply(f"Because. Overall Score: [[{6 if ' ' in response else response[1:]}]]")


def test_every_reason_is_counted_and_everything_is_asked_in_a_context_of_its_own(tmp_path):
    responses = ["r7 a", "r6 b", "r5 c", "cut d", "refused e", "nonsense f", "rnone g", "rrefused h"]
    with ChatServer(scripted) as server:
        critic = endpoint(server).build(tmp_path, progress=False)
        found = judge([Draft("say {it}", response) for response in responses], critic)
        again = judge([Draft("say {it}", response) for response in responses[:4]], critic)
    assert reasons(found) == ["kept", "kept", "refinement_worse", "cut_reply", "no_reply", "no_refinement",
                              "no_independent_score", "no_reply"]  # fmt: skip
    assert again == found[:4]
    refused = found[4]
    assert isinstance(refused, Drop) and "content policy" in refused.detail
    for call in server.calls:
        assert call.body["temperature"] == 0.0 and len(call.body["messages"]) == 2
    asked = collections.Counter(call.text for call in server.calls)
    assert max(asked.values()) == 1, "nothing is asked twice"
    assert len(asked) == 8 + 5 * 2, "a critique each; both scores of the five that parse"
    assert critic.tokens_spent == 18 * (7 + 9), "refusals cost nothing"


def test_templates_are_checked_before_anything_is_asked(tmp_path):
    there = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m")
    with pytest.raises(ConfigError, match="'critiqe' must be one of .*Did you mean 'critique'"):
        EndpointCriticConfig(endpoint=there, critique="critiqe")
    own = tmp_path / "own.txt"
    own.write_text("Look at {response}.")
    with pytest.raises(ConfigError, match="the user's part of prompt own.*contain {prompt}"):
        EndpointCriticConfig(endpoint=there, score=str(own))
    own.write_text("{prompt}: {response} {{as it is}}")
    (message,) = critic_prompts.load(str(own)).messages(prompt="{response}", response="y")
    assert message == {"role": "user", "content": "{response}: y {as it is}"}
    own.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        critic_prompts.load(str(own))


def test_shipped_prompts_ask_for_what_is_read():
    assert critic_prompts.shipped() == ["critique", "score"]
    system, user = critic_prompts.load("critique").messages(prompt="the question", response="the answer")
    assert "critic" in system["content"] and "the question" in user["content"] and "the answer" in user["content"]
    for part in ("### Weaknesses", "### Suggestions", "Overall Score: [[n]]", "### Improved Response"):
        assert part in user["content"]
    assert "Overall Score: [[n]]" in critic_prompts.load("score").user


@pytest.mark.parametrize(
    ("path", "said"),
    [("nowhere:f", "must be an import path; No module"), ("pit_jax.data.synthetic:critiqe", "Did you mean 'critique'"),
     ("critique", "must be an import path; No module"), ("", "must be an import path")],
)  # fmt: skip
def test_a_function_that_is_not_there_is_named(path, said):
    with pytest.raises(ConfigError, match=f"FunctionCriticConfig.critique = .*{said}"):
        FunctionCriticConfig(critique=path, score="pit_jax.data.synthetic:rating")


def test_configs_survive_json():
    there = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m")
    for config in (SYNTHETIC, EndpointCriticConfig(endpoint=there)):
        assert serialize.from_json(serialize.to_json(config)) == config
