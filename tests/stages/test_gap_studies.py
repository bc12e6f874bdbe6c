"""The two studies of the gap model, from end to end on a tiny run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.data.synthetic import quality
from pit_jax.decode.batches import Response, as_reference
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages import answering
from pit_jax.stages.gap_study import DIFFERENCE, GapStudy, held_out_pairs
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.programs import stage_programs
from pit_jax.stages.reference_study import BOTH, DOWN, UP, ReferenceStudy
from pit_jax.stages.run import Run

from . import small

ORDER = "reward_gap_order"


def gap_study(**changes: Any) -> GapStudy:
    """Return the study of two gap models."""
    gaps = {"five": "reward_gap", "order": ORDER}
    whole = GapStudy(name="study_gap", gaps=gaps, reward="reward_bt", records=30, batch_size=16)
    return dataclasses.replace(whole, **changes)


def reference_study(**changes: Any) -> ReferenceStudy:
    """Return the study of references."""
    whole = ReferenceStudy(
        name="study_references",
        original="rl_policy:2",
        improver="rl_improver",
        gap="reward_gap",
        reward="reward_bt",
        iterations=3,
        prompts=12,
        batch_size=16,
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def studied(whole: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the finished run that went on with a further gap model and both studies."""
    directory = pathlib.Path(shutil.copytree(whole, tmp_path_factory.mktemp("studies") / "run"))
    ablation = small.reward("gap", name=ORDER, terms=("wl_lw",))
    stages = (*small.stages()[:-1], ablation, gap_study(), reference_study())
    with small.devices(1):
        small.recipe(directory, stages=stages).run()
    return directory


@pytest.fixture(scope="module")
def run(studied: pathlib.Path) -> Run:
    with small.devices(1):
        opened = Run(str(studied), 0, small.experiment())
        assert opened.mesh.size == 1
    return opened


def result(directory: pathlib.Path, stage: str) -> dict[str, Any]:
    return json.loads((directory / stage / "result.json").read_text())


def test_a_finished_run_goes_on_and_nothing_is_made_again(studied: pathlib.Path, whole: pathlib.Path) -> None:
    before, after = small.contents(whole), small.contents(studied)
    own = (ORDER, "study_gap", "study_references", "stages.json")
    kept = {name: data for name, (_, data) in after.items() if name.partition("/")[0] not in own}
    assert kept == {name: data for name, (_, data) in before.items() if name != "stages.json"}


def test_gap_study_has_every_model_with_every_figure(studied: pathlib.Path) -> None:
    rows = {row["name"]: row for row in result(studied, "study_gap")["models"]}
    assert list(rows) == ["five", "order", DIFFERENCE]
    for row in rows.values():
        assert row["n"] == 30
        for share in (*row["holds"].values(), row["all_hold"], row["at_own_zero"], row["at_0"]):
            assert 0 <= share["ci95"][0] <= share["value"] <= share["ci95"][1] <= 1
        assert row["at_own_zero"]["n"] == 60
        assert set(row["holds"]) == {"wl > ww", "wl > ll", "wl > lw", "ww > lw", "ll > lw"}
    difference = rows[DIFFERENCE]
    assert len({share["value"] for share in difference["holds"].values()}) == 1
    assert (difference["zero"]["value"], difference["spread"]) == (0.0, 0.0)
    pages = studied / "study_gap" / "report"
    assert {path.name for path in pages.iterdir()} >= {
        "report.md", "report.html", "report.json", "comparisons.png", "gaps.png",
    }  # fmt: skip
    assert json.loads((pages / "report.json").read_text())["data"]["models"] == list(rows.values())
    assert "order" in (pages / "report.md").read_text()


def test_shares_are_those_of_scores_computed_one_by_one(run: Run, studied: pathlib.Path) -> None:
    pairs = held_out_pairs(run, 30)
    scorer, params = answering.scorer(run, "reward_gap", "gap", 1), run.params("reward_gap")

    def gap(x: tuple[int, ...], y: Response, reference: Response) -> float:
        row = run.codec.gap_prompt(x, as_reference(run.codec, reference))
        return float(scorer.score(params, [row], [y])[0])

    wl = np.array([gap(pair.prompt, pair.chosen, pair.rejected) for pair in pairs])
    ll = np.array([gap(pair.prompt, pair.rejected, pair.rejected) for pair in pairs])
    lw = np.array([gap(pair.prompt, pair.rejected, pair.chosen) for pair in pairs])
    row = result(studied, "study_gap")["models"][0]
    assert row["holds"]["wl > ll"]["value"] == pytest.approx(np.mean(wl > ll))
    assert row["holds"]["ll > lw"]["value"] == pytest.approx(np.mean(ll > lw))


