"""A whole tiny run of PIT in pure Python, for an environment with the core only: `python core_pipeline.py DIR`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec
from pit_jax.data.synthetic import SyntheticConfig
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.stages.evaluate import Evaluate
from pit_jax.stages.pipeline import Recipe, Stage
from pit_jax.stages.reward import Reward
from pit_jax.stages.rl import Rl, RlTraining
from pit_jax.stages.run import Experiment
from pit_jax.stages.sft import Sft
from pit_jax.stages.supervised import Training
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import SentencePieceTraining
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

ABSENT = ("tensorflow", "tensorflow_datasets", "seqio", "gin")
OPTIMIZER = Optimizer(learning_rate=3e-3)
TRAINING = Training(batch_size=8, loop=Loop(steps=2), optimizer=OPTIMIZER, evaluation_records=8)
EXPERIMENT = Experiment(
    model=DecoderOnlyConfig(vocab_size=96, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32),
    data=DataSpec(
        generator="pit_jax.data.synthetic:generate",
        config=SyntheticConfig(difficulty="easy", num_records=600),
        folds=Folds(validation_fraction=0.1),
    ),
    tokenizer=SentencePieceTraining(model_type="word", vocab_size=96, special_pieces=("<reference>", "<answer>")),
    lengths={"inputs": 20, "targets": 14},
    templates=Templates(
        policy="{prompt}<answer>",
        improver="{prompt}<reference>{reference}<answer>",
        gap="{prompt}<reference>{reference}<answer>",
    ),
    judge="pit_jax.data.synthetic:quality",
)


def _rl(role: str, **settings: Any) -> Rl:
    reward = {"policy": "reward_bt", "improver": "reward_gap"}[role]
    training = RlTraining(contexts=4, optimizer=OPTIMIZER, rollout_batch=8, evaluation_prompts=4)
    start = f"sft_{role}"
    algorithm = RlConfig(samples_per_prompt=2)
    return Rl(
        name=f"rl_{role}", role=role, training=training, rl=algorithm, init_from=start, anchor=start, reward=reward,
        **settings,
    )  # fmt: skip


def stages() -> tuple[Stage, ...]:
    """Return all stages of PIT, a few steps each."""
    bt = Reward(name="reward_bt", role="bt", init_from="sft_policy", training=TRAINING, report_records=8)
    return (
        Sft(name="sft_policy", role="policy", training=TRAINING),
        Sft(name="sft_improver", role="improver", training=TRAINING, init_from="sft_policy"),
        bt,
        dataclasses.replace(bt, name="reward_gap", role="gap", init_from="reward_bt"),
        _rl("policy", rounds=(Round(name="rlhf", steps=2, references=("chosen",)),)),
        _rl("improver", policy="rl_policy", rounds=(
            Round(name="stage1", steps=1, references=("rejected", "chosen")),
            Round(name="stage2", steps=1, references=("policy",)),
        )),
        Evaluate(
            name="evaluate", original="rl_policy", improver="rl_improver", gap="reward_gap", reward="reward_bt",
            prompts=8, temperatures=(1.0,), iterations=1, best_of=(2,), batch_size=8,
        ),
    )  # fmt: skip


def main(directory: str) -> None:
    """Train everything, and check that what is not in the core was not there."""
    found = [name for name in ABSENT if importlib.util.find_spec(name)]
    if found:
        raise SystemExit(f"this environment has {found}, which the core does not name")
    Recipe(model_dir=directory, seed=0, experiment=EXPERIMENT, stages=stages()).run()


if __name__ == "__main__":
    main(sys.argv[1])
