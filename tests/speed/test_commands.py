"""Each benchmark runs at a tiny size, and says what it measured, on what, and by which command."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLOW = pytest.mark.slow


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--shape=tiny", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        pytest.param("rollout", "rollout", marks=SLOW),
        ("sft_step", "sft"),
        pytest.param("gap_step", "gap", marks=SLOW),
        pytest.param("rl_step", "rl", marks=SLOW),
    ],
)
def test_a_benchmark(tmp_path: pathlib.Path, module: str, kind: str) -> None:
    said = run(module, "--steps=2", f"--output={tmp_path}", "--set", "scan_layers=True")
    found = json.loads((tmp_path / f"{kind}-tiny-pit_jax.json").read_text())
    assert f"-m benchmarks.{module} --shape=tiny" in said and f"-m benchmarks.{module}" in found["command"]
    assert len(found["seconds"]) == 2 and found["median"] > 0 and found["memory"] > 2**26
    assert found["extra"]["ceilings"]["matmul"] > 1e9 and 0 < found["extra"]["mfu"] < 1
    assert found["extra"]["model"]["scan_layers"] is True
    if kind == "rollout":
        assert found["extra"]["tokens"] == found["work"]["rows"] * found["work"]["response"]


@SLOW
def test_drafting_says_how_many_passes_it_saves(tmp_path: pathlib.Path) -> None:
    arguments = ("--rows=2", "--prompt=16", "--response=8", "--drafts", "3", "--right", "0.0", "1.0", "--repeats=2")
    said = run("drafting", *arguments, f"--output={tmp_path}")
    found = json.loads((tmp_path / "drafting-tiny-2.json").read_text())
    assert "-m benchmarks.drafting --shape=tiny" in said and "-m benchmarks.drafting" in found["command"]
    assert [(one["drafted"], one["passes"]) for one in found["results"]] == [(0, 7), (3, 7), (0, 7), (3, 2)]
    assert all(len(one["seconds"]) == 2 and one["ratio"] > 0 for one in found["results"])


@SLOW
def test_answers_that_end_early_are_counted_as_they_are(tmp_path: pathlib.Path) -> None:
    made = []
    for name, stage in (("plain", []), ("replaced", ["--stage", "portions=2"])):
        said = run("rollout_ending", "--steps=2", f"--output={tmp_path}", f"--variant={name}", *stage)
        found = json.loads((tmp_path / f"ending-tiny-pit_jax-{name}.json").read_text())
        made.append(found["extra"]["tokens"])
        assert "| -       |" in said and found["tokens_per_second"] == pytest.approx(made[-1] / found["median"])
    # Rows that are replaced get the same samples.
    assert made[0] == made[1] and found["work"]["rows"] < made[0] < found["work"]["rows"] * found["work"]["response"]


@SLOW
def test_growth_measures_every_size(tmp_path: pathlib.Path) -> None:
    sizes = ("--tokens=64", "--rows", "4", "8", "--responses", "4", "8")
    said = run("growth", *sizes, "--steps=2", f"--output={tmp_path}")
    assert "| 8    | 8            |" in said and "| 8      | " in said
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [one["work"]["rows"] for one in found["sft"]] == [4, 8]
    assert [one["work"]["response"] for one in found["rl"]] == [4, 8]
    assert len({one["work"]["rows"] * one["work"]["response"] for one in found["rl"]}) == 2


@SLOW
def test_the_comparison_prints_the_rows_of_the_page(tmp_path: pathlib.Path) -> None:
    arguments = ("--work", "rollout", "--peers=", "--rounds=2", "--steps=2", "--ours", "scan=--set scan_layers=True")
    said = run("peers.compare", *arguments, f"--output={tmp_path}")
    assert "rollout, round 2, pit_jax scan" in said and "| rollout, tiny | CPU" in said
    assert len(json.loads((tmp_path / "rollout-tiny-pit_jax.json").read_text())["seconds"]) == 4


@pytest.mark.parity
@SLOW
@pytest.mark.parametrize("work", ["sft", "rollout", "ending", "rl"])
def test_the_loop_of_transformers(tmp_path: pathlib.Path, work: str) -> None:
    pytest.importorskip("transformers")
    run("peers.transformers_peer", f"--work={work}", "--steps=1", "--warmup=1", f"--output={tmp_path}")
    assert json.loads((tmp_path / f"{work}-tiny-transformers.json").read_text())["by"] == "transformers"
