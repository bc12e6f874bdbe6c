"""A run goes on after its machine has changed: with other numbers of devices, and with other mesh axes."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from . import nano

FLAGS = (
    "--gin.STEPS=8", "--gin.ROUND_STEPS=4", "--gin.CHECKPOINT_EVERY=2", "--gin.loop.Loop.log_every=1",
    "--gin.rl.RlTraining.log_every=1", "--gin.loop.Loop.keep=None", "--gin.rl.RlTraining.keep=None",
)  # fmt: skip
ADAPTERS = ("--gin_file=stages/lora.gin", "--gin.BASE='sft_policy'", "--gin.LORA_RANK=4")
PLANS = {"whole": FLAGS, "adapters": (*FLAGS, *ADAPTERS)}
MESHES = {
    "data": (),
    "fsdp x tensor": ("--gin_file=meshes/fsdp_tensor_4.gin", "--gin.mesh.MeshConfig.tensor=2"),
}
CHANGES = {
    ("whole", 4): [(1, "data"), (8, "data"), (4, "fsdp x tensor")],
    ("whole", 1): [(4, "data")],
    ("adapters", 4): [(1, "data"), (8, "data")],
}
"""How a run was trained and on how many devices -> on how many, and on which mesh, it goes on."""
STOP = 4
"""The step after which the machine changes; with 8 steps the curriculum is at the end of its first round."""


@pytest.fixture(scope="module", params=list(CHANGES), ids=str)
def peace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str, int]:
    """A run in peace with all its checkpoints, how it was trained, and the number of its devices."""
    plan, devices = request.param
    directory = tmp_path_factory.mktemp("elastic") / "peace"
    line = nano.command(directory, ("pipeline",), PLANS[plan])
    nano.run(line, directory.parent / "log", devices=devices)
    return directory, plan, devices


def as_of(step: int, stage: str, peace: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Return a copy of a run as it was when a stage had done so many steps, and the process was killed a bit later."""
    shutil.copytree(peace, target)
    for path in (target / stage).glob("checkpoint_*"):
        if int(path.name.rpartition("_")[2]) > step:
            shutil.rmtree(path)
    for name in ("result.json", "done.json"):
        (target / stage / name).unlink()
    return target


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft_improver", "reward_gap", "rl_improver"])
def test_a_run_goes_on_with_other_devices(
    peace: tuple[pathlib.Path, str, int], tmp_path: pathlib.Path, stage: str
) -> None:
    whole, plan, devices = peace
    expected = nano.records(whole / stage)
    for count, mesh in CHANGES[plan, devices]:
        there = as_of(STOP, stage, whole, tmp_path / f"{count} {mesh}")
        line = nano.command(there, nano.VERBS[stage], (*PLANS[plan], *MESHES[mesh]))
        nano.run(line, tmp_path / "log", devices=count)
        got = nano.records(there / stage)
        assert [(r["step"], r["kind"]) for r in got] == [(r["step"], r["kind"]) for r in expected]
        for mine, theirs in zip(got, expected, strict=True):
            if mine["step"] <= STOP:
                assert mine == theirs
            for name in {"loss", "reward"} & mine.keys():
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (count, mesh, mine["step"], name)
        assert json.loads((there / stage / "done.json").read_text())["step"] == expected[-1]["step"]
