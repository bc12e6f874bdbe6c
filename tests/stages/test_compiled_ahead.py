"""What a stage compiles ahead is what it calls: nothing is compiled twice, and every number stays the same."""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax import monitoring

from pit_jax.losses.policy import PolicyLoss
from pit_jax.models.lora import Lora
from pit_jax.rl.config import RlConfig
from pit_jax.sharding.mesh import MeshConfig
from pit_jax.stages.dpo import Dpo
from pit_jax.stages.run import Adapters

from . import small

COMPILED = "/jax/core/compile/backend_compile_duration"
ANSWERING = {"_run", "batch_scores", "token_scores"}
PPO = RlConfig(samples_per_prompt=4, estimator="ppo", policy=PolicyLoss(kind="ppo_clip"), epochs=2, minibatches=2)
TRAINING = small.training(2)
MESHES = {1: MeshConfig(), 4: MeshConfig(data=2, fsdp=1, tensor=2)}
CASES = {
    "sft": (small.sft("improver", training=TRAINING), {"step", "measured"}),
    "micro": (small.sft("policy", training=small.training(2, micro_batches=2)), {"step", "measured"}),
    "gap": (small.reward("gap", training=TRAINING), {"step", "measured"}),
    "dpo": (Dpo(name="dpo", init_from="sft_policy", training=TRAINING, report_records=24), {"step", "measured"}),
    "rloo": (small.rl_policy(), {"step"} | ANSWERING),
    "improver": (small.rl_improver(), {"step"} | ANSWERING),
    "ppo": (small.rl_policy(rl=PPO), {"step", "token_values"} | ANSWERING),
}


class Watch:
    """Notes which functions are compiled by threads that compile ahead, and which by calls."""

    def __init__(self) -> None:
        self.ahead: list[str] = []
        self.called: list[str] = []

    def __call__(self, event: str, duration_secs: float, **fields: str | int) -> None:
        if event == COMPILED:
            ahead = threading.current_thread().name.startswith("compiling")
            (self.ahead if ahead else self.called).append(str(fields["fun_name"])[len("jit(") : -1])


@pytest.fixture
def watch() -> Iterator[Watch]:
    jax.clear_caches()  # or programs that other tests have called would not be compiled again
    listener = Watch()
    monitoring.register_event_duration_secs_listener(listener)
    yield listener
    monitoring.unregister_event_duration_listener(listener)


def _run(whole: pathlib.Path, directory: pathlib.Path, stage: Any, count: int, **experiment: Any) -> list[Any]:
    small.alone(whole, directory, stage, count=count, mesh=MESHES[count], **experiment)
    return small.records(directory, stage.name)


def _check(watch: Watch, wanted: set[str]) -> None:
    assert set(watch.ahead) == wanted
    assert not set(watch.called) & wanted


FAST = (("sft", 1), ("rloo", 1))
ALL = [pytest.param(n, c, marks=[] if (n, c) in FAST else pytest.mark.slow) for n in CASES for c in MESHES]


@pytest.mark.parametrize(("case", "count"), ALL)
def test_calls_find_what_was_compiled_ahead(
    case: str, count: int, whole: pathlib.Path, tmp_path: pathlib.Path, watch: Watch
) -> None:
    stage, wanted = CASES[case]
    ahead = _run(whole, tmp_path / "ahead", stage, count, compile_threads=2)
    _check(watch, wanted)
    watch.ahead.clear()
    assert ahead == _run(whole, tmp_path / "called", stage, count, compile_threads=0)
    assert not watch.ahead


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft", "improver"])
def test_adapters_too(case: str, whole: pathlib.Path, tmp_path: pathlib.Path, watch: Watch) -> None:
    stage, wanted = CASES[case]
    adapters = Adapters(base=f"{whole}/sft_policy", lora=Lora(rank=2, alpha=4.0))
    if case == "sft":
        stage = dataclasses.replace(stage, init_from="sft_policy")
    _run(whole, tmp_path, stage, 1, compile_threads=2, adapters=adapters)
    _check(watch, wanted)


@pytest.mark.slow
def test_samplers_that_draft_too(whole: pathlib.Path, tmp_path: pathlib.Path, watch: Watch) -> None:
    stage, wanted = CASES["improver"]
    _run(whole, tmp_path, stage, 1, compile_threads=2, draft_tokens=2)
    _check(watch, wanted)
