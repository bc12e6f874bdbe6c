"""Reinforcement learning: RLHF of the policy and curriculum RL of the improver (arXiv 2310.00898, section 3.4)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jax.sharding import Mesh

from pit_jax.core.errors import invalid
from pit_jax.core.rng import key_for
from pit_jax.core.types import Params
from pit_jax.data.views import Example
from pit_jax.decode.batches import Response, Sampler, Scorer, as_reference, row_keys
from pit_jax.decode.sampling import Sampling
from pit_jax.evaluation import judges
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models.heads import ValueModel
from pit_jax.models.trained import Network, divide
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Context, Curriculum, Round, contexts
from pit_jax.rl.experience import objective
from pit_jax.rl.monitor import MonitorConfig
from pit_jax.sharding.place import row_parts
from pit_jax.stages import answering
from pit_jax.stages.artifact import SNAPSHOTS
from pit_jax.stages.rl_program import Frozen, HeldOut, Parts, RlProgram
from pit_jax.stages.run import Run
from pit_jax.stages.supervised import initial_state, run_files
from pit_jax.text.codec import PromptRow
from pit_jax.train.best import KeepBest
from pit_jax.train.loop import Loop, finished, fit
from pit_jax.train.optim import Optimizer, learning_rate
from pit_jax.train.state import TrainState
from pit_jax.train.step import Step, make_step

ROLES = ("policy", "improver")
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlTraining:
    """How an RL stage is trained; the number of steps is that of its rounds.

    contexts: prompts (for the improver: prompts with a reference) of a step, each answered G times.
    micro_batches: parts the N = contexts x G samples are cut into to save memory.
    rollout_batch: rows of the one compiled sampling program; must divide N to waste nothing.
    share_prompts: whether a prompt is computed once for its G samples, in training and where the reward model's
      attention allows it (`ScalarModel.attention = "causal"`). It changes no result but by rounding, and with several
      updates a step which samples share one. Prompts that cannot be cut evenly into minibatches and micro-batches
      are not shared in training.
    evaluation_prompts: held-out prompts answered by each look of the judge; judge_every: steps between them for
      the monitor (0: never); an evaluation record is written every eval_every steps and at the end.
    """

    contexts: int
    optimizer: Optimizer
    micro_batches: int = 1
    rollout_batch: int = 256
    share_prompts: bool = True
    evaluation_prompts: int = 256
    judge_every: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int | None = 2
    keep_best: KeepBest | None = None

    def loop(self, steps: int) -> Loop:
        """Return the loop of so many steps."""
        return Loop(
            steps=steps, log_every=self.log_every, eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every, keep=self.keep, keep_best=self.keep_best,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rl:
    """Stage: maximise E[reward] - beta KL(model || anchor) on D_RL.

    role: "policy" (M_P with reward R_P) or "improver" (M_PIT with r_gap of the answer over its reference).
    init_from: where the parameters come from; anchor: the frozen SFT model of the same role; reward: the
      reward stage; policy: who writes references of kind "policy", needed where a round names them.
    rounds: the curriculum. For the policy, references only say what lengths and rewards are compared with.
    policy_sampling: of those references. The model itself is always sampled as it is, at temperature 1: the
      gradient and the KL would be of another distribution otherwise.
    snapshots: further numbers of steps after which parameters are kept for good, as `name:STEPS`. The end of
      every round is kept as `name:ROUND`.
    """

    verb: ClassVar[str] = "rl"
    name: str
    role: Literal["policy", "improver"]
    training: RlTraining
    rl: RlConfig
    init_from: str
    anchor: str
    reward: str
    rounds: tuple[Round, ...]
    policy: str | None = None
    snapshots: tuple[int, ...] = ()
    policy_sampling: Sampling = Sampling()
    monitor: MonitorConfig = MonitorConfig()

    def __post_init__(self) -> None:
        """Check that the parts fit together; make lists from gin hashable."""
        object.__setattr__(self, "rounds", tuple(self.rounds))
        object.__setattr__(self, "snapshots", tuple(self.snapshots))
        if self.role not in ROLES:
            raise invalid("Rl.role", self.role, f"be one of {ROLES}", "Choose one of them.")
        sampled = {"policy", "improver"} & {kind for entry in self.rounds for kind in entry.references}
        if sampled and self.role == "policy":
            rule = "be 'chosen' or 'rejected' for the policy, which does not see them"
            raise invalid("Round.references", sorted(sampled), rule, "Use ('chosen',).")
        if sampled and self.policy is None:
            rule = f"name a policy stage, because a round has references {sorted(sampled)}"
            raise invalid("Rl.policy", self.policy, rule, "Set it, for example to 'rl_policy'.")
        self.curriculum.check_contexts(self.training.contexts)
        learning_rate(self.training.optimizer, self.curriculum.steps * self.rl.updates)
        late = [step for step in self.snapshots if not 0 < step <= self.curriculum.steps]
        if late:
            rule = f"lie in 1..{self.curriculum.steps}, the steps of all rounds"
            raise invalid("Rl.snapshots", late, rule, "Remove them, or lengthen a round.")

    @property
    def curriculum(self) -> Curriculum:
        """The rounds as a curriculum."""
        return Curriculum(rounds=self.rounds)

    def kept(self) -> dict[str, int]:
        """Return the names of all snapshots and the steps after which they are taken."""
        names = {str(step): step for step in self.snapshots}
        done = 0
        for entry in self.rounds:
            done += entry.steps
            names[entry.name] = done
        return names

    def inputs(self) -> list[str]:
        """Return every checkpoint that is read."""
        return [self.init_from, self.anchor, self.reward, *([] if self.policy is None else [self.policy])]

    def network(self, run: Run) -> Network:
        """Return what is trained: the language model, for PPO with a value head."""
        lm = run.lm_of(self)
        return ValueModel(lm) if self.rl.estimator == "ppo" else lm

    @property
    def updates(self) -> int:
        """Number of optimiser updates of all rounds."""
        return self.curriculum.steps * self.rl.updates

    def step(self, run: Run, shardings: TrainState) -> Step:
        """Return the update of the stage."""
        loss = objective(run.lm_of(self), self.rl)
        optimizer, steps = self.training.optimizer, self.updates
        make = functools.partial(make_step, loss, optimizer, steps=steps, shardings=shardings)
        return run.compiling.once("step", make)

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, and return the last metrics."""
        network = self.network(run)
        directory = run.begin(self, network, snapshots=self.kept())
        start = run.language_model(self.init_from, self.role)
        frozen, trained = self.frozen(run, start)
        state, shardings = initial_state(run, network, trained, self.training.optimizer, self.updates)
        del start, trained  # the state has a copy: a further set of parameters must not lie about while training
        kept = Checkpoints(directory / SNAPSHOTS, keep=None, asynchronous=False)
        parts = self.parts(run, self.step(run, shardings), kept, held_out_judge(run, self, frozen))
        program = RlProgram(parts, frozen, _LOG.warning)
        state = fit(program, state, self.training.loop(self.curriculum.steps), run_files(run, self.name))
        program.keep_snapshot(state, self.curriculum.steps)
        return finished(directory) or {}

    def frozen(self, run: Run, start: Params) -> tuple[Frozen, Params]:
        """Return what is read and never changed, and the trained part of what the stage starts from.

        Args:
          run: the run.
          start: the language model of `init_from`; where that is the anchor too, both are the same arrays.
        """
        network = self.network(run)
        whole = start
        if isinstance(network, ValueModel):
            whole = network.with_trunk(start, key_for(run.seed, f"{self.name}/head"))
        base, trained = divide(network, whole)
        same = self.anchor == self.init_from
        frozen = Frozen(
            base=base,
            anchor=start if same else run.language_model(self.anchor, self.role),
            reward=run.params(self.reward),
            policy=None if self.policy is None else run.language_model(self.policy, "policy"),
        )
        return frozen, trained

    def shares_prompts(self, mesh: Mesh) -> bool:
        """Return whether the samples of a prompt are trained on together: where prompts can be cut like samples."""
        parts = self.training.micro_batches * self.rl.minibatches * row_parts(mesh)
        several = self.training.share_prompts and self.rl.samples_per_prompt > 1
        return several and self.training.contexts % parts == 0

    def answerers(self, run: Run, *, rows: int, references: int) -> Answerers:
        """Return what answers and scores in batches of `rows`, and writes references in batches of `references`."""
        improver = self.role == "improver"
        return Answerers(
            sampler=answering.sampler(run, "improver" if improver else "policy", Sampling(), rows),
            policy_sampler=answering.sampler(run, "policy", self.policy_sampling, references),
            scorer=answering.scorer(run, self.reward, "gap" if improver else "policy", rows),
        )

    def step_scorer(self, run: Run) -> Scorer:
        """Return what scores the samples of a step, and as one more of each prompt its reference."""
        kind, samples = "gap" if self.role == "improver" else "policy", self.rl.samples_per_prompt
        model, rows = run.reward_model(self.reward, "gap" if kind == "gap" else "bt"), self.rollout_rows
        if not self.training.share_prompts or samples == 1 or model.attention != "causal":
            return answering.scorer(run, self.reward, kind, rows)
        prompts = answering.shared_out(run.mesh, max(rows // samples, 1))
        return answering.make_scorer(model, run.codec, kind, prompts, run.mesh, samples=samples + 1)

    @property
    def rollout_rows(self) -> int:
        """Rows of the sampling program: a step that has fewer samples than `rollout_batch` does not fill it up."""
        return min(self.training.rollout_batch, self.training.contexts * self.rl.samples_per_prompt)

    def parts(self, run: Run, step: Step, kept: Checkpoints, held_out: HeldOut) -> Parts:
        """Return what the stage's program is made of; `step` updates, `kept` gets snapshots, `held_out` judges."""
        training = self.training
        answerers = self.answerers(run, rows=self.rollout_rows, references=training.contexts)
        return Parts(
            lm=run.lm,
            codec=run.codec,
            seed=run.seed_for(self.name),
            mesh=run.mesh,
            improver=self.role == "improver",
            config=self.rl,
            curriculum=self.curriculum,
            contexts=training.contexts,
            micro_batches=training.micro_batches,
            sampler=answerers.sampler,
            policy_sampler=answerers.policy_sampler,
            scorer=self.step_scorer(run),
            shared=self.rl.samples_per_prompt if self.shares_prompts(run.mesh) else 1,
            source=run.source("rl", "train", stream=self.name),
            step=step,
            monitor=self.monitor,
            held_out=held_out,
            judge_every=training.judge_every if run.experiment.judge is not None else 0,
            kept=kept,
            snapshots=tuple(self.kept().values()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answerers:
    """What answers prompts, writes references of kind "policy", and scores answers; parameters are arguments."""

    sampler: Sampler
    policy_sampler: Sampler
    scorer: Scorer


def held_out_judge(run: Run, stage: Rl, frozen: Frozen) -> HeldOut:
    """Return a function that answers fixed held-out prompts and reports reward, length, EOS rate and the judge.

    The improver's references are policy samples where the stage has a policy, else the dispreferred replies.
    """
    improver = stage.role == "improver"
    examples = run.examples("evaluate", "validation", limit=stage.training.evaluation_prompts)
    batch = stage.training.rollout_batch
    answerers = stage.answerers(run, rows=batch, references=batch)
    keys = row_keys(key_for(run.seed, f"{stage.name}/held out"), np.arange(len(examples)))
    codec = run.codec
    quality = None if run.experiment.judge is None else judges.import_function(run.experiment.judge)

    @functools.cache  # at the first look: what is sampled for it is not to delay the first step
    def asked() -> tuple[list[Context], list[PromptRow], list[PromptRow]]:
        met = _held_out_contexts(run, stage, answerers.policy_sampler, frozen, examples)
        rows = [codec.improver_prompt(*c) if improver else codec.policy_prompt(c.prompt) for c in met]
        return met, rows, [codec.gap_prompt(*c) if improver else codec.policy_prompt(c.prompt) for c in met]

    def look(params: Params) -> dict[str, float]:
        run.compiling.wait()
        met, rows, scored = asked()
        answers = answerers.sampler.answer(params, rows, keys)
        result = {
            "reward": float(np.mean(answerers.scorer.score(frozen.reward, scored, answers))),
            "length": float(np.mean([len(answer.ids) + answer.finished for answer in answers])),
            "eos_rate": float(np.mean([answer.finished for answer in answers])),
        }
        if quality is not None:
            result["judge"] = _mean_quality(quality, run, met, answers)
        return result

    return look


def _held_out_contexts(
    run: Run, stage: Rl, sampler: Sampler, frozen: Frozen, examples: Sequence[Example]
) -> list[Context]:
    codec = run.codec
    if frozen.policy is None or stage.role == "policy":
        kind = "chosen" if stage.role == "policy" else "rejected"
        return contexts(codec, Round(name="held out", steps=1, references=(kind,)), examples, {})
    keys = row_keys(key_for(run.seed, f"{stage.name}/held out references"), np.arange(len(examples)))
    answers = sampler.answer(frozen.policy, [codec.policy_prompt(e["prompt"].tolist()) for e in examples], keys)
    sampled = {"policy": [as_reference(codec, answer) for answer in answers]}
    return contexts(codec, Round(name="held out", steps=1, references=("policy",)), examples, sampled)


def _mean_quality(
    quality: Callable[[str, str], float], run: Run, met: Sequence[Context], answers: Sequence[Response]
) -> float:
    text = run.codec.text
    return float(np.mean([quality(text(c.prompt), text(a.ids)) for c, a in zip(met, answers, strict=True)]))
