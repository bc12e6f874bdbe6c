"""inspect-data, cache and tokenizer, run as a user runs them, on a small file and a recipe without stages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pit_jax.cli.main import main
from pit_jax.data.cache import read_metadata
from pit_jax.text.tokenizer import load_tokenizer

RECIPE = """
from __gin__ import dynamic_registration
from pit_jax.data import open as data
from pit_jax.models import decoder_only
from pit_jax.stages import pipeline
from pit_jax.stages import run

MODEL_DIR = %gin.REQUIRED

pipeline.Recipe:
  model_dir = %MODEL_DIR
  seed = 0
  stages = []
  experiment = @run.Experiment()
run.Experiment:
  model = @decoder_only.DecoderOnlyConfig()
  data = @data.DataSpec()
  tokenizer = 'bytes'
  lengths = {'inputs': 64, 'targets': 64}
decoder_only.DecoderOnlyConfig:
  layers = 1
  width = 8
  heads = 1
  kv_heads = 1
  head_dim = 8
  mlp = 8
  vocab_size = 300
data.DataSpec.path = 'some.jsonl'
"""
RECORDS = [
    {"prompt": f"Question {n}?", "chosen": f"A good answer to question {n}.", "rejected": f"A bad answer {n}."}
    for n in range(60)
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a data file and a recipe; what `main` puts into the environment does not outlive the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "recipe.gin").write_text(RECIPE)
    return tmp_path


def test_inspect_checks_and_shows_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-data", "--input=some.jsonl", "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert "60 records" in shown
    assert "[chosen] A good answer to question 1." in shown
    assert "question 2" not in shown


def test_bad_lines_stop_or_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "some.jsonl").open("a") as file:
        file.write("{broken\n")
    assert main(["inspect-data", "--input=some.jsonl"]) == 1
    assert "some.jsonl:61: is not JSON" in capsys.readouterr().err
    assert main(["inspect-data", "--input=some.jsonl", "--on-bad-record=skip"]) == 0
    assert "some.jsonl:61" in capsys.readouterr().out


def test_inspect_shows_what_is_trained_on_and_begins_no_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MODEL_DIR is required by the recipe, but looking at data needs none."""
    assert main(["inspect-data", "--gin_file=recipe.gin", "--view=sft_improver", "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "[[" in shown and "A good answer" in shown and "{{" in shown
    assert (
        main(["inspect-data", "--gin_file=recipe.gin", "--gin.MODEL_DIR='run'", "--view=sft_improver", "-n", "1"]) == 0
    )
    assert not (folder / "run").exists()


def test_unknown_view_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-data", "--gin_file=recipe.gin", "--view=sft_polcy"]) == 1
    assert "'sft_policy'" in capsys.readouterr().err


def test_cache_writes_a_view_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["cache", "--gin_file=recipe.gin", "--view=rl", "--output=cached"]
    assert main(flags) == 0
    (place,) = (path.parent for path in (folder / "cached").rglob("metadata.json"))
    assert read_metadata(place).count > 0
    assert main(flags) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0


def test_tokenizer_from_a_file_and_from_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--input", "some.jsonl", "--vocab_size=300", "--output=first"]) == 0
    assert main(["tokenizer", "--gin_file=recipe.gin", "--vocab_size=300", "--output=second"]) == 0
    assert load_tokenizer(folder / "first").vocab_size == 300
    assert main(["tokenizer", "--input", "some.jsonl", "--vocab_size=300", "--output=first"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["tokenizer", "--gin_file=recipe.gin", "--output=third"]) == 1
    assert "--vocab_size" in capsys.readouterr().err
