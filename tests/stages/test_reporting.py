"""The report of a run: everything needed to make it again is in it, and it warns of reward models that are too weak."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from pit_jax.io import files
from pit_jax.stages import reporting, together
from pit_jax.stages.reporting import TrainingRecords
from pit_jax.stages.run import Run

from . import small


def _run(whole: pathlib.Path) -> Run:
    return Run(str(whole), 0, small.experiment(tokenizer=str(whole / "tokenizer")))


def test_the_report_names_all_it_was_made_from(whole: pathlib.Path) -> None:
    rerun = json.loads((whole / "report" / "report.json").read_text())["rerun"]
    manifest = files.read_json(whole / "evaluate" / "stage.json")
    assert rerun["seed"] == 0
    assert rerun["versions"] == together.versions()
    assert rerun["inputs"] == {**manifest["inputs"], "tokenizer": manifest["tokenizer"]}
    made_from = files.json_hash(files.read_json(whole / "reward_gap" / "stage.json"))
    assert rerun["inputs"]["reward_gap"] == made_from
    assert json.loads(rerun["settings"])["stage"] == manifest["stage"]
    assert "Run it again" in (whole / "report" / "report.html").read_text()


def test_rerun_has_the_command_line_and_the_configuration(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run.json", "evaluate/stage.json"):
        files.write_text(tmp_path / name, (whole / name).read_text())
    (tmp_path / "config.gin").write_text(f"MODEL_DIR = '{tmp_path}'\nx = '{tmp_path}2'\ny = '{tmp_path}/sft'\n")
    run = Run(str(tmp_path), 0, small.experiment(tokenizer=str(whole / "tokenizer")))
    words = ["pipeline", "--gin_file=recipes/demo.gin", "--gin.MODEL_DIR='runs/a b'"]
    for program in ("/usr/bin/pit-jax", "/usr/lib/python/pit_jax/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, *words])
        found = reporting.rerun(run, small.evaluate())
        assert found.command == "pit-jax pipeline --gin_file=recipes/demo.gin '--gin.MODEL_DIR='\"'\"'runs/a b'\"'\"''"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    found = reporting.rerun(run, small.evaluate())
    assert found.command == "pit-jax pipeline --gin_file=MODEL_DIR/config.gin"
    assert found.config == f"MODEL_DIR = 'MODEL_DIR'\nx = '{tmp_path}2'\ny = 'MODEL_DIR/sft'\n"


def test_training_of_every_kind_is_shown(whole: pathlib.Path) -> None:
    records = reporting.training_records(_run(whole))
    assert set(records.supervised()) == {"sft_policy", "sft_improver", "reward_bt", "reward_gap"}
    assert set(records.reinforced()) == {"rl_policy", "rl_improver"}
    assert any("eval/loss" in record for record in records.supervised()["sft_policy"])
    (cost,) = records.notes()
    assert cost.startswith("Tokens trained on, in millions: sft_policy ")
    assert "rl_improver" in cost and "evaluate" not in cost


def test_rl_that_ended_with_alarms_is_warned_of() -> None:
    def records(*alarms: float) -> TrainingRecords:
        train = [{"kind": "train", "step": 10 * n, "alarms": on} for n, on in enumerate(alarms, start=1)]
        return TrainingRecords(manifests={"rl": {"verb": "rl"}}, results={"rl": {}}, metrics={"rl": train})

    assert records(0.0, 1.0, 0.0).warnings() == []
    (warning,) = records(1.0, 0.0, 0.2, 2.0).warnings()
    assert warning.startswith("rl ended with alarms of reward hacking on (all records from step 30 ")
    assert "from step 10 " in records(1.0).warnings()[0]


def test_weak_reward_models_are_warned_of() -> None:
    def records(**accuracy: float) -> TrainingRecords:
        found = {name.replace("_", " "): {"value": value, "n": 10} for name, value in accuracy.items()}
        return TrainingRecords(
            manifests={"gap": {"verb": "reward"}, "other": {"verb": "study"}},
            results={"gap": {"accuracy": found}, "other": {}},
            metrics={"gap": [], "other": []},
        )

    assert records(right=0.95, longer_baseline=0.5).warnings() == []
    (warning,) = records(right=0.95, also_right=0.9).warnings()
    assert warning.startswith("gap is right on 0.900 of held-out records for also right")
    assert records(right=0.5, right_clean=0.99).warnings() == []
