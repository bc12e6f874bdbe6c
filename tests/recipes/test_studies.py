"""The studies: that each is a recipe which goes on from the demo, and (slow) that each runs to its report."""

from __future__ import annotations

import json
import pathlib

import pytest

from pit_jax.cli import shipped
from pit_jax.io import serialize
from pit_jax.stages.pipeline import Recipe

from . import shrunk

STUDIES = [pathlib.Path(name).stem for name in shipped.studies()]
PUBLISHED = {
    "main_table",
    "curriculum",
    "temperature",
    "iterations",
    "gap_loss",
    "reward_on_references",
    "accept_rule",
    "length",
}


COMPARED = ("study.Study.prompts=6", "study.Study.batch_size=8")
"""Few prompts for a study that compares systems."""
FEW = {
    "curriculum": (*COMPARED, "ALONE_STEPS=1"),
    "gap_loss": ("gap_study.GapStudy.records=12",),
    "reward_on_references": ("reference_study.ReferenceStudy.prompts=6", "reference_study.ReferenceStudy.iterations=2"),
}
"""The same for the others."""


def study(name: str, *bindings: str) -> Recipe:
    return shrunk.recipe(name, *bindings, folder="studies")


def test_there_is_a_study_for_every_comparison_of_the_papers() -> None:
    assert set(STUDIES) >= PUBLISHED


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_goes_on_from_the_demo(name: str) -> None:
    """It shares the demo's directory, so what the demo has made must be the same to the last setting."""
    demo, found = shrunk.recipe("demo"), study(name)
    assert (found.model_dir, found.seed) == (demo.model_dir, demo.seed)
    assert found.experiment == demo.experiment
    made = {stage.name: serialize.to_json(stage) for stage in demo.stages}
    shared = [stage for stage in found.stages if stage.name in made]
    assert shared and all(serialize.to_json(stage) == made[stage.name] for stage in shared)
    found.check_references()


@pytest.mark.parametrize("name", STUDIES)
def test_header_has_the_command(name: str) -> None:
    text = (shipped.gin_directory() / "studies" / f"{name}.gin").read_text()
    assert f"pit-jax pipeline --gin_file=studies/{name}.gin" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study_runs_to_its_report(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk.use_devices(monkeypatch, 1)
    recipe = study(name, f"MODEL_DIR='{tmp_path}/run'", *shrunk.STEPS, *shrunk.SYNTHETIC, *FEW.get(name, COMPARED))
    shrunk.without_pairs(recipe).run()
    last = tmp_path / "run" / recipe.stages[-1].name / "report"
    assert {"report.md", "report.html", "report.json"} <= {path.name for path in last.iterdir()}
    assert list(last.glob("*.png"))
    assert json.loads((last / "report.json").read_text())["title"]
