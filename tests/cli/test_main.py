"""The command line: help, exit statuses, one clear message instead of a traceback."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from pit_jax.cli import arguments, environment
from pit_jax.cli import main as cli
from pit_jax.cli.stages import select_stage
from pit_jax.core.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
VERBS = (
    "pipeline",
    "lm",
    "sft",
    "reward",
    "rl",
    "dpo",
    "evaluate",
    "study-gap",
    "study-references",
    "improve",
    "convert",
    "inspect-data",
    "cache",
    "tokenizer",
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep what `main` sets from reaching other tests."""
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    monkeypatch.setattr(logging.getLogger("pit_jax"), "propagate", True)


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "pit_jax", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def _verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `pit-jax pipeline` raise."""

    def fail(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "pit_jax.cli.stages", types.SimpleNamespace(pipeline=fail))


def test_help_is_quick_and_names_every_verb(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = _run("--help", cwd=tmp_path)
    assert time.monotonic() - begin < 1.0
    assert done.returncode == 0
    for verb in VERBS:
        assert f"    {verb}" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.parse([verb, "--help"])
    assert caught.value.code == 0
    assert f"pit-jax {verb} --" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["pipeline", "--gin.X"],
        ["improve", "--checkpoint=a", "--input=b", "--gin.X=1"],
        ["sft", "--gin"],
    ],
)
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: pit-jax" in capsys.readouterr().err


def test_gin_flags_are_kept_in_order() -> None:
    args = arguments.parse(["sft", "--gin.A=1", "--gin_file=x.gin", "--gin.b/C.d='e=f'", "--gin_file=y.gin"])
    assert args.gin_bindings == ("A=1", "b/C.d='e=f'")
    assert args.gin_file == ["x.gin", "y.gin"]


def test_error_is_one_message_and_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _verb(monkeypatch, DataError("mine.jsonl:3: is not JSON."))
    assert cli.main(["pipeline"]) == 1
    assert capsys.readouterr().err == "pit-jax pipeline: mine.jsonl:3: is not JSON.\n"


def test_what_the_system_refuses_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _verb(monkeypatch, PermissionError(13, "Permission denied", "runs/a"))
    assert cli.main(["pipeline"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("pit-jax pipeline: [Errno 13] Permission denied: 'runs/a'. Check the path")
    assert message.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _verb(monkeypatch, DataError("broken"))
    with pytest.raises(DataError, match="broken"):
        cli.main(["pipeline", "--debug"])


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _verb(monkeypatch, KeyboardInterrupt())
    assert cli.main(["pipeline"]) == 130
    assert "same command again" in capsys.readouterr().err


def test_interrupted_training_brings_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pit_jax.train.loop import Interrupted

    _verb(monkeypatch, Interrupted("sft: stopped after step 3 of 9. Run the same command again to continue.", 143))
    assert cli.main(["pipeline"]) == 143
    assert "Run the same command again" in capsys.readouterr().err


def test_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _verb(monkeypatch, BrokenPipeError())
    assert cli.main(["pipeline"]) == 0
    assert capsys.readouterr().err == ""


def test_reader_that_goes_away_is_no_noise(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"prompt": "p", "chosen": "good", "rejected": "bad"}\n' * 3000)
    command = f"{sys.executable} -m pit_jax inspect-data --input=some.jsonl -n 3000 | head -n 1"
    settings = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.stdout.startswith("3000 records")
    assert done.stderr == ""


def test_missing_recipe_and_missing_macro_end_with_status_1(tmp_path: Path) -> None:
    done = _run("pipeline", "--gin_file=recipes/nothing.gin", cwd=tmp_path)
    assert done.returncode == 1
    assert "recipes/nothing.gin" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "mine.gin").write_text("A = %B\n")
    done = _run("pipeline", "--gin_file=mine.gin", cwd=tmp_path)
    assert done.returncode == 1
    assert "B is required (mine.gin:1)" in done.stderr


def _recipe(*stages: tuple[str, str, str]) -> types.SimpleNamespace:
    named = [types.SimpleNamespace(name=name, verb=verb, role=role) for name, verb, role in stages]
    return types.SimpleNamespace(stages=named)


def test_stage_is_chosen_by_verb_and_role() -> None:
    recipe = _recipe(("sft_policy", "sft", "policy"), ("sft_improver", "sft", "improver"), ("rm", "reward", "bt"))
    assert select_stage(recipe, "sft", "improver") == "sft_improver"
    assert select_stage(recipe, "reward", None) == "rm"
    with pytest.raises(ConfigError, match="--role=policy or --role=improver"):
        select_stage(recipe, "sft", None)
    with pytest.raises(ConfigError, match=r"no stage for 'rl --role=policy'.*sft_policy \(sft --role=policy\)"):
        select_stage(recipe, "rl", "policy")


def test_one_of_several_stages_of_a_role_is_chosen_by_name() -> None:
    recipe = _recipe(("dpo_policy", "dpo", "policy"), ("srt_dpo", "dpo", "policy"))
    assert select_stage(recipe, "dpo", None, "srt_dpo") == "srt_dpo"
    with pytest.raises(ConfigError, match="2 stages for 'dpo'. Choose one with --stage=dpo_policy or --stage=srt_dpo"):
        select_stage(recipe, "dpo", None)
    with pytest.raises(ConfigError, match="no stage for 'dpo --stage=dop'. It has: dpo_policy"):
        select_stage(recipe, "dpo", None, "dop")
    assert arguments.parse(["dpo", "--gin_file=a.gin", "--stage=srt_dpo"]).stage == "srt_dpo"


def test_compilation_cache_is_set_unless_the_user_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    for name in names:
        monkeypatch.delitem(os.environ, name, raising=False)
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path))
    environment.use_compilation_cache("off")
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    environment.use_compilation_cache("auto")
    directory = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert directory.is_relative_to(tmp_path / "pit_jax") and directory.is_dir()
    environment.use_compilation_cache(str(tmp_path / "other"))
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "other"
    environment.use_compilation_cache("auto")
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "other"


def test_compilation_cache_that_cannot_be_made_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    environment.use_compilation_cache(str(tmp_path / "file"))
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_old_compilations_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "JAX_COMPILATION_CACHE_DIR", raising=False)
    environment.use_compilation_cache(str(tmp_path))
    directory = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    (directory / "new").write_text("")
    (directory / "old").write_text("")
    os.utime(directory / "old", (0, 0))
    environment.use_compilation_cache(str(tmp_path))
    assert [path.name for path in directory.iterdir()] == ["new"]
