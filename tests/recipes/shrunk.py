"""Recipes as objects, whole or shrunk to a few steps of a tiny model on records written here."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import pytest

from pit_jax.cli import shipped
from pit_jax.cli.gin_config import GinSource, build
from pit_jax.cli.stages import ROOT
from pit_jax.sharding.mesh import make_mesh
from pit_jax.stages import run as run_module
from pit_jax.stages.pipeline import Recipe

RECIPES = tuple(pathlib.Path(name).stem for name in shipped.recipes())
REQUIRED = {
    "MODEL_DIR": "'run'",
    "DATA_PATH": "'mine.jsonl'",
    "HH_PATH": "'hh.jsonl'",
    "TEXT_PATH": "'text.jsonl'",
    "TOKENIZER": "'bytes'",
    "INITIAL_CHECKPOINT_PATH": repr(str(pathlib.Path(__file__).parents[1] / "data" / "hf" / "qwen2")),
    "MIXTURE_OR_TASK_NAME": "'mine'",
    "MIXTURE_OR_TASK_MODULE": "'my_tasks'",
}
"""A value for every macro that some recipe leaves to the user."""
RIVALS = ("dpo_policy", "srt_tune", "srt_dpo")
SUPERVISED = ("pretrain", "sft_policy", "sft_improver", "reward_bt", "reward_gap", *RIVALS)
REINFORCED = ("rl_policy", "rl_improver", "rl_improver_stage2")

STEPS = (
    *(f"{stage}/loop.Loop.steps=2" for stage in SUPERVISED),
    *(f"{stage}/loop.Loop.eval_every=0" for stage in SUPERVISED),
    *(f"{stage}/optim.Optimizer.warmup_steps=0" for stage in (*SUPERVISED, *REINFORCED)),
    *(f"{name}/curriculum.Round.steps=1" for name in ("stage1", "stage2", "stage2_alone")),
    "rlhf/curriculum.Round.steps=2",
    "loop.Loop.log_every=1",
    "loop.Loop.checkpoint_every=0",
    "rl.RlTraining.contexts=4",
    "rl.RlTraining.rollout_batch=8",
    "rl.RlTraining.micro_batches=1",
    "rl.RlTraining.evaluation_prompts=4",
    "rl.RlTraining.log_every=1",
    "rl.RlTraining.eval_every=0",
    "rl_config.RlConfig.samples_per_prompt=2",
    "rl_policy/rl.Rl.snapshots=(1,)",
    *(f"{stage}/reward.Reward.report_records=8" for stage in ("reward_bt", "reward_gap")),
    "supervised.Training.evaluation_records=8",
    *(f"{stage}/supervised.Training.batch_size=4" for stage in SUPERVISED),
    "evaluate.Evaluate.prompts=4",
    "evaluate.Evaluate.batch_size=4",
    "evaluate.Evaluate.temperatures=(1.0,)",
    "evaluate.Evaluate.iterations=1",
    "evaluate.Evaluate.best_of=(2,)",
    "run.Experiment.tensorboard=False",
)
"""Two steps of every stage, on a handful of records."""
CURVE = ("evaluate.Evaluate.policy_curve={1: 'rl_policy:1'}", "evaluate.Evaluate.original_steps=1")
# A model tuned for two steps writes no feedback that could choose pairs: see `without_pairs`.
SRT = ("srt_data/srt_data.SrtData.prompts=600", "srt_tune/srt_tune.SrtTune.held_out=0.3", "srt_dpo/dpo.Dpo.pairs=None")
SYNTHETIC = ("synthetic.SyntheticConfig.num_records=1500", "ORIGINAL='rl_policy:1'", *CURVE, *SRT)
BYTES = (
    "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 12}",
    *(f"{stage}/pack.Packing.rows=4" for stage in SUPERVISED),
    *(f"{stage}/pack.Packing.inputs=96" for stage in SUPERVISED),
    *(f"{stage}/pack.Packing.targets=24" for stage in SUPERVISED),
    *(f"{stage}/pack.Packing.segments=4" for stage in SUPERVISED),
)
"""Bytes as tokens, packed rows."""


def recipe(
    name: str, *bindings: str, more: Sequence[str] = (), without: str | None = None, folder: str = "recipes"
) -> Recipe:
    """Return a shipped recipe with required macros bound to something where `bindings` do not.

    more: further gin files. without: a macro that is not bound. folder: "recipes" or "studies".
    """
    defaults = tuple(f"{macro}={value}" for macro, value in REQUIRED.items() if macro != without)
    return build(GinSource(files=(f"{folder}/{name}.gin", *more), bindings=bindings, defaults=defaults), ROOT).value


def without_pairs(found: Recipe) -> Recipe:
    """Return a recipe without the stage that needs a model tuned by SRT to speak its format."""
    return dataclasses.replace(found, stages=tuple(stage for stage in found.stages if stage.name != "srt_pairs"))


def write_preferences(path: pathlib.Path, count: int = 150) -> str:
    """Write preferences in the HH format and return the path."""
    rows = (
        {"prompt": f"\n\nHuman: {n} + 1?\n\nAssistant:", "chosen": f"It is {n + 1}.", "rejected": f"Not {n}!"}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(path: pathlib.Path, count: int = 80) -> str:
    """Write documents to pre-train on and return the path."""
    path.write_text("".join(json.dumps({"text": f"After {n} comes {n + 1}. " * 2}) + "\n" for n in range(count)))
    return str(path)


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let runs see only the first `count` devices."""
    monkeypatch.setattr(run_module, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:count]))


def results(directory: pathlib.Path) -> dict[str, list[float]]:
    """Return every number that the finished stages of a run have reported."""
    found = {path.parent.name: json.loads(path.read_text()) for path in directory.glob("*/result.json")}
    return {
        stage: [float(leaf) for leaf in jax.tree.leaves(result) if isinstance(leaf, int | float)]
        for stage, result in found.items()
    }
