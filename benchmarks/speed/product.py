"""The product's own programs on made-up data and parameters, for any shape: what the benchmarks time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work
from pit_jax.core.types import Params
from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec
from pit_jax.decode.batches import Sampler
from pit_jax.decode.sampling import Sampling
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import ModelConfig
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.models.presets.catalog import preset
from pit_jax.models.trained import divide
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.rl.rollout import Rollout, rollout, rollout_keys
from pit_jax.sharding import rules
from pit_jax.sharding.mesh import MeshConfig
from pit_jax.stages import answering
from pit_jax.stages.reward import Reward
from pit_jax.stages.rl import Rl, RlTraining
from pit_jax.stages.rl_program import RlProgram
from pit_jax.stages.run import Experiment, Run
from pit_jax.stages.sft import Sft
from pit_jax.stages.supervised import SupervisedProgram, Training, fresh_params, initial_state
from pit_jax.text.codec import PromptRow
from pit_jax.text.template import Templates
from pit_jax.train.loop import Loop, Program
from pit_jax.train.optim import Optimizer
from pit_jax.train.state import TrainState

STEPS = 1_000_000
"""More than are ever run, so that nothing is done that comes at the end."""
OPTIMIZER = Optimizer(learning_rate=1e-5, b2=0.95, weight_decay=0.1, clip_norm=1.0)
REWARD = "reward"
_PLATFORM = {"cpu": {"scan_layers": False}, "gpu": {"remat": "dots"}, "tpu": {"remat": "dots"}}
"""Settings of the model that suit a platform."""


def model_config(shape: Shape, changes: dict[str, Any]) -> ModelConfig:
    """Return the config of a shape with what suits this platform, and `changes` of any field."""
    how = {"dtype": shape.compute} | _PLATFORM[jax.default_backend()] | changes
    if shape.preset is not None:
        return preset(shape.preset, **how)
    return DecoderOnlyConfig(
        vocab_size=shape.vocabulary, width=shape.width, layers=shape.layers, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, mlp=shape.mlp, rope_base=shape.rope_base,
        norm_eps=shape.norm_eps, **how,
    )  # fmt: skip


class MadeUpRun(Run):
    """A run whose every checkpoint holds newly drawn parameters, and whose reward model reads the last token.

    Only where parameters come from is different: networks, batches and programs are those of the stages.
    """

    def params(self, reference: str, lm: ConditionalLM | None = None) -> Params:
        """Return fresh parameters for a checkpoint's name."""
        network = self.reward_model(reference, "") if reference == REWARD else lm or self.lm
        return fresh_params(self, network, reference)

    def language_model(self, reference: str, role: str | None = None, lm: ConditionalLM | None = None) -> Params:
        """Return fresh parameters of a language model."""
        del role
        return self.params(reference, lm)

    def reward_model(self, reference: str, role: str) -> ScalarModel:
        """Return a causal reward model, the kind that other projects have."""
        del reference, role
        return ScalarModel(self.lm, readout="last", attention="causal")


@contextlib.contextmanager
def made_up_run(config: ModelConfig, work: Work, devices: int = 1) -> Iterator[Run]:
    """Open a run on random text whose rows have exactly the lengths of the work; its files go at the end.

    The first `devices` devices share the rows.

    A byte is a token; the template of the gap reward adds one, which stands for a reference's end-of-sequence token.
    """
    with tempfile.TemporaryDirectory(prefix="pit_jax_speed_") as name:
        records = Path(name) / "records.jsonl"
        write_records(records, work)
        experiment = Experiment(
            model=config,
            data=DataSpec(path=str(records), folds=Folds(validation_fraction=0.0)),
            tokenizer="bytes",
            lengths={"inputs": work.prompt, "targets": work.response},
            templates=Templates(
                policy="{prompt}", improver="{prompt}{reference}>", gap="{prompt}{reference}>", bos=False
            ),
            mesh=MeshConfig(data=devices),
            tensorboard=False,
        )
        run = MadeUpRun.claim(str(Path(name) / "run"), 0, experiment)
        with rules.use(run.mesh, run.rules):
            yield run


def write_records(path: Path, work: Work) -> None:
    """Write enough records for a few batches of any stage, each a prompt and two responses of random letters."""
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)

    def text(length: int) -> str:
        return letters[random.integers(0, len(letters), length)].tobytes().decode()

    with path.open("w") as file:
        for number in range(max(12 * work.rows, 64)):
            texts = {
                "prompt": text(work.prompt),
                "chosen": text(work.response - 1),
                "rejected": text(work.response - 1),
            }
            file.write(json.dumps({"id": str(number), "group": str(number), **texts}) + "\n")


class Started(NamedTuple):
    """A program and the state it starts from."""

    program: Program
    state: TrainState


