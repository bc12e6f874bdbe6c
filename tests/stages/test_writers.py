"""Self-Refine by a policy of a run and by a served model: ids in, ids out, lengths, forms, batches and payment."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.decode.batches import Response
from pit_jax.decode.sampling import Sampling
from pit_jax.evaluation.endpoint_config import Budget, EndpointConfig, Limits, estimated_tokens
from pit_jax.improve.loop import first_answers
from pit_jax.improve.refine_templates import load
from pit_jax.improve.self_refine import SelfRefine, Written, self_refine
from pit_jax.models.convert import pretrained
from pit_jax.stages import answering
from pit_jax.stages.run import Experiment, Run
from pit_jax.stages.writers import EndpointWriting, LocalWriter, LocalWriting, Refined, refined, refined_by
from pit_jax.text.chat import ChatFormat
from pit_jax.text.chat_template import chat_templates, load_chat_template
from pit_jax.text.codec import Codec, Lengths, PromptRow
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer
from pit_jax.text.tokenizer import SentencePieceTokenizer

from ..evaluation.chat_server import ChatServer, Turn
from . import checkpoints, small

WORDS = SelfRefine(prompts="words", iterations=2)
POLICY = "rl_policy:2"


@pytest.fixture(scope="module")
def run(whole: pathlib.Path) -> Run:
    with small.devices(1):
        found = Run(str(whole), 0, small.experiment())
        assert found.mesh.size == 1
    return found


@pytest.fixture(scope="module")
def prompts(run: Run) -> list[tuple[int, ...]]:
    return [prompt.ids for prompt in run.held_out(7)]


@pytest.fixture(scope="module")
def originals(run: Run, prompts: list[tuple[int, ...]]) -> list[Response]:
    sampler = answering.sampler(run, "policy", Sampling(), 8)
    params = run.language_model(POLICY, "policy")
    return first_answers(lambda rows, keys: sampler.answer(params, rows, keys), run.codec, prompts, 0)


@pytest.fixture(scope="module")
def sampled(run: Run, prompts: list[tuple[int, ...]], originals: list[Response]) -> Refined:
    return refined(run, POLICY, WORDS, prompts, originals, 0.7, 8)


def greedy(run: Run, rows: Sequence[Sequence[int]], width: int) -> list[tuple[int, ...]]:
    """Return what the policy says to bare ids, by a sampler made here."""
    codec = Codec(run.tokenizer, run.codec.templates, Lengths(inputs=width, targets=14))
    sampler = answering.make_sampler(run.lm, codec, "policy", Sampling(temperature=0.0), 8, run.mesh)
    params = run.language_model(POLICY, "policy")
    asked = [PromptRow(tuple(row), (0, 0)) for row in rows]
    return [answer.ids for answer in sampler.answer(params, asked, _keys(len(rows)))]


def _keys(count: int) -> Any:
    return jax.random.split(jax.random.key(5), count)


def test_each_round_is_one_response_for_every_prompt(run: Run, sampled: Refined, originals: list[Response]) -> None:
    assert len(sampled.answers) == 2 and {len(rows) for rows in sampled.answers} == {7}
    assert sampled.chosen == sampled.answers[-1], "the demo's prompts ask for no score"
    assert sampled.counts.feedbacks == sampled.counts.refinements == 14 and sampled.counts.ended == {"iterations": 7}
    room = run.codec.lengths.targets
    for answer in [answer for rows in sampled.answers for answer in rows]:
        assert len(answer.ids) <= room - answer.finished
        assert run.codec.without_eos(answer.ids) == answer.ids
    for row, original in zip(sampled.trajectories, originals, strict=True):
        assert row.answers[0] == Written(run.codec.text(original.ids), original.finished)


def test_greedy_refinement_is_that_of_ids_put_together_by_hand(
    run: Run, prompts: list[tuple[int, ...]], originals: list[Response]
) -> None:
    assert isinstance(run.tokenizer, SentencePieceTokenizer)
    found = refined(run, POLICY, WORDS, prompts, originals, 0.0, 8)
    mark = run.tokenizer.special_pieces["<answer>"]
    histories: list[tuple[int, ...]] = list(prompts)
    answers = [original.ids for original in originals]
    for k in range(2):
        asked = [(*x, mark, *y, mark) for x, y in zip(prompts, answers, strict=True)]
        feedback = greedy(run, asked, 40)
        histories = [(*h, mark, *y, mark, *f) for h, y, f in zip(histories, answers, feedback, strict=True)]
        answers = greedy(run, [(*h, mark) for h in histories], 120)
        assert [answer.ids for answer in found.answers[k]] == answers
        assert [row.feedbacks[k].text for row in found.trajectories] == [run.codec.text(f).strip() for f in feedback]


def test_requests_in_the_demos_words_have_no_unknown_piece(run: Run) -> None:
    assert isinstance(run.tokenizer, SentencePieceTokenizer)
    prompts, history = WORDS.templates, [("inn via tower inn", "inn"), ("tower via inn tower", "")]
    prompt = "goal from oak by red blue end thanks"
    for request in (prompts.ask_feedback(prompt, "inn via tower"), prompts.ask_refinement(prompt, history)):
        ids = run.tokenizer.encode(request)
        assert run.tokenizer.unk_id not in ids
        assert run.tokenizer.decode(ids) == request
    general = run.tokenizer.encode(load("dialogue").ask_feedback(prompt, "inn"))
    assert run.tokenizer.unk_id in general, "which is why the demo has prompts of its own"


def test_neither_batches_nor_order_change_anything(
    run: Run, prompts: list[tuple[int, ...]], originals: list[Response], sampled: Refined
) -> None:
    order = [4, 0, 6, 2, 1, 5, 3]
    shuffled = refined(run, POLICY, WORDS, [prompts[n] for n in order], [originals[n] for n in order], 0.7, 3)
    assert shuffled.trajectories == [sampled.trajectories[n] for n in order]
    part = refined(run, POLICY, WORDS, prompts[2:4], originals[2:4], 0.7, 8)
    assert [rows[2:4] for rows in sampled.answers] == part.answers
    assert refined(run, POLICY, WORDS, prompts, originals, 0.0, 8).answers != sampled.answers


def test_short_room_shortens_histories_and_none_leaves_originals(
    run: Run, prompts: list[tuple[int, ...]], originals: list[Response], caplog: pytest.LogCaptureFixture
) -> None:
    assert WORDS.iterations == 2
    with caplog.at_level(logging.WARNING):
        tight = refined(run, POLICY, WORDS, prompts, originals, 0.7, 8, LocalWriting(inputs=38))
    assert tight.counts.shortened > 0 and "histories shortened" in caplog.text
    assert all(row.ended in ("iterations", "too long") for row in tight.trajectories)
    none = refined(run, POLICY, WORDS, prompts, originals, 0.7, 8, LocalWriting(inputs=4))
    assert none.counts.ended == {"too long": 7} and none.counts.feedbacks == 0
    assert none.answers == [originals, originals] and none.chosen == originals


def test_by_default_there_is_room_for_the_whole_history(run: Run, prompts: list[tuple[int, ...]]) -> None:
    [red] = run.tokenizer.encode("red")
    longest = [Response((red,) * run.codec.lengths.targets, False)] * len(prompts)
    config = SelfRefine(prompts="words", iterations=4)
    found = refined(run, POLICY, config, prompts, longest, 1.0, 8)
    assert found.counts.ended == {"iterations": len(prompts)} and found.counts.shortened == 0
    row = max(found.trajectories, key=lambda row: sum(len(answer.text) for answer in row.answers))
    history = [(y.text, said.text) for y, said in zip(row.answers, row.feedbacks, strict=False)]
    asked = len(run.tokenizer.encode(config.templates.ask_refinement(row.prompt, history)))
    assert asked > 60, "which is more than a prompt and a response have"


def test_a_request_that_does_not_fit_is_refused_not_cut(run: Run) -> None:
    codec = Codec(run.tokenizer, run.codec.templates, Lengths(inputs=6, targets=4))
    writer = LocalWriter(run.lm, run.language_model(POLICY, "policy"), codec, None, 2, run.mesh)
    assert writer.fits("red red red red red") and not writer.fits("red red red red red red")
    with pytest.raises(DataError, match=r"has 6 tokens, and there is room for 5"):
        writer.write(["red", "red red red red red red"], seed=0, temperature=1.0)


def test_equal_requests_get_equal_replies_and_seeds_tell_them_apart(run: Run) -> None:
    codec = Codec(run.tokenizer, run.codec.templates, Lengths(inputs=6, targets=10))
    writer = LocalWriter(run.lm, run.language_model(POLICY, "policy"), codec, None, 3, run.mesh)
    first = writer.write(["red", "blue", "red", "gold"], seed=1, temperature=1.0)
    assert first[0] == first[2]
    assert writer.write(["gold", "red"], seed=1, temperature=1.0) == [first[3], first[0]]
    assert writer.write(["red", "blue", "red", "gold"], seed=2, temperature=1.0) != first


class Fixed:
    """A writer of one text."""

    def __init__(self, text: str, finished: bool = True) -> None:
        self.text, self.finished = text, finished

    def fits(self, prompt: str) -> bool:
        return True

    def write(self, prompts: Sequence[str], *, seed: int, temperature: float) -> list[Written]:
        return [Written(self.text, self.finished) for _ in prompts]


def test_texts_become_responses_that_fit(run: Run, prompts: list[tuple[int, ...]], originals: list[Response]) -> None:
    def answer(writer: Fixed) -> Response:
        return refined_by(writer, WORDS, run.codec, prompts[:1], originals[:1], 0).chosen[0]

    [red] = run.tokenizer.encode("red")
    assert run.codec.lengths.targets == 14
    assert answer(Fixed(" ".join(["red"] * 13))) == Response((red,) * 13, True)
    assert answer(Fixed(" ".join(["red"] * 14))) == Response((red,) * 14, False), "no room for its EOS"
    assert answer(Fixed(" ".join(["red"] * 40))) == Response((red,) * 14, False)
    assert answer(Fixed("red", finished=False)) == Response((red,), False)
    assert answer(Fixed("")) == Response((), True)


def test_a_chat_template_is_respected(tmp_path: pathlib.Path) -> None:
    path = checkpoints.write(tmp_path / "model", "llama3")
    experiment = Experiment(
        model=pretrained.model_config(path),
        data=small.DATA,
        tokenizer=path,
        lengths={"inputs": 96, "targets": 6},
        templates=chat_templates(path),
        tensorboard=False,
    )
    with small.devices(1):
        run = Run.claim(str(tmp_path / "run"), 0, experiment)
    template, tokenizer = load_chat_template(path), run.tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    prompt = run.codec.prompt_ids(template.prompt([{"role": "user", "content": "7 + 1?"}]))
    original = Response(tuple(tokenizer.encode("Not 7!")), True)
    found = refined(run, path, SelfRefine(style="pit", iterations=1), [prompt], [original], 0.0, 2)
    [row] = found.trajectories
    assert row.prompt == tokenizer.decode(prompt) and "<|" not in row.prompt and "7 + 1?" in row.prompt
    request = load("pit").ask_feedback(row.prompt, "Not 7!")
    ids = tokenizer.encode(template.render([{"role": "user", "content": request}], ask=True))
    assert ids[0] == tokenizer.bos_id
    codec = Codec(tokenizer, experiment.templates, Lengths(inputs=len(ids), targets=6))
    sampler = answering.make_sampler(run.lm, codec, "policy", Sampling(temperature=0.0), 1, run.mesh)
    [wanted] = sampler.answer(run.language_model(path, "policy"), [PromptRow(tuple(ids), (0, 0))], _keys(1))
    assert row.feedbacks[0].text == codec.text(wanted.ids).strip()
    assert row.dropped == 0 and row.ended == "iterations"


def test_dialogues_are_answered_in_their_own_form(run: Run) -> None:
    codec = Codec(run.tokenizer, run.codec.templates, Lengths(inputs=20, targets=4))
    params = run.language_model(POLICY, "policy")
    framed = LocalWriter(run.lm, params, codec, ChatFormat(user="red ", assistant=" blue "), 2, run.mesh)
    plain = LocalWriter(run.lm, params, codec, None, 2, run.mesh)
    [one], [same] = (
        w.write([text], seed=0, temperature=0.0) for w, text in ((framed, "gold"), (plain, "red gold blue"))
    )
    assert one == same
    with pytest.raises(ConfigError, match="LocalWriting.form = 'turns'"):
        LocalWriting(form="turns")  # type: ignore[arg-type]


# --- A served model --------------------------------------------------------------------------------------------------


def endpoint(server: ChatServer, **more: Any) -> EndpointConfig:
    limits = Limits(attempts=2, first_wait=0.01, longest_wait=0.05)
    return EndpointConfig(base_url=server.url, model="writer", limits=limits, max_tokens=50, **more)


def critic(turn: Turn) -> None:
    """Find something in every response, and add a word to the last one."""
    text = turn.call.text
    kind = "better" if "Write only the improved response" in text else "feedback"
    turn.reply(f" {kind} {len(text)} \n")


PIT = SelfRefine(style="pit", iterations=2)


def test_a_served_model_refines_and_is_paid_once(tmp_path: pathlib.Path) -> None:
    prompts, originals = ["one", "two", "three"], [Written(f"answer {n}") for n in range(3)]
    with ChatServer(critic) as server:
        writing = EndpointWriting(endpoint=endpoint(server))
        writer = writing.build(tmp_path, progress=False)
        rows = self_refine(PIT, writer, prompts, originals, 0)
        assert len(server.calls) == 3 * 2 * 2 == writer.usage.answered
        assert {call.body["temperature"] for call in server.calls} == {0.7}
        assert all(len(call.body["messages"]) == 1 for call in server.calls)
        for row, prompt in zip(rows, prompts, strict=True):
            asked = PIT.templates.ask_feedback(prompt, row.answers[0].text)
            assert row.feedbacks[0].text == f"feedback {len(asked)}"
            request = PIT.templates.ask_refinement(prompt, [(row.answers[0].text, row.feedbacks[0].text)])
            assert row.answers[1] == Written(f"better {len(request)}")
        again = writing.build(tmp_path, progress=False)
        assert self_refine(PIT, again, prompts[::-1], originals[::-1], 0) == rows[::-1]
        assert len(server.calls) == 12 and again.usage.known == 12
        self_refine(PIT, again, prompts[:1], originals[:1], 1)
        assert len(server.calls) == 16, "another seed is another sample"


def test_seeds_reach_the_server_and_differ_between_calls(tmp_path: pathlib.Path) -> None:
    with ChatServer(lambda turn: turn.reply("same")) as server:
        writer = EndpointWriting(endpoint=endpoint(server, seed=3)).build(tmp_path, progress=False)
        self_refine(PIT, writer, ["x"], [Written("same")], 0)
        assert len({call.body["seed"] for call in server.calls}) == 4
        assert server.calls[0].text == server.calls[2].text, "the same question"


def test_failures_empty_and_cut_replies_of_a_server(tmp_path: pathlib.Path) -> None:
    def script(turn: Turn) -> None:
        text = turn.call.text
        if "broken" in text:
            turn.status(500, "no")
        elif "silent" in text:
            turn.reply(None)
        elif "long" in text:
            choice = {"index": 0, "message": {"role": "assistant", "content": "and so"}, "finish_reason": "length"}
            turn.reply("", choices=[choice])
        else:
            critic(turn)

    with ChatServer(script) as server:
        writer = EndpointWriting(endpoint=endpoint(server)).build(tmp_path, progress=False)
        names = ["broken", "silent", "long", "good"]
        rows = self_refine(PIT, writer, names, [Written("y")] * 4, 0)
    broken, silent, cut, good = rows
    assert broken.ended == silent.ended == "failed" and broken.chosen == silent.chosen == Written("y")
    assert "HTTP 500" in broken.failure and "empty" in silent.failure
    assert cut.feedbacks[0].finished is False and cut.chosen == Written("and so", finished=False)
    assert good.rounds == 2 and good.ended == "iterations"


def test_the_budget_is_that_of_all_calls_and_the_context_is_kept(tmp_path: pathlib.Path) -> None:
    request = PIT.templates.ask_feedback("x", "y")
    one = estimated_tokens(request) + 50
    with ChatServer(critic) as server:
        config = endpoint(server, budget=Budget(tokens=one + 10))
        writer = EndpointWriting(endpoint=config).build(tmp_path / "a", progress=False)
        writer.write([request], seed=0, temperature=0.7)
        with pytest.raises(ConfigError, match="Nothing was sent"):
            writer.write([request], seed=1, temperature=0.2)
        assert len(server.calls) == 1
        writing = EndpointWriting(endpoint=endpoint(server), context=one)
        writer = writing.build(tmp_path / "b", progress=False)
        assert writer.fits(request) and not writer.fits(request + "word " * 3)
        [row] = self_refine(PIT, writer, ["x"], [Written("y")], 0)
        assert row.ended == "too long" and len(server.calls) == 2
        with pytest.raises(ConfigError, match=r"context = 50 must be more than"):
            EndpointWriting(endpoint=endpoint(server), context=50)