def test_reference_study_follows_every_step(studied: pathlib.Path) -> None:
    found = result(studied, "study_references")
    rows = {row["name"]: row for row in found["pairs"]}
    assert list(rows) == [UP, DOWN, BOTH, "y_1, y_0", "y_2, y_1", "y_3, y_2"]
    assert [row["step"] for row in rows.values()] == [None, None, None, 1, 2, 3]
    assert found["judge"] == "pit_jax.data.synthetic:quality"
    assert rows[UP]["truth"]["value"] == pytest.approx(-rows[DOWN]["truth"]["value"])
    assert rows[BOTH]["n"] == 24
    folder = studied / "study_references" / "responses"
    sets = [
        [json.loads(line) for line in (folder / f"{name}_T1.jsonl").read_text().splitlines()]
        for name in ("original", "improved", "improved_iter2", "improved_iter3")
    ]
    for k in (1, 2, 3):
        row, pairs = rows[f"y_{k}, y_{k - 1}"], list(zip(sets[k], sets[k - 1], strict=True))
        truth = [quality(a["prompt"], a["response"]) - quality(b["prompt"], b["response"]) for a, b in pairs]
        assert row["n"] == len(pairs) == 12
        assert row["truth"]["value"] == pytest.approx(np.mean(truth))
        assert row["right"]["n"] == np.sum(np.abs(truth) > 1e-9)
        assert row["changed"]["value"] == pytest.approx(np.mean([a["ids"] != b["ids"] for a, b in pairs]))
    assert {path.name for path in (studied / "study_references" / "report").iterdir()} >= {
        "report.html", "report.md", "report.json", "agreement.png", "means.png", "histograms.png",
    }  # fmt: skip


def test_an_interrupted_study_of_references_samples_nothing_again(
    studied: pathlib.Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    copy = pathlib.Path(shutil.copytree(studied, tmp_path / "copy"))
    shutil.rmtree(copy / "study_references" / "report")
    (copy / "study_references" / "result.json").unlink()
    before = (studied / "study_references" / "result.json").read_bytes()

    def sampled(*_: Any, **__: Any) -> Any:
        raise AssertionError("a response set was sampled again")

    monkeypatch.setattr("pit_jax.decode.batches.Sampler.answer", sampled)
    with small.devices(1):
        small.recipe(copy, stages=(*small.stages()[:-1], reference_study())).run(["study_references"])
    assert (copy / "study_references" / "result.json").read_bytes() == before
    assert (copy / "study_references" / "report" / "report.html").exists()


def test_without_an_exact_judge_the_reward_model_stands_in(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stage = reference_study(iterations=1, prompts=6)
    run = small.alone(whole, tmp_path / "run", stage, judge=None)
    found = result(pathlib.Path(str(run.directory)), "study_references")
    assert found["judge"].endswith("reward_bt")
    report = json.loads((run.directory / "study_references" / "report" / "report.json").read_text())
    assert "no exact judge" in report["warnings"][0]
    assert "pairs of `y_1, y_0`: what is said of agreement there means little" in report["warnings"][-1]


def test_wrong_models_and_settings_are_named(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="at least one gap model"):
        gap_study(gaps={})
    with pytest.raises(ConfigError, match="leave the name"):
        gap_study(gaps={DIFFERENCE: "reward_gap"})
    with pytest.raises(ConfigError, match="GapStudy.records = 0"):
        gap_study(records=0)
    with pytest.raises(ConfigError, match="ReferenceStudy.iterations = 0"):
        reference_study(iterations=0)
    with pytest.raises(ConfigError, match="ReferenceStudy.temperature"):
        reference_study(temperature=0.0)
    stage = gap_study(gaps={"five": f"{whole}/reward_bt"}, reward=f"{whole}/reward_bt")
    with pytest.raises(CheckpointError, match="role 'gap', but is of role 'bt'"):
        small.alone(whole, tmp_path / "run", dataclasses.replace(stage, reward="reward_bt"))


def test_studies_can_be_planned() -> None:
    mesh = MeshConfig(data=2, fsdp=2)
    stages = (*small.stages()[:-1], small.reward("gap", name=ORDER), gap_study(), reference_study())
    recipe = Recipe(model_dir="run", seed=0, experiment=small.experiment(mesh=mesh), stages=stages)
    found = [[p.name for p in stage_programs(recipe, stage, make_mesh(mesh))[0]] for stage in stages[-2:]]
    assert found[0] == ["scores of reward_gap_order", "reward scores"]
    assert found[1] == ["policy answers", "improver answers", "gap scores"]
