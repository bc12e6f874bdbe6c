"""A nano run of bytes, made in seconds, for the tests of the server."""

from __future__ import annotations

import pathlib

from pit_jax.data.open import DataSpec
from pit_jax.data.synthetic import SyntheticConfig
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.reward import Reward
from pit_jax.stages.run import Experiment
from pit_jax.stages.sft import Sft
from pit_jax.stages.supervised import Training
from pit_jax.text.template import Templates
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

INPUTS, TARGETS = 160, 96


def make_run(directory: pathlib.Path) -> pathlib.Path:
    """Train a policy, an improver and a gap model for a step each."""
    loop = Loop(steps=1, log_every=1, checkpoint_every=1, eval_every=1)
    training = Training(batch_size=2, loop=loop, optimizer=Optimizer(learning_rate=1e-3), evaluation_records=2)
    experiment = Experiment(
        model=DecoderOnlyConfig(
            vocab_size=384, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32, role_embedding=True
        ),
        data=DataSpec(
            generator="pit_jax.data.synthetic:generate", config=SyntheticConfig(difficulty="easy", num_records=200)
        ),
        tokenizer="bytes",
        lengths={"inputs": INPUTS, "targets": TARGETS},
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
