"""Reinforcement learning: RLHF of the policy and curriculum RL of the improver (arXiv 2310.00898, section 3.4)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from pit_jax.core.errors import invalid
from pit_jax.core.rng import key_for
from pit_jax.core.types import Params
from pit_jax.data.views import Example
from pit_jax.decode.batches import Response, as_reference, row_keys
from pit_jax.decode.sampling import Sampling
from pit_jax.evaluation import judges
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models.heads import ValueModel
from pit_jax.models.trained import Network, divide
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Context, Curriculum, Round, contexts
from pit_jax.rl.experience import objective
from pit_jax.rl.monitor import MonitorConfig
from pit_jax.stages import answering
from pit_jax.stages.artifact import SNAPSHOTS
from pit_jax.stages.rl_program import Frozen, HeldOut, Parts, RlProgram
from pit_jax.stages.run import Run
from pit_jax.stages.supervised import initial_state, run_files
from pit_jax.train.loop import Loop, finished, fit
from pit_jax.train.optim import Optimizer, learning_rate
from pit_jax.train.step import make_step

ROLES = ("policy", "improver")
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlTraining:
    """How an RL stage is trained; the number of steps is that of its rounds.

    contexts: prompts (for the improver: prompts with a reference) of a step, each answered G times.
    micro_batches: parts the N = contexts x G samples are cut into to save memory.
    rollout_batch: rows of the one compiled sampling program; must divide N to waste nothing.
    evaluation_prompts: held-out prompts answered by each look of the judge; judge_every: steps between them for
      the monitor (0: never); an evaluation record is written every eval_every steps and at the end.
    """

    contexts: int
    optimizer: Optimizer
    micro_batches: int = 1
    rollout_batch: int = 256
    evaluation_prompts: int = 256
    judge_every: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int | None = 2

    def loop(self, steps: int) -> Loop:
        """Return the loop of so many steps."""
        return Loop(
            steps=steps, log_every=self.log_every, eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every, keep=self.keep,
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

    def run(self, run: Run) -> dict[str, Any]:
        """Train, or continue, and return the last metrics."""
        lm = run.lm_of(self)
        network: Network = ValueModel(lm) if self.rl.estimator == "ppo" else lm
        directory = run.begin(self, network, snapshots=self.kept())
        base, trained = divide(network, self._initial(run, network))
        frozen = Frozen(
            base=base,
            anchor=run.language_model(self.anchor, self.role),
            reward=run.params(self.reward),
            policy=None if self.policy is None else run.language_model(self.policy, "policy"),
        )
        steps, optimizer = self.curriculum.steps, self.training.optimizer
        updates = steps * self.rl.updates
        state, shardings = initial_state(run, network, trained, optimizer, updates)
        step = make_step(objective(lm, self.rl), optimizer, steps=updates, shardings=shardings)
        kept = Checkpoints(directory / SNAPSHOTS, keep=None, asynchronous=False)
        held_out = held_out_judge(run, self, frozen)
        program = RlProgram(self._parts(run, step, kept, held_out), frozen, _LOG.warning)
        state = fit(program, state, self.training.loop(steps), run_files(run, self.name))
        program.keep_snapshot(state, steps)
        return finished(directory) or {}

    def _initial(self, run: Run, network: Network) -> Params:
        trunk = run.language_model(self.init_from, self.role)
        if isinstance(network, ValueModel):
            return network.with_trunk(trunk, key_for(run.seed, f"{self.name}/head"))
        return trunk

    def _parts(self, run: Run, step: Any, kept: Checkpoints, held_out: HeldOut) -> Parts:
        training, improver = self.training, self.role == "improver"
        rollout_batch = min(training.rollout_batch, training.contexts * self.rl.samples_per_prompt)
        kind = "improver" if improver else "policy"
        return Parts(
            lm=run.lm,
            codec=run.codec,
            seed=run.seed_for(self.name),
            mesh=run.mesh,
            improver=improver,
            config=self.rl,
            curriculum=self.curriculum,
            contexts=training.contexts,
            micro_batches=training.micro_batches,
            sampler=answering.sampler(run, kind, Sampling(), rollout_batch),
            policy_sampler=answering.sampler(run, "policy", self.policy_sampling, training.contexts),
            scorer=answering.scorer(run, self.reward, "gap" if improver else "policy", rollout_batch),
            source=run.source("rl", "train", stream=self.name),
            step=step,
            monitor=self.monitor,
            held_out=held_out,
            judge_every=training.judge_every if run.experiment.judge is not None else 0,
            kept=kept,
            snapshots=tuple(self.kept().values()),
        )


def held_out_judge(run: Run, stage: Rl, frozen: Frozen) -> HeldOut:
    """Return a function that answers fixed held-out prompts and reports reward, length, EOS rate and the judge.

    The improver's references are policy samples where the stage has a policy, else the dispreferred replies.
    """
    improver = stage.role == "improver"
    examples = run.examples("evaluate", "validation", limit=stage.training.evaluation_prompts)
    kind, batch = ("improver" if improver else "policy"), stage.training.rollout_batch
    sampler = answering.sampler(run, kind, Sampling(), batch)
    scorer = answering.scorer(run, stage.reward, "gap" if improver else "policy", batch)
    met = _held_out_contexts(run, stage, frozen, examples)
    keys = row_keys(key_for(run.seed, f"{stage.name}/held out"), np.arange(len(met)))
    codec = run.codec
    rows = [codec.improver_prompt(*c) if improver else codec.policy_prompt(c.prompt) for c in met]
    scored = [codec.gap_prompt(*c) if improver else codec.policy_prompt(c.prompt) for c in met]
    quality = None if run.experiment.judge is None else judges.import_function(run.experiment.judge)

    def look(params: Params) -> dict[str, float]:
        answers = sampler.answer(params, rows, keys)
        result = {
            "reward": float(np.mean(scorer.score(frozen.reward, scored, answers))),
            "length": float(np.mean([len(answer.ids) + answer.finished for answer in answers])),
            "eos_rate": float(np.mean([answer.finished for answer in answers])),
        }
        if quality is not None:
            result["judge"] = _mean_quality(quality, run, met, answers)
        return result

    return look


def _held_out_contexts(run: Run, stage: Rl, frozen: Frozen, examples: Sequence[Example]) -> list[Context]:
    codec = run.codec
    if frozen.policy is None or stage.role == "policy":
        kind = "chosen" if stage.role == "policy" else "rejected"
        return contexts(codec, Round(name="held out", steps=1, references=(kind,)), examples, {})
    sampler = answering.sampler(run, "policy", stage.policy_sampling, stage.training.rollout_batch)
    keys = row_keys(key_for(run.seed, f"{stage.name}/held out references"), np.arange(len(examples)))
    answers = sampler.answer(frozen.policy, [codec.policy_prompt(e["prompt"].tolist()) for e in examples], keys)
    sampled = {"policy": [as_reference(codec, answer) for answer in answers]}
    return contexts(codec, Round(name="held out", steps=1, references=("policy",)), examples, sampled)


def _mean_quality(
    quality: Callable[[str, str], float], run: Run, met: Sequence[Context], answers: Sequence[Response]
) -> float:
    text = run.codec.text
    return float(np.mean([quality(text(c.prompt), text(a.ids)) for c, a in zip(met, answers, strict=True)]))
