"""launch/local.sh: a recipe's name becomes the pipeline's command, quotes and spaces stay, processes are one job."""

from __future__ import annotations

import pathlib
import signal

import pytest

from .tools import FLAGS, Tools, alive, line, wait_for

SEVERAL = ("--processes=3", "--tries=3", "--backoff=0")


@pytest.fixture
def tools(tmp_path: pathlib.Path) -> Tools:
    return Tools.install(tmp_path / "fakes", "nvidia-smi")


def _process(words: list[str]) -> int:
    return int(words[-1].partition("=")[2])


@pytest.mark.parametrize("recipe", ["demo", "recipes/demo.gin"])
def test_dry_run_shows_the_command(tools: Tools, recipe: str) -> None:
    words = ("runs/a b", "--gin.TOKENIZER='my model'", "--dry-run", "--gin.RANDOM_SEED=2")
    done = tools.run("local.sh", recipe, *words, PIT_JAX="my pit-jax")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "my pit-jax",
        "pipeline",
        "--gin_file=recipes/demo.gin",
        "--gin.MODEL_DIR='runs/a b'",
        "--gin.TOKENIZER='my model'",
        "--gin.RANDOM_SEED=2",
    ]


def test_dry_run_shows_the_command_of_every_process(tools: Tools) -> None:
    done = tools.run("local.sh", "demo", "runs/a b", "--dry-run", *SEVERAL)
    assert [text.split()[-1] for text in done.stdout.splitlines()] == [f"--process_id={n}" for n in range(3)]
    assert not tools.words("pit-jax")


@pytest.mark.parametrize("status", [0, 1, 143])
def test_runs_the_program_once_and_returns_its_status(tools: Tools, status: int) -> None:
    tools.write("pit-jax.statuses", str(status))
    assert tools.run("local.sh", "demo", "runs/a", *FLAGS).returncode == status
    assert tools.words("pit-jax") == [line("runs/a", *FLAGS)]


def test_several_processes_are_one_job(tools: Tools) -> None:
    done = tools.run("local.sh", "demo", "runs/a", "--processes=3", "--devices=2", *FLAGS)
    assert done.returncode == 0
    calls = sorted(tools.calls("pit-jax"), key=lambda call: _process(call["words"]))
    assert [call["words"][:-3] for call in calls] == [line("runs/a", *FLAGS)] * 3
    assert [call["words"][-2:] for call in calls] == [["--process_count=3", f"--process_id={n}"] for n in range(3)]
    assert len({call["words"][-3] for call in calls}) == 1
    assert calls[0]["words"][-3].startswith("--coordinator_address=127.0.0.1:")
    assert {call["environment"]["JAX_NUM_CPU_DEVICES"] for call in calls} == {"2"}


def test_gpus_are_shared_out(tools: Tools) -> None:
    tools.run("local.sh", "demo", "runs/a", "--processes=2", CUDA_VISIBLE_DEVICES="0,2,3,5")
    seen = {_process(call["words"]): call["environment"]["CUDA_VISIBLE_DEVICES"] for call in tools.calls("pit-jax")}
    assert seen == {0: "0,2", 1: "3,5"}
    assert tools.run("local.sh", "demo", "runs/a", "--processes=3", CUDA_VISIBLE_DEVICES="0,1").returncode == 2


@pytest.mark.parametrize(("status", "attempts"), [("143", 2), ("75", 2), ("137", 2), ("1", 1), ("2", 1), ("130", 1)])
def test_one_process_that_ends_ends_the_others(tools: Tools, status: str, attempts: int) -> None:
    tools.write("pit-jax.statuses", f"last{status}", "hang", "hang")
    done = tools.run("local.sh", "demo", "runs/a", *SEVERAL)
    assert done.returncode == (0 if attempts == 2 else int(status))
    assert len(tools.words("pit-jax")) == 3 * attempts
    assert len(tools.hanging()) == 2 and not any(map(alive, tools.hanging()))


def test_gives_up(tools: Tools) -> None:
    tools.write("pit-jax.statuses", *["143"] * 9)
    done = tools.run("local.sh", "demo", "runs/a", "--tries=3", "--backoff=0")
    assert done.returncode == 143
    assert len(tools.words("pit-jax")) == 3
    assert "giving up" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_all_processes_are_asked_to_stop_when_interrupted(tools: Tools, sent: signal.Signals) -> None:
    tools.write("pit-jax.statuses", "hang", "hang")
    launcher = tools.start("local.sh", "demo", "runs/a", "--processes=2", "--tries=3")
    wait_for(lambda: len(tools.hanging()) == 2)
    launcher.send_signal(sent)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + sent
    assert not any(map(alive, tools.hanging()))
    assert len(tools.words("pit-jax")) == 2


def test_usage(tools: Tools) -> None:
    assert "RECIPE MODEL_DIR" in tools.run("local.sh", "--help").stdout
    wrong = tools.run("local.sh", "demo")
    assert wrong.returncode == 2
    assert "RECIPE MODEL_DIR" in wrong.stderr
