"""Studies and the systems, judges and pairs they are made of, on the small pipeline's checkpoints."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.evaluation.endpoint_config import EndpointConfig
from pit_jax.evaluation.llm_judge import LlmJudgeConfig
from pit_jax.improve.accept import Improve
from pit_jax.stages.jury import Bench
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.study import Study
from pit_jax.stages.systems import BestOf, Improved, Replies, Sampled

from ..evaluation.chat_server import ChatServer
from . import small

KNOWN = {"original": "rl_policy:2", "improver": "rl_improver", "gap": "reward_gap", "reward": "reward_bt"}


def study(whole: pathlib.Path | None = None, **changes: Any) -> Study:
    """Return a study of few prompts, of the stages of the run `whole`."""
    at = KNOWN if whole is None else {name: f"{whole}/{stage}" for name, stage in KNOWN.items()}
    steps = Improve(iterations=2, accept="always")
    systems = (
        Sampled(name="original", policy=at["original"]),
        Sampled(name="resampled", policy=at["original"], sample=1),
        BestOf(name="best_of_2", policy=at["original"], reward=at["reward"], n=2),
        Improved(name="pit", improver=at["improver"], gap=at["gap"], improve=steps),
        Replies(name="chosen", which="chosen"),
    )
    settings = Study(
        name="study",
        title="A study",
        question="Who wins?",
        systems=systems,
        reward=at["reward"],
        gap=at["gap"],
        prompts=12,
        batch_size=16,
        temperatures=(1.0, 0.5),
        rated=True,
        lengths=True,
    )
    return dataclasses.replace(settings, **changes)


def run(whole: pathlib.Path, directory: pathlib.Path, stage: Study) -> dict[str, Any]:
    """Run a study in a directory of its own; return its report."""
    settings = small.experiment(tokenizer=str(whole / "tokenizer"))
    with small.devices(1):
        Recipe(model_dir=str(directory), seed=0, experiment=settings, stages=(stage,)).run()
    return json.loads((directory / stage.name / "report" / "report.json").read_text())


def responses(directory: pathlib.Path, name: str, temperature: str = "1") -> list[str]:
    lines = (directory / "study" / "responses" / f"{name}_T{temperature}.jsonl").read_text().splitlines()
    return [json.loads(line)["response"] for line in lines]


@pytest.fixture(scope="module")
def done(whole: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """A finished study and its report."""
    directory = tmp_path_factory.mktemp("study") / "run"
    return directory, run(whole, directory, study(whole))


def test_every_system_is_compared_by_every_judge(done: tuple[pathlib.Path, dict[str, Any]]) -> None:
    _, report = done
    rows = [
        (row["candidate"], row["baseline"], row["judge"], row["temperature_candidate"]) for row in report["comparisons"]
    ]
    names = ["resampled", "best_of_2", "pit", "pit_iter2", "chosen"]
    scored = [(name, "original", judge, t) for judge in ("exact", "reward_bt") for t in (1.0, 0.5) for name in names]
    assert rows == [*scored, *((name, "original", "reward_gap", 1.0) for name in names)]
    assert {row["system"] for row in report["ratings"][0]["elo"]["rows"]} == {"original", *names}
    assert [row["candidate"] for row in report["lengths"]] == names
    assert [judge["name"] for judge in report["judges"]] == ["exact", "reward_bt", "reward_gap"]
    assert len(report["agreement"]["pairs"]) == 3
    said = {opinion["judge"] for example in report["examples"] for opinion in example["opinions"]}
    assert said == {"exact", "reward_bt", "reward_gap"}


def test_the_second_sample_is_the_one_best_of_n_chooses_from(done: tuple[pathlib.Path, dict[str, Any]]) -> None:
    directory, _ = done
    first, second, best = (responses(directory, name) for name in ("original", "resampled", "best_of_2"))
    assert first != second
    assert all(answer in pair for answer, *pair in zip(best, first, second, strict=True))


def test_replies_are_those_of_the_data(whole: pathlib.Path, done: tuple[pathlib.Path, dict[str, Any]]) -> None:
    from pit_jax.stages.run import Run

    directory, _ = done
    settings = small.experiment(tokenizer=str(whole / "tokenizer"))
    prompts = Run(str(directory), 0, settings).held_out(12)
    assert responses(directory, "chosen") == [prompt.chosen for prompt in prompts]
    assert responses(directory, "chosen", "0.5") == responses(directory, "chosen")


def test_verdicts_are_kept_with_their_reasons(done: tuple[pathlib.Path, dict[str, Any]]) -> None:
    directory, report = done
    kept = directory / "study" / "verdicts" / "reward_gap" / "pit_T1_against_original_T1.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    row = next(row for row in report["comparisons"] if (row["candidate"], row["judge"]) == ("pit", "reward_gap"))
    assert [line["first"] for line in rows] == responses(directory, "pit")
    assert row["delta"] == pytest.approx(100 * np.mean([line["outcome"] for line in rows]))
    assert all(line["reason"] for line in rows)


def endpoint() -> LlmJudgeConfig:
    return LlmJudgeConfig(endpoint=EndpointConfig(base_url="http://127.0.0.1:9/v1", model="judge"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"systems": (Sampled(name="original", policy="rl_policy"),)}, "at least two response sets"),
        ({"systems": (Improved(name="pit", improver="rl_improver", gap="reward_gap"),)}, "made before"),
        ({"pairs": (("pitt", "original"),)}, "'pit'"),
        ({"bench": (Bench(judge=endpoint(), pairs=(("srt", "original"),)),)}, "response sets of the evaluation"),
        ({"temperatures": ()}, "at least one entry"),
        ({"prompts": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_studied_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        study(**changes)


def test_two_systems_of_one_name_are_refused() -> None:
    twice = (*study().systems, Sampled(name="pit_iter2", policy="rl_policy"))
    with pytest.raises(ConfigError, match="pit_iter2"):
        study(systems=twice)


def judged(whole: pathlib.Path, bench: tuple[Bench, ...]) -> Study:
    """Return a study of two systems with further judges."""
    first, *_, last = study(whole).systems
    plain = {"gap": None, "temperatures": (1.0,), "rated": False, "lengths": False}
    return study(whole, systems=(first, last), bench=bench, **plain)


def test_an_endpoint_judges_its_pairs_and_is_paid_once(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bench = (Bench(judge=endpoint(), pairs=(("chosen", "original"),), prompts=5),)
    with ChatServer(lambda turn: turn.reply("The first is better. [[A]]")) as server:
        address = dataclasses.replace(endpoint().endpoint, base_url=server.url)
        asked = (dataclasses.replace(bench[0], judge=LlmJudgeConfig(endpoint=address)),)
        stage = judged(whole, asked)
        report = run(whole, tmp_path / "run", stage)
        calls = len(server.calls)
        shutil.rmtree(tmp_path / "run" / "study")
        again = run(whole, tmp_path / "run", stage)
        assert len(server.calls) == calls, "replies are kept for the run, not for the stage"
    row = next(row for row in report["comparisons"] if row["judge"] == "judge")
    pairs = zip(responses(tmp_path / "run", "chosen"), responses(tmp_path / "run", "original"), strict=True)
    different = sum(chosen != original for chosen, original in list(pairs)[:5])
    assert calls == 2 * different > 0
    assert (row["candidate"], row["n"], row["tie"]) == ("chosen", 5, 100.0), "a contradiction is a tie"
    assert again["comparisons"] == report["comparisons"]
    facts = next(judge for judge in report["judges"] if judge["name"] == "judge")
    assert (facts["questions"], facts["requests"], facts["position"]["first"]) == (5, calls, different)
    kept = tmp_path / "run" / "study" / "verdicts" / "judge" / "chosen_T1_against_original_T1.jsonl"
    assert "The first is better." in kept.read_text()


def test_what_a_judge_that_is_down_leaves_is_said(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with ChatServer(lambda turn: turn.status(401, "no such key")) as server:
        address = dataclasses.replace(endpoint().endpoint, base_url=server.url)
        bench = (Bench(judge=LlmJudgeConfig(endpoint=address), pairs=(("chosen", "original"),), prompts=5),)
        stage = judged(whole, bench)
        with pytest.raises(DataError, match="judge answered none of .* 401"):
            run(whole, tmp_path / "run", stage)
    assert responses(tmp_path / "run", "chosen"), "a later run has only the judge to ask"