class Changes(NamedTuple):
    """Fields that are not to be the defaults: of the stage (RL: of its `RlConfig`), and of its training."""

    stage: dict[str, Any]
    training: dict[str, Any]


def supervised(run: Run, work: Work, changes: Changes) -> Started:
    """Return the program of fine-tuning (work "sft") or of the gap reward ("gap"), as `stages.supervised.train` does.

    Args:
      run: the run.
      work: which, and how many rows or records an update has.
      changes: of the stage.
    """
    loop = Loop(steps=STEPS)
    training = Training(batch_size=work.rows, loop=loop, optimizer=OPTIMIZER, **changes.training)
    stage: Any
    if work.kind == "sft":
        stage = Sft(name="sft", role="policy", training=training, **changes.stage)
    else:
        stage = Reward(name=REWARD, role="gap", init_from="start", training=training, **changes.stage)
    learning = stage.learning(run)
    frozen, trained = divide(learning.network, fresh_params(run, learning.network, stage.name))
    state, shardings = initial_state(run, learning.network, trained, training.optimizer, STEPS)
    program = SupervisedProgram(
        source=run.source(stage.view, "train", stream=stage.name),
        collator=learning.collator,
        step=learning.step(run, shardings),
        evaluate=lambda _: {},
        key_stream=(run.seed, stage.name),
        mesh=run.mesh,
        frozen=frozen,
    )
    return Started(program, state)


def reinforced(run: Run, work: Work, changes: Changes) -> Started:
    """Return the program of reinforcement learning of a policy, as `Rl.run` does; no sample ends early.

    Args:
      run: the run.
      work: its prompts and samples.
      changes: of the stage.
    """
    training = RlTraining(
        contexts=work.rows // work.samples, optimizer=dataclasses.replace(OPTIMIZER, learning_rate=1e-6),
        rollout_batch=work.rows, evaluation_prompts=1, **changes.training,
    )  # fmt: skip
    stage = Rl(
        name="rl", role="policy", training=training,
        rl=RlConfig(**({"estimator": "rloo", "beta": 0.05, "samples_per_prompt": work.samples} | changes.stage)),
        init_from="start", anchor="anchor", reward=REWARD,
        rounds=(Round(name="all", steps=STEPS, references=("chosen",)),),
    )  # fmt: skip
    frozen, trained = stage.frozen(run, run.language_model(stage.init_from))
    state, shardings = initial_state(run, stage.network(run), trained, training.optimizer, stage.updates)
    kept = Checkpoints(run.stage_directory(stage.name) / "snapshots", keep=None, asynchronous=False)
    parts = stage.parts(run, stage.step(run, shardings), kept, lambda _: {})
    parts = dataclasses.replace(parts, sampler=without_end(parts.sampler))
    return Started(RlProgram(parts, frozen, print), state)


def without_end(sampler: Sampler) -> Sampler:
    """Return the sampler with an end-of-sequence token that is outside of the vocabulary: every answer is cut off."""
    return dataclasses.replace(sampler, eos_ids=(sampler.lm.config.vocab_size,))


class Rollouts:
    """Rollouts of a work's prompts with fresh parameters; other prompts and keys in each."""

    def __init__(self, run: Run, work: Work, changes: dict[str, Any]) -> None:
        draws = {field.name for field in dataclasses.fields(Sampling)} & changes.keys()
        sampling = Sampling(**{name: changes[name] for name in draws})
        others = {name: value for name, value in changes.items() if name not in draws}
        sampler = dataclasses.replace(answering.sampler(run, "policy", sampling, work.batch), **others)
        ends = work.ends(sampler.lm.config.vocab_size)
        self.sampler = dataclasses.replace(sampler, eos_ids=ends) if ends else without_end(sampler)
        self.params = run.language_model("start")
        self._work, self._source, self._step = work, run.source("rl", "train", stream="rollout"), 0
        self._codec = run.codec

    def rows(self) -> list[PromptRow]:
        """Return the next prompts."""
        examples = self._source.take(self._work.rows // self._work.samples)
        return [self._codec.policy_prompt(tuple(example["prompt"].tolist())) for example in examples]

    def __call__(self) -> Rollout:
        """Answer the next prompts."""
        self._step += 1
        keys = rollout_keys(0, self._step, self._work.rows)
        return rollout(self.sampler, self.params, self.rows(), self._work.samples, keys)


class Stepper:
    """A program that is advanced a step at a time, until the new state is there."""

    def __init__(self, made: Started) -> None:
        self._program, self._state = made
        self._step = 0

    def __call__(self) -> dict[str, float]:
        """Do one step, and return the seconds of its phases."""
        self._state, metrics = self._program.advance(self._state, self._step)
        self._step += 1
        jax.block_until_ready((self._state, metrics))
        return self._program.phases.read()


def device_memory() -> int | None:
    """Return the most bytes that the first device has held, None where it does not say (a CPU)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics["peak_bytes_in_use"]
