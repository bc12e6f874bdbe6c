"""The real command on several hosts is the run of one host; what does not go together is refused; who dies is named."""

from __future__ import annotations

import json
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pit_jax.sharding.processes import EXIT_LOST

from .together import ROOT, Host, finish, flags, pipeline, records, start, wait_for

FEW = {
    "loop.Loop.checkpoint_every": 0,
    "rl.RlTraining.checkpoint_every": 0,
    "sft_policy/loop.Loop.steps": 2,
    "reward_bt/loop.Loop.steps": 2,
    "rlhf/curriculum.Round.steps": 2,
    "rl_policy/rl.Rl.snapshots": (),
}
SUPERVISED = ("sft_policy", "sft_improver", "reward_bt", "reward_gap")
TWENTY = {f"{stage}/loop.Loop.steps": 20 for stage in SUPERVISED} | {
    "rlhf/curriculum.Round.steps": 20,
    "stage1/curriculum.Round.steps": 10,
    "stage2/curriculum.Round.steps": 10,
    "loop.Loop.checkpoint_every": 0,
    "rl.RlTraining.checkpoint_every": 0,
    "dpo_policy/loop.Loop.steps": 20,
    "srt_tune/loop.Loop.steps": 20,
    "evaluate.Evaluate.policies": {"dpo": "dpo_policy"},
}
EVERY_STAGE = str(ROOT / "tests" / "hosts" / "every_stage.gin")
CUT_MODEL = {"mesh.MeshConfig.data": 1, "mesh.MeshConfig.fsdp": 2, "mesh.MeshConfig.tensor": 2}


def assert_same_training(left: pathlib.Path, right: pathlib.Path, stages: tuple[str, ...]) -> None:
    """Check that the first record is the same to 1e-6 and all to 1e-4 (of 1, where values are smaller)."""
    for stage in stages:
        pairs = list(zip(records(left, stage), records(right, stage), strict=True))
        assert pairs
        for ours, theirs in pairs:
            tolerance = 1e-6 if ours["step"] == 1 else 1e-4
            assert ours.keys() == theirs.keys()
            # A policy begins as its own reference: its margins are 0 but for rounding, whose sign makes the accuracy.
            chance = {"accuracy"} if stage == "dpo_policy" else set()
            for name in ours.keys() - {"kind"} - chance:
                where = f"{stage}, step {ours['step']}, {name}"
                np.testing.assert_allclose(theirs[name], ours[name], rtol=tolerance, atol=tolerance, err_msg=where)


def few(directory: pathlib.Path, settings: dict[str, Any] | None = None) -> list[str]:
    """Return the command of the recipe with few stages."""
    bound = FEW | (settings or {})
    unused = ("evaluate.", "stage1/", "stage2/", "reward_gap/", "rl_improver/", "sft_improver/", "ORIGINAL")
    recipe = str(ROOT / "tests" / "hosts" / "few_stages.gin")
    given = [flag for flag in flags(directory, bound, recipe) if not flag.removeprefix("--gin.").startswith(unused)]
    return ["pipeline", *given]


@pytest.mark.slow
def test_two_hosts_train_what_one_trains(tmp_path: pathlib.Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(tmp_path / "one_logs", [few(one)], devices=2))
    hosts = start(tmp_path / "two_logs", [few(two)] * 2, devices=1)
    finish(hosts)
    assert_same_training(one, two, ("sft_policy", "reward_bt", "rl_policy"))
    for stage in ("sft_policy", "reward_bt", "rl_policy"):
        manifests = [json.loads((run / stage / "stage.json").read_text()) for run in (one, two)]
        assert manifests[0] == manifests[1]
    # The second host says nothing while all is well; the lines of its collectives' library are not ours.
    assert "rl_policy: done" in hosts[0].said()
    assert [line for line in hosts[1].said().splitlines() if not line.startswith("[Gloo]")] == []


def test_hosts_with_different_settings_are_refused(tmp_path: pathlib.Path) -> None:
    commands = [few(tmp_path / "run"), few(tmp_path / "run", {"sft_policy/loop.Loop.steps": 3})]
    hosts = start(tmp_path / "logs", commands, devices=1)
    assert [host.wait(60) for host in hosts] == [1, 1]
    for number, host in enumerate(hosts):
        assert f"pit-jax pipeline, process {number}: start: process 1 (" in host.said()
        assert "in settings.recipe.stages.0.training.loop.steps: 3, not 2" in host.said()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_hosts_without_a_common_directory_are_refused(tmp_path: pathlib.Path) -> None:
    places = [tmp_path / "host_0", tmp_path / "host_1"]
    for place in places:
        place.mkdir()
    command = [*few(pathlib.Path("run")), "--process_timeout=4"]
    hosts = start(tmp_path / "logs", [command] * 2, devices=1, directories=places)
    assert [host.wait(60) for host in hosts] == [1, 1]
    for host in hosts:
        assert "is not shared: process 1 (" in host.said()
    assert not (places[1] / "run").exists()


