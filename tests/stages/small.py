"""A whole PIT pipeline small enough for tests, and runs of single stages on what it has left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec
from pit_jax.data.readers import ReadConfig
from pit_jax.data.synthetic import SyntheticConfig
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.sharding.mesh import make_mesh
from pit_jax.stages import run as run_module
from pit_jax.stages.evaluate import Evaluate
from pit_jax.stages.pipeline import Recipe, Stage
from pit_jax.stages.reward import Reward
from pit_jax.stages.rl import Rl, RlTraining
from pit_jax.stages.run import Experiment, Run
from pit_jax.stages.sft import Sft
from pit_jax.stages.supervised import Training
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import SentencePieceTraining
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

OPTIMIZER = Optimizer(learning_rate=3e-3)
MODEL = DecoderOnlyConfig(
    vocab_size=96, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp=32, role_embedding=True
)
DATA = DataSpec(
    generator="pit_jax.data.synthetic:generate",
    config=SyntheticConfig(difficulty="easy", num_records=1500),
    folds=Folds(validation_fraction=0.1),
    read=ReadConfig(on_bad_record="skip"),
)
TOKENIZER = SentencePieceTraining(model_type="word", vocab_size=96, special_pieces=("<reference>", "<answer>"))
WITH_REFERENCE = "{prompt}<reference>{reference}<answer>"


def experiment(**changes: Any) -> Experiment:
    """Return the experiment, with some settings changed."""
    return dataclasses.replace(
        Experiment(
            model=MODEL,
            data=DATA,
            tokenizer=TOKENIZER,
            lengths={"inputs": 20, "targets": 14},
            templates=Templates(policy="{prompt}<answer>", improver=WITH_REFERENCE, gap=WITH_REFERENCE),
            judge="pit_jax.data.synthetic:quality",
            compile_threads=0,  # whatever the machine: some tests count what steps compile
            tensorboard=False,
        ),
        **changes,
    )


def training(steps: int = 4, **changes: Any) -> Training:
    """Return a training of a few steps, with a record and a checkpoint every other one."""
    loop = Loop(steps=steps, log_every=2, checkpoint_every=2, eval_every=2)
    return dataclasses.replace(Training(batch_size=8, loop=loop, optimizer=OPTIMIZER, evaluation_records=16), **changes)


def rl_training(**changes: Any) -> RlTraining:
    """Return the training of an RL stage of a few steps."""
    return dataclasses.replace(
        RlTraining(
            contexts=4, optimizer=OPTIMIZER, rollout_batch=16, evaluation_prompts=8, log_every=1, checkpoint_every=2
        ),
        **changes,
    )


def rl_policy(**changes: Any) -> Rl:
    """Return the RLHF stage."""
    return dataclasses.replace(
        Rl(
            name="rl_policy",
            role="policy",
            training=rl_training(),
            rl=RlConfig(samples_per_prompt=4),
            init_from="sft_policy",
            anchor="sft_policy",
            reward="reward_bt",
            rounds=(Round(name="rlhf", steps=4, references=("chosen",)),),
            snapshots=(2,),
        ),
        **changes,
    )


def rl_improver(**changes: Any) -> Rl:
    """Return the improver's RL stage: a round of dataset references, then one of policy samples."""
    rounds = (
        Round(name="stage1", steps=1, references=("rejected", "chosen")),
        Round(name="stage2", steps=2, references=("policy",)),
    )
    return dataclasses.replace(
        rl_policy(),
        name="rl_improver",
        role="improver",
        init_from="sft_improver",
        anchor="sft_improver",
        reward="reward_gap",
        policy="rl_policy:2",
        rounds=rounds,
        snapshots=(),
        **changes,
    )


def sft(role: str, **changes: Any) -> Sft:
    """Return an SFT stage."""
    return dataclasses.replace(Sft(name=f"sft_{role}", role=role, training=training()), **changes)


def reward(role: str, **changes: Any) -> Reward:
    """Return a reward stage."""
    start = "sft_policy" if role == "bt" else "reward_bt"
    whole = Reward(name=f"reward_{role}", role=role, init_from=start, training=training(), report_records=24)
    return dataclasses.replace(whole, **changes)


def evaluate(**changes: Any) -> Evaluate:
    """Return the evaluation."""
    return dataclasses.replace(
        Evaluate(
            name="evaluate",
            original="rl_policy:2",
            improver="rl_improver",
            gap="reward_gap",
            reward="reward_bt",
            prompts=16,
            temperatures=(1.0, 0.5),
            iterations=3,
            best_of=(2,),
            improvers={"pit_sft": "sft_improver", "pit_stage1": "rl_improver:stage1"},
            policies={"policy_longer": "rl_policy"},
            policy_curve={2: "rl_policy:2", 4: "rl_policy:rlhf"},
            original_steps=2,
            batch_size=16,
        ),
        **changes,
    )


def stages() -> tuple[Stage, ...]:
    """Return all stages of a pipeline."""
    supervised = (sft("policy"), sft("improver"), reward("bt"), reward("gap"))
    return (*supervised, rl_policy(), rl_improver(), evaluate())


def recipe(directory: pathlib.Path, *, seed: int = 0, **changes: Any) -> Recipe:
    """Return the whole pipeline."""
    whole = Recipe(model_dir=str(directory), seed=seed, experiment=experiment(), stages=stages())
    return dataclasses.replace(whole, **changes)


@contextlib.contextmanager
def devices(count: int) -> Iterator[None]:
    """Let runs opened inside use the first `count` devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:count]))
        yield


def external(whole: pathlib.Path, stage: Any) -> Any:
    """Return a stage whose references name the stages of the run `whole`."""
    fields = ("init_from", "anchor", "reward", "policy", "original", "improver", "gap")
    there = {field.name for field in dataclasses.fields(stage)} & set(fields)
    named = {name: f"{whole}/{value}" for name in there if (value := vars(stage)[name]) is not None}
    return dataclasses.replace(stage, **named)


def alone(whole: pathlib.Path, directory: pathlib.Path, stage: Any, *, count: int = 1, **changes: Any) -> Run:
    """Run one stage in a directory of its own, on the checkpoints of the run `whole`."""
    settings = experiment(tokenizer=str(whole / "tokenizer"), **changes)
    with devices(count):
        Recipe(model_dir=str(directory), seed=0, experiment=settings, stages=(external(whole, stage),)).run()
    return Run(str(directory), 0, settings)


def records(directory: pathlib.Path, stage: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the metric records of a stage without what depends on the machine."""
    lines = [json.loads(line) for line in (directory / stage / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("timing/")} for line in lines]
    return [line for line in kept if kind in (None, line["kind"])]


def contents(directory: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Return time of change and content of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
