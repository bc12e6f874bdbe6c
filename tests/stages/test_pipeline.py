"""The pipeline from end to end: what it leaves, that it can be run again, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.rl.curriculum import Round
from pit_jax.stages.artifact import Artifact, finished_stages
from pit_jax.stages.run import Run
from pit_jax.text.template import Templates

from . import small

ROW = {
    "candidate", "baseline", "judge", "n", "win", "lose", "tie", "delta", "ci95", "temperature_candidate",
    "temperature_baseline", "seed",
}  # fmt: skip
SYSTEMS = {
    "pit", "pit_iter2", "pit_iter3", "pit_raw", "pit_raw_iter2", "pit_raw_iter3", "pit_sft", "pit_sft_raw",
    "pit_stage1", "pit_stage1_raw", "best_of_2", "policy_longer",
}  # fmt: skip


@pytest.fixture
def copied(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run, at another place and with other times."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "moved", copy_function=shutil.copy))


def test_every_stage_finishes_and_is_complete(whole: pathlib.Path) -> None:
    names = [stage.name for stage in small.stages()]
    assert [path.name for path in finished_stages(epath.Path(whole))] == names
    for stage in small.stages()[:-1]:
        steps = [record["step"] for record in small.records(whole, stage.name, "train")]
        assert steps == ([2, 4] if stage.verb != "rl" else list(range(1, steps[-1] + 1)))
        done = json.loads((whole / stage.name / "done.json").read_text())
        assert done["step"] == steps[-1]
        assert np.isfinite([value for value in done["train"].values()]).all()
        assert not [key for key in done["train"] if key.startswith("timing/")]


def test_report_has_every_comparison_with_every_key(whole: pathlib.Path) -> None:
    report = json.loads((whole / "report" / "report.json").read_text())
    rows = report["comparisons"]
    assert all(set(row) >= ROW and row["n"] == 16 for row in rows)
    exact = [row for row in rows if row["judge"] == "exact" and row["baseline"] == "original"]
    assert {row["candidate"] for row in exact if row["temperature_candidate"] == 1.0} == SYSTEMS
    assert {row["candidate"] for row in exact if row["temperature_candidate"] == 0.5} >= {"pit", "pit_raw"}
    assert {row["judge"] for row in rows} == {"exact", "reward_bt"}
    for row in rows:
        assert row["win"] + row["lose"] + row["tie"] == pytest.approx(100)
        assert row["delta"] == pytest.approx(row["win"] - row["lose"])
        assert row["ci95"][0] <= row["delta"] <= row["ci95"][1]
    assert [entry["rlhf_steps"] for entry in report["policy_curve"]] == [2, 4]
    assert report["original_steps"] == 2
    assert set(report["reward_models"]) == {"reward_bt", "reward_gap"}
    assert len(report["reward_models"]["reward_gap"]["accuracy"]) == 11
    assert {path.name for path in (whole / "report").iterdir()} >= {"report.md", "report.html", "delta.png"}
    assert str(whole) not in json.dumps(report), "a report is read elsewhere"


def test_a_judge_row_can_be_computed_from_the_response_files(whole: pathlib.Path) -> None:
    from pit_jax.data.synthetic import quality

    def scores(name: str) -> np.ndarray:
        lines = (whole / "evaluate" / "responses" / f"{name}_T1.jsonl").read_text().splitlines()
        return np.array([quality(row["prompt"], row["response"]) for row in map(json.loads, lines)])

    difference = scores("pit_raw") - scores("original")
    result = json.loads((whole / "report" / "report.json").read_text())
    row = next(r for r in result["comparisons"] if (r["candidate"], r["baseline"]) == ("pit_raw", "original"))
    assert row["win"] == pytest.approx(100 * np.mean(difference > 1e-9))
    assert row["lose"] == pytest.approx(100 * np.mean(difference < -1e-9))


def test_iterated_improvement_never_comes_back_from_a_rejection(whole: pathlib.Path) -> None:
    def texts(name: str) -> list[str]:
        path = whole / "evaluate" / "responses" / f"{name}_T1.jsonl"
        return [json.loads(line)["response"] for line in path.read_text().splitlines()]

    start, first, second = texts("original"), texts("pit"), texts("pit_iter2")
    assert [b for a, b, c in zip(start, first, second, strict=True) if a == b and b != c] == []


def test_kl_is_zero_at_first_and_positive_once_the_policy_moves(whole: pathlib.Path) -> None:
    for stage in ("rl_policy", "rl_improver"):
        first, *later = small.records(whole, stage, "train")
        assert first["kl/mean"] == pytest.approx(0, abs=1e-4)
        assert all(record["kl/mean"] > 0.01 and record["kl/k3"] > 0.01 for record in later)
        assert all(record["sampler_delta/max"] < 1e-4 for record in [first, *later])


def test_running_again_changes_no_file(copied: pathlib.Path) -> None:
    before = small.contents(copied)
    with small.devices(1):
        small.recipe(copied).run()
    assert small.contents(copied) == before


def test_another_seed_is_refused_by_name(whole: pathlib.Path) -> None:
    before = small.contents(whole)
    with pytest.raises(CheckpointError, match="seed: 0 -> 1.*another MODEL_DIR"):
        small.recipe(whole, seed=1).run()
    assert small.contents(whole) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": dataclasses.replace(small.MODEL, width=24)}, "model.width: 16 -> 24"),
        ({"templates": Templates(policy="{prompt}<reference>")}, "templates.policy"),
        ({"data": dataclasses.replace(small.DATA, window=7)}, "data.window: 20000 -> 7"),
    ],
)
def test_another_experiment_is_refused_by_name(whole: pathlib.Path, change: dict, named: str) -> None:
    before = small.contents(whole)
    with pytest.raises(CheckpointError, match=named):
        small.recipe(whole, experiment=small.experiment(**change)).run()
    assert small.contents(whole) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_stage_config_is_refused_by_name(copied: pathlib.Path, finished: bool) -> None:
    if not finished:
        (copied / "sft_policy" / "result.json").unlink()
    before = small.contents(copied)
    other = (small.sft("policy", z_loss=0.1), *small.stages()[1:])
    with small.devices(1), pytest.raises(CheckpointError, match="sft_policy.*z_loss: 0.0 -> 0.1"):
        small.recipe(copied, stages=other).run()
    assert small.contents(copied) == before


def test_settings_that_have_made_nothing_may_be_mended(tmp_path: pathlib.Path) -> None:
    small_vocabulary = dataclasses.replace(small.MODEL, vocab_size=20)
    with small.devices(1):
        with pytest.raises(ConfigError, match="vocab_size = 20 must be at least the tokenizer's"):
            small.recipe(tmp_path, experiment=small.experiment(model=small_vocabulary)).run(["sft_policy"])
        with pytest.raises(ConfigError, match="Lengths.inputs = 1 must be more than"):
            small.recipe(tmp_path, experiment=small.experiment(lengths={"inputs": 1, "targets": 14})).run()
        run = Run.claim(str(tmp_path), 0, small.experiment())
    assert run.tokenizer.vocab_size > 20
    assert not list(tmp_path.glob("*/stage.json"))


def test_unfinished_stage_is_named_when_a_later_one_is_asked_for(tmp_path: pathlib.Path) -> None:
    with small.devices(1), pytest.raises(CheckpointError, match="'sft_policy' is not finished"):
        small.recipe(tmp_path).run(["reward_bt"])
    with pytest.raises(ConfigError, match="no stage 'reward_pt'.*Did you mean 'reward_bt'"):
        small.recipe(tmp_path).run(["reward_pt"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"init_from": "sft_polcy"}, "'sft_polcy'.*Did you mean 'sft_policy'"),
        ({"policy": "rl_policy:3"}, "'rl_policy:3', but 'rl_policy' keeps .'2', 'rlhf'."),
        ({"anchor": "sft_improver:last"}, "keeps no snapshots"),
        ({"reward": "evaluate"}, "'evaluate', but no stage before it"),
    ],
)
def test_unknown_references_are_named_before_anything_is_trained(
    tmp_path: pathlib.Path, change: dict, named: str
) -> None:
    stages = [
        stage if stage.name != "rl_improver" else dataclasses.replace(stage, **change) for stage in small.stages()
    ]
    with pytest.raises(ConfigError, match=named):
        small.recipe(tmp_path / "new", stages=tuple(stages)).run()
    assert not (tmp_path / "new").exists()


def test_snapshots_are_the_parameters_of_their_step(whole: pathlib.Path) -> None:
    artifact = Artifact(whole / "rl_policy")
    last, named, middle = (artifact.params(name) for name in (None, "rlhf", "2"))
    jax.tree.map(np.testing.assert_array_equal, last, named)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), last, middle))) > 1e-4
    with pytest.raises(CheckpointError, match="no snapshot '3'; it has .'2', 'rlhf'."):
        artifact.params("3")


def test_deleted_stage_is_trained_again_to_the_same_end(copied: pathlib.Path, whole: pathlib.Path) -> None:
    shutil.rmtree(copied / "sft_improver")
    with small.devices(1):
        small.recipe(copied).run()
    assert small.records(copied, "sft_improver") == small.records(whole, "sft_improver")
    names = [path.name for path in finished_stages(epath.Path(copied))]
    assert names == [stage.name for stage in small.stages()]


def test_stage_made_from_another_upstream_is_refused(copied: pathlib.Path) -> None:
    shutil.rmtree(copied / "sft_improver")
    other = small.sft("improver", z_loss=1e-4)
    stages = tuple(other if stage.name == other.name else stage for stage in small.stages())
    with small.devices(1), pytest.raises(CheckpointError, match="rl_improver was made from another 'sft_improver'"):
        small.recipe(copied, stages=stages).run()


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ({"improvers": {"pit_raw": "sft_improver"}}, "pit_raw"),
        ({"policies": {"policy_2": "rl_policy"}}, "policy_2"),
        ({"improvers": {"a": "sft_improver", "a_raw": "sft_improver"}}, "a_raw"),
    ],
)
def test_names_of_systems_must_differ(names: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=f"{fault}.*occur twice"):
        small.evaluate(**names)


def test_stage_names_must_be_usable() -> None:
    with pytest.raises(ConfigError, match="different names"):
        small.recipe(pathlib.Path("x"), stages=(small.sft("policy"), small.sft("policy")))
    with pytest.raises(ConfigError, match="'report'"):
        small.recipe(pathlib.Path("x"), stages=(small.sft("policy", name="report"),))
    with pytest.raises(ConfigError, match="Recipe.stages.*'a:b'"):
        small.recipe(pathlib.Path("x"), stages=(small.sft("policy", name="a:b"),))


@pytest.mark.slow
def test_evaluation_continues_and_does_not_depend_on_the_batch_size(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    short = {"temperatures": (1.0,), "improvers": {}, "policies": {}, "policy_curve": {}, "original": "rl_policy"}
    half = small.evaluate(batch_size=5, prompts=11, **short)
    run = small.alone(whole, tmp_path / "half", half)
    responses = run.directory / "evaluate" / "responses"
    for system in ("pit", "best_of_2"):
        mine = (responses / f"{system}_T1.jsonl").read_text().splitlines()
        assert len(mine) == 11
    (run.directory / "evaluate" / "result.json").unlink()
    (responses / "pit_iter2_T1.jsonl").unlink()
    before = (run.directory / "report" / "report.json").read_text()
    small.alone(whole, tmp_path / "half", half)
    assert (run.directory / "report" / "report.json").read_text() == before
    other = small.alone(whole, tmp_path / "all", small.evaluate(batch_size=16, prompts=16, **short))
    for system in ("original", "pit", "pit_raw_iter3"):
        more = (other.directory / "evaluate" / "responses" / f"{system}_T1.jsonl").read_text().splitlines()
        assert more[:11] == (responses / f"{system}_T1.jsonl").read_text().splitlines()


def test_rl_needs_rounds_that_fit() -> None:
    with pytest.raises(ConfigError, match="multiple of the round's 3 references"):
        rounds = (Round(name="a", steps=1, references=("policy", "chosen", "rejected")),)
        dataclasses.replace(small.rl_improver(), rounds=rounds)
    with pytest.raises(ConfigError, match=r"Rl.snapshots = \[9\]"):
        small.rl_policy(snapshots=(9,))
