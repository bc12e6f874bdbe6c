"""A run with a policy, an improver and a gap model of bytes, made in seconds: something to serve and to measure."""

from __future__ import annotations

import pathlib

from pit_jax.data.open import DataSpec
from pit_jax.data.synthetic import SyntheticConfig
from pit_jax.models.config import ModelConfig
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.reward import Reward
from pit_jax.stages.run import Experiment
from pit_jax.stages.sft import Sft
from pit_jax.stages.supervised import Training
from pit_jax.text.codec import Lengths
from pit_jax.text.template import Templates
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

VOCABULARY = 384


def byte_run(directory: pathlib.Path, model: ModelConfig, lengths: Lengths, learning_rate: float) -> pathlib.Path:
    """Train each model for a step on synthetic text, and return the run's directory.

    Args:
      directory: where the run goes.
      model: of `VOCABULARY` tokens.
      lengths: of prompts and answers.
      learning_rate: of the one step.
    """
    loop = Loop(steps=1, log_every=1, checkpoint_every=1, eval_every=1)
    training = Training(batch_size=2, loop=loop, optimizer=Optimizer(learning_rate=learning_rate), evaluation_records=2)
    experiment = Experiment(
        model=model,
        data=DataSpec(
            generator="pit_jax.data.synthetic:generate", config=SyntheticConfig(difficulty="easy", num_records=200)
        ),
        tokenizer="bytes",
        lengths=lengths,
        templates=Templates(policy="{prompt}>", improver="{prompt}\n{reference}>", gap="{prompt}\n{reference}>"),
        tensorboard=False,
    )
    stages = (
        Sft(name="sft_policy", role="policy", training=training),
        Sft(name="sft_improver", role="improver", training=training),
        Reward(name="reward_gap", role="gap", init_from="sft_policy", training=training, report_records=4),
    )
    Recipe(model_dir=str(directory), seed=0, experiment=experiment, stages=stages).run()
    return directory
