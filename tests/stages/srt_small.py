"""The stages of SRT, small enough for tests, on a tokenizer that has their pieces."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from pit_jax.srt.critics import FunctionCriticConfig
from pit_jax.srt.text import SrtText
from pit_jax.stages.dpo import Dpo
from pit_jax.stages.pipeline import Recipe, Stage
from pit_jax.stages.run import Experiment
from pit_jax.stages.srt_data import SrtData
from pit_jax.stages.srt_pairs import SrtPairs
from pit_jax.stages.srt_tune import SrtTune
from pit_jax.stages.supervised import Training
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

from ..srt.formats import PIECES, special
from . import small

CRITIC = FunctionCriticConfig(critique="pit_jax.data.synthetic:critique", score="pit_jax.data.synthetic:rating")
TEXT = special(targets=44)


def experiment(**changes: Any) -> Experiment:
    """Return the small experiment with SRT's pieces in its tokenizer."""
    pieces = dataclasses.replace(small.TOKENIZER, special_pieces=PIECES)
    return small.experiment(tokenizer=pieces, model=dataclasses.replace(small.MODEL, width=32, layers=1), **changes)


def training(steps: int, **changes: Any) -> Training:
    """Return a training that learns the format in a few steps."""
    loop = Loop(steps=steps, log_every=steps // 2, checkpoint_every=steps // 2, eval_every=steps)
    whole = Training(batch_size=32, loop=loop, optimizer=Optimizer(learning_rate=1e-2, warmup_steps=5))
    return dataclasses.replace(whole, evaluation_records=16, **changes)


def data(**changes: Any) -> SrtData:
    """Return the stage that makes the records."""
    whole = SrtData(name="srt_data", model="sft_policy", critic=CRITIC, prompts=96, batch_size=32)
    return dataclasses.replace(whole, **changes)


def tune(text: SrtText = TEXT, steps: int = 60, **changes: Any) -> SrtTune:
    """Return the first stage of SRT."""
    whole = SrtTune(name="srt_tune", init_from="sft_policy", data="srt_data", text=text, training=training(steps))
    return dataclasses.replace(whole, **changes)


def pairs(**changes: Any) -> SrtPairs:
    """Return the stage that makes the pairs."""
    return dataclasses.replace(SrtPairs(name="srt_pairs", model="srt_tune", prompts=64, batch_size=32), **changes)


def dpo(**changes: Any) -> Dpo:
    """Return the second stage of SRT."""
    whole = Dpo(name="srt_dpo", init_from="srt_tune", pairs="srt_pairs", beta=0.01, training=small.training(2))
    return dataclasses.replace(whole, report_records=8, **changes)


def stages() -> tuple[Stage, ...]:
    """Return all of SRT, from the base model on."""
    return small.sft("policy", training=training(60)), data(), tune(), pairs(), dpo()


def recipe(directory: pathlib.Path, **changes: Any) -> Recipe:
    """Return a run of SRT."""
    whole = Recipe(model_dir=str(directory), seed=0, experiment=experiment(), stages=stages())
    return dataclasses.replace(whole, **changes)