@pytest.mark.slow
def test_hosts_with_different_data_are_refused(tmp_path: pathlib.Path) -> None:
    places = [tmp_path / "host_0", tmp_path / "host_1"]
    for number, place in enumerate(places):
        place.mkdir()
        rows = [{"prompt": f"say {n}", "chosen": f"{n} it is", "rejected": f"no {n + number}"} for n in range(300)]
        (place / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {"data.DataSpec.path": "pairs.jsonl", "data.DataSpec.generator": None, "data.DataSpec.config": None}
    settings |= {"run.Experiment.judge": None, "run.Experiment.tokenizer": "bytes"}
    settings |= {
        "decoder_only.DecoderOnlyConfig.vocab_size": 259, "TASK_FEATURE_LENGTHS": {"inputs": 30, "targets": 20}
    }  # fmt: skip
    given = [flag for flag in few(tmp_path / "run", settings) if "synthetic." not in flag]
    # A policy learns from the chosen replies alone, which are the same; a reward model from both.
    hosts = start(tmp_path / "logs", [given] * 2, devices=1, directories=places)
    assert [host.wait(300) for host in hosts] == [1, 1]
    for host in hosts:
        assert "data of reward_bt: process 1 (" in host.said() and "in examples" in host.said()
    assert (tmp_path / "run" / "sft_policy" / "result.json").exists()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Every stage on one process with one device."""
    directory = tmp_path_factory.mktemp("one_device") / "run"
    pipeline(directory, TWENTY, EVERY_STAGE, processes=1, devices=1)
    return directory


ALL = (*SUPERVISED, "rl_policy", "rl_improver", "dpo_policy", "srt_tune")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 2), (4, 1)])
def test_every_stage_is_the_same_on_any_number_of_hosts(
    one_device: pathlib.Path, tmp_path: pathlib.Path, processes: int, devices: int
) -> None:
    directory = tmp_path / "run"
    pipeline(directory, TWENTY, EVERY_STAGE, processes=processes, devices=devices)
    assert_same_training(one_device, directory, ALL)
    assert_same_answers(one_device, directory, "*")


def assert_same_answers(left: pathlib.Path, right: pathlib.Path, pattern: str) -> None:
    """Check that the responses of the evaluation are the same, token for token."""
    names = sorted(path.name for path in (left / "evaluate" / "responses").glob(f"{pattern}.jsonl"))
    assert names
    for name in names:
        ours, theirs = ((run / "evaluate" / "responses" / name).read_text() for run in (left, right))
        assert ours == theirs, name


@pytest.mark.slow
def test_every_stage_is_the_same_where_hosts_share_a_model(one_device: pathlib.Path, tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "run"
    pipeline(directory, TWENTY | CUT_MODEL, EVERY_STAGE, processes=2, devices=2)
    assert_same_training(one_device, directory, ALL)
    assert_same_answers(one_device, directory, "*_T0")


def killed(command: list[str], logs: pathlib.Path, victim: int, moment: Callable[[], None]) -> list[Host]:
    """Start a recipe on two hosts, and kill one of them at a moment."""
    hosts = start(logs, [[*command, "--process_timeout=5"]] * 2, devices=1)
    moment()
    hosts[victim].kill()
    return hosts


SAVED = {"loop.Loop.checkpoint_every": 2, "sft_policy/loop.Loop.steps": 6, "rlhf/curriculum.Round.steps": 6}
SAVED |= {"rl.RlTraining.checkpoint_every": 2}


@pytest.fixture(scope="module")
def in_peace(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The recipe with few stages on two hosts, undisturbed."""
    directory = tmp_path_factory.mktemp("in_peace") / "run"
    finish(start(directory.parent / "logs", [few(directory, SAVED)] * 2, devices=1))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sft_policy/checkpoint_2", "rl_policy/checkpoint_4"])
def test_a_host_that_dies_is_named_and_a_restart_goes_on(
    in_peace: pathlib.Path, tmp_path: pathlib.Path, place: str
) -> None:
    directory = tmp_path / "run"
    command = few(directory, SAVED)
    hosts = killed(command, tmp_path / "logs", 1, lambda: wait_for(directory / place, 900))
    assert hosts[0].wait(60) == EXIT_LOST, hosts[0].said()
    assert "process 0: process 1 (" in hosts[0].said() and "no sign of life for 5 s" in hosts[0].said()
    finish(start(tmp_path / "again", [command] * 2, devices=1))
    for stage in ("sft_policy", "reward_bt", "rl_policy"):
        assert records(directory, stage) == records(in_peace, stage), stage


@pytest.mark.slow
def test_the_others_end_when_the_first_host_dies(in_peace: pathlib.Path, tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "run"
    command = few(directory, SAVED)
    hosts = killed(command, tmp_path / "logs", 0, lambda: wait_for(directory / "sft_policy" / "checkpoint_4", 900))
    assert hosts[1].wait(60) in (EXIT_LOST, -signal.SIGABRT)  # the runtime is quicker than we are
    finish(start(tmp_path / "again", [command] * 2, devices=1))
    assert records(directory, "rl_policy") == records(in_peace, "rl_policy")


@pytest.mark.slow
def test_improve_answers_the_same_on_two_hosts(one_device: pathlib.Path, tmp_path: pathlib.Path) -> None:
    drafts = tmp_path / "drafts.jsonl"
    lines = (one_device / "evaluate" / "responses" / "original_T1.jsonl").read_text().splitlines()
    # A response that was cut off has no room for its end.
    ended = [row for row in map(json.loads, lines) if row["finished"] and row["response"]]
    drafts.write_text("".join(f"{json.dumps({name: row[name] for name in ('prompt', 'response')})}\n" for row in ended))
    outputs = [tmp_path / f"{count}.jsonl" for count in (1, 2)]
    for count, output in enumerate(outputs, start=1):
        command = ["improve", f"--checkpoint={one_device}", f"--input={drafts}", f"--output={output}"]
        finish(start(tmp_path / f"logs_{count}", [command] * count, devices=1))
    assert [json.loads(line)["improved"] for line in outputs[0].read_text().splitlines()] == [
        json.loads(line)["improved"] for line in outputs[1].read_text().splitlines()
    ]
