"""One step of reinforcement learning as a program for `train.loop.fit`: answer, score, weigh, update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pit_jax.core import metric
from pit_jax.core.metric import Metric, Metrics
from pit_jax.core.rng import key_for
from pit_jax.core.types import Conditional, Params, Samples
from pit_jax.data.source import Source
from pit_jax.data.views import Example
from pit_jax.decode.batches import Response, Sampler, Scorer, as_reference
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.io.serialize import array_from_json, array_to_json
from pit_jax.models.api import ConditionalLM
from pit_jax.models.heads import ValueModel
from pit_jax.models.trained import whole
from pit_jax.ops.shared import share
from pit_jax.rl import monitor, reward
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Context, Curriculum, contexts, records_per_step
from pit_jax.rl.experience import Baseline, Measured, batches, build, token_scores, token_values
from pit_jax.rl.rollout import Rollout, begin_rollout, per_pass, repeated, rollout, rollout_keys
from pit_jax.sharding.place import fetch, in_turn, put_batch
from pit_jax.stages.supervised import count_tokens
from pit_jax.text.codec import Codec, PromptRow, rows_to_prompts
from pit_jax.train.loop import TOKENS
from pit_jax.train.state import TrainState
from pit_jax.train.step import Step
from pit_jax.train.window import Phases

HeldOut = Callable[[Params], dict[str, float]]
"""Answers held-out prompts with language-model parameters and returns what the judge and the reward say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """Parameters that RL reads and never changes: KL anchor, reward model, and the policy that writes references.

    base: what the trained adapters stand on (`models.trained.divide`), None where everything is trained. The others
    are whole trees; with adapters they share its arrays.
    """

    base: Params | None
    anchor: Params
    reward: Params
    policy: Params | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What an RL program is made of.

    improver: whether prompts hold a reference (M_PIT with r_gap) or not (M_P with R_P).
    contexts: prompts (with a reference each, for the improver) of a step; each is answered G times.
    policy_sampler: for references of kind "policy".
    shared: samples of a prompt that share it where they are scored by the policy, the anchor and the value head, and
      trained on; 1 where each has it for itself. scorer: of G + 1 answers to each prompt, the last its reference.
    snapshots: number of steps done -> parameters are kept for good.
    judge_every: steps between looks of the held-out judge for the monitor, 0 for none.
    """

    lm: ConditionalLM
    codec: Codec
    seed: int
    mesh: Mesh
    improver: bool
    config: RlConfig
    curriculum: Curriculum
    contexts: int
    micro_batches: int
    sampler: Sampler
    policy_sampler: Sampler
    scorer: Scorer
    shared: int
    source: Source
    step: Step
    monitor: monitor.MonitorConfig
    held_out: HeldOut
    judge_every: int
    kept: Checkpoints
    snapshots: tuple[int, ...]


class Drawn(NamedTuple):
    """A step's contexts and answers, and what the parameters that gave them say of each token.

    logp: of the training graph or, without `RlConfig.rescore`, of the sampler, which says no entropy.
    """

    met: list[Context]
    rolled: Rollout
    inputs: Conditional
    logp: Float[Array, "N T"]
    entropy: Float[Array, "N T"] | None

    def to_json(self) -> dict[str, Any]:
        """Return all that cannot be made again once the parameters have changed; waits for it."""
        samples = {name: part for name, part in vars(self.rolled.samples).items() if part is not None}
        arrays = samples | fetch({"old": self.logp, "entropy": self.entropy})
        met = [[[int(token) for token in ids] for ids in context] for context in self.met]
        return {"met": met, "arrays": {name: array_to_json(array) for name, array in arrays.items()}}


Begun = tuple[list[Context], Callable[[], Rollout]]
"""A step's contexts, and what waits for the answers to them."""


class RlProgram:
    """REINFORCE-style RL of a policy or an improver.

    Beside the train state it remembers the data position, the running baseline and the monitor; samples depend
    on (seed, step) only, so a restarted run draws the same ones. With `RlConfig.one_step_off` the answers of the next
    step are drawn before the update, and are remembered too.

    Phases: "data", "references" (sampling them), "generate", "score" (rewards, log-probabilities), "update", and
    "judge" where it looks. The host waits for the device at four points only: for the last update, once the next
    prompts are there; for the samples; for the rewards; and for the statistics of a step, while its update runs.
    """

    def __init__(self, parts: Parts, frozen: Frozen, say: Callable[[str], None]) -> None:
        self._parts, self._frozen, self._say = parts, frozen, say
        self.phases = Phases()
        self._baseline = Baseline()
        self._monitor = monitor.MonitorState(beta=parts.config.beta)
        self._ahead: Drawn | None = None

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        """Do one RL step: contexts, rollouts, rewards, advantages, update(s); the last is not waited for."""
        parts = self._parts
        with self.phases.paused():
            self.keep_snapshot(state, step)
        drawn = self._ahead or self._drawn(state, self._begin(state, step))
        following = parts.config.one_step_off and step + 1 < parts.curriculum.steps
        measured = self._measure(state, drawn, self._begin(state, step + 1) if following else None)
        self.phases.enter("update")
        # A baseline that no other estimator reads would compile `build` twice: with None, then with a number.
        baseline = self._baseline.mean if parts.config.estimator == "reinforce" else None
        experience, stats = in_turn(build(parts.config, measured, self._monitor.beta, baseline))
        update_key = key_for(parts.seed, "update", step)
        updates = []
        for batch in batches(experience, parts.config, parts.micro_batches, update_key, parts.mesh):
            state, metrics = in_turn(parts.step(state, batch, update_key, self._frozen.base))
            updates.append(metrics)
        logged = {name: _sum([update[name] for update in updates]) for name in updates[0]} | stats
        logged |= self._watch(stats, state, step)
        logged[TOKENS] = Metric(np.float32(count_tokens(drawn.rolled.inputs)), np.float32(1))
        return state, logged | per_pass(drawn.rolled.samples)

    def keep_snapshot(self, state: TrainState, step: int) -> None:
        """Save what is trained for good if `step` updates are one of the points that are kept."""
        if step in self._parts.snapshots and step not in self._parts.kept.steps():
            self._parts.kept.save(step, {"params": state.params}, {})

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return what the judge and the reward model say on held-out prompts."""
        return self._parts.held_out(self._lm_params(state))

    def snapshot(self) -> dict[str, Any]:
        """Return data position, baseline, monitor, and the answers that the next step has already."""
        return {
            "ahead": None if self._ahead is None else self._ahead.to_json(),
            "source": self._parts.source.state(),
            "baseline": self._baseline.mean,
            "monitor": self._monitor.to_json(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continue where `snapshot` was taken."""
        self._parts.source.restore(snapshot["source"])
        self._baseline = Baseline(mean=snapshot["baseline"])
        self._monitor = monitor.MonitorState.from_json(snapshot["monitor"])
        ahead = snapshot.get("ahead")  # which older checkpoints do not have
        self._ahead = None if ahead is None else self._drawn_before(ahead)

    def _params(self, state: TrainState) -> Params:
        return whole(self._frozen.base, state.params)

    def _lm_params(self, state: TrainState) -> Params:
        params = self._params(state)
        return params["trunk"] if self._parts.config.estimator == "ppo" else params

    def _begin(self, state: TrainState, step: int) -> Begun:
        """Have the contexts of a step answered with the parameters of `state`; one step off, do not wait for it."""
        parts, repeat = self._parts, self._parts.config.samples_per_prompt
        met = self._contexts(state, step)
        self.phases.enter("generate")
        params, rows = self._lm_params(state), [self._row(context) for context in met]
        keys = rollout_keys(parts.seed, step, len(met) * repeat)
        if parts.config.one_step_off:
            return met, begin_rollout(parts.sampler, params, rows, repeat, keys)
        return met, functools.partial(rollout, parts.sampler, params, rows, repeat, keys)

    def _drawn(self, state: TrainState, begun: Begun) -> Drawn:
        """Wait for the answers, and have their tokens scored by the parameters of `state`, which gave them."""
        parts, (met, wait) = self._parts, begun
        self.phases.enter("generate")
        rolled = wait()
        self.phases.enter("score")
        inputs = self._placed(rolled)
        if not parts.config.rescore:
            return Drawn(met, rolled, inputs, put_batch(rolled.samples.logp, parts.mesh, row_axis=0), None)
        scores = in_turn(token_scores(parts.lm, self._lm_params(state), inputs, parts.micro_batches))
        return Drawn(met, rolled, inputs, scores.logp, scores.entropy)

    def _drawn_before(self, saved: dict[str, Any]) -> Drawn:
        """Return what `Drawn.to_json` saved."""
        parts = self._parts
        met = [Context(tuple(prompt), tuple(reference)) for prompt, reference in saved["met"]]
        arrays = {name: array_from_json(array) for name, array in saved["arrays"].items()}
        old, entropy = put_batch((arrays.pop("old"), arrays.pop("entropy")), parts.mesh, row_axis=0)
        rows = [self._row(context) for context in met]
        prompts = rows_to_prompts(rows, parts.sampler.width, parts.sampler.pad_id)
        prompts = repeated(prompts, parts.config.samples_per_prompt)
        rolled = Rollout(prompts, Samples(**arrays))  # pyright: ignore[reportArgumentType]
        return Drawn(met, rolled, self._placed(rolled), old, entropy)

    def _placed(self, rolled: Rollout) -> Conditional:
        """Return what models read, on the devices: a prompt once for the samples that share it."""
        return put_batch(share(rolled.inputs, self._parts.shared), self._parts.mesh, row_axis=0)

    def _contexts(self, state: TrainState, step: int) -> list[Context]:
        """Return the contexts of a step, as soon as the last update is done."""
        parts, here = self._parts, self._parts.curriculum.at(step).round
        self.phases.enter("data")
        records = parts.source.take(records_per_step(here, parts.contexts))
        rows = [parts.codec.policy_prompt(_ids(record["prompt"])) for record in records]
        self.phases.enter("update")
        jax.block_until_ready(state)  # or what follows would seem to take the time of the last update
        self.phases.enter("references")
        sampled: dict[str, list[tuple[int, ...]]] = {}
        if {"policy", "improver"} & set(here.references):
            assert self._frozen.policy is not None
            keys = jax.random.split(key_for(parts.seed, "policy references", step), len(records))
            answers = parts.policy_sampler.answer(self._frozen.policy, rows, keys)
            sampled["policy"] = [as_reference(parts.codec, answer) for answer in answers]
        if "improver" in here.references:
            sampled["improver"] = self._improved(self._lm_params(state), records, sampled["policy"], step)
        return contexts(parts.codec, here, records, sampled)

    def _improved(
        self, params: Params, records: Sequence[Example], answers: Sequence[tuple[int, ...]], step: int
    ) -> list[tuple[int, ...]]:
        """Return the improver's own improvement of policy samples, for rounds with harder references."""
        parts = self._parts
        rows = [
            parts.codec.improver_prompt(_ids(record["prompt"]), answer)
            for record, answer in zip(records, answers, strict=True)
        ]
        keys = jax.random.split(key_for(parts.seed, "improver references", step), len(rows))
        return [as_reference(parts.codec, answer) for answer in parts.sampler.answer(params, rows, keys)]

    def _row(self, context: Context) -> PromptRow:
        codec = self._parts.codec
        return codec.improver_prompt(*context) if self._parts.improver else codec.policy_prompt(context.prompt)

    def _measure(self, state: TrainState, drawn: Drawn, following: Begun | None) -> Measured:
        """Return what is known of a step's samples; the devices have work while the host prepares rewards.

        Args:
          state: before the update.
          drawn: the samples.
          following: those of the next step, under way, for which it waits first: devices work in this order.
        """
        parts, repeat = self._parts, self._parts.config.samples_per_prompt
        self.phases.enter("score")
        answered = [context for context in drawn.met for _ in range(repeat)]
        # The anchor first: the devices are at work while the host prepares what the reward model reads.
        anchor = in_turn(token_scores(parts.lm, self._frozen.anchor, drawn.inputs, parts.micro_batches))
        rewards = self._rewards(drawn.met, drawn.rolled.responses)
        values = jnp.zeros_like(drawn.logp)
        if parts.config.estimator == "ppo":
            values = in_turn(token_values(ValueModel(parts.lm), self._params(state), drawn.inputs, parts.micro_batches))
        self._ahead = None if following is None else self._drawn(state, following)
        samples, table = drawn.rolled.samples, rewards().reshape(len(drawn.met), repeat + 1)
        on_host = {
            "logp_sampler": samples.logp,
            "reward": table[:, :-1].reshape(-1),
            "reference_reward": np.repeat(table[:, -1], repeat),
            "reference_length": np.array([len(context.reference) + 1.0 for context in answered], np.float32),
            "finished": samples.finished,
        }
        return Measured(
            inputs=drawn.inputs,
            logp_old=drawn.logp,
            logp_anchor=anchor.logp,
            values=values,
            entropy=drawn.entropy,
            **put_batch(on_host, parts.mesh, row_axis=0),
        )

    def _rewards(self, met: Sequence[Context], answers: Sequence[Response]) -> reward.Pending:
        """Start the rewards of the answers, and after those to a prompt that of its reference: one more answer."""
        parts, params = self._parts, self._frozen.reward
        repeat, groups = parts.config.samples_per_prompt, []
        for number, context in enumerate(met):
            groups += [*answers[number * repeat : (number + 1) * repeat], Response(context.reference, finished=True)]
        answered = [context for context in met for _ in range(repeat + 1)]
        if parts.improver:
            return reward.gap_reward(parts.scorer, params, parts.codec, answered, groups)
        return reward.policy_reward(parts.scorer, params, parts.codec, [context.prompt for context in answered], groups)

    def _watch(self, stats: Metrics, state: TrainState, step: int) -> Metrics:
        """Update baseline and monitor; return what they add to the log."""
        parts = self._parts
        names = ("reward/mean", "reward/with_kl", "kl/mean", "length/mean", "length/reference")
        now = metric.values({name: stats[name] for name in names})
        self._baseline = self._baseline.updated(now["reward/with_kl"], parts.config.baseline_decay)
        self._monitor = monitor.observe(self._monitor, parts.monitor, now)
        added: Metrics = {"beta": Metric(np.float32(self._monitor.beta), np.float32(1))}
        if parts.judge_every and (step + 1) % parts.judge_every == 0:
            self.phases.enter("judge")
            judged = parts.held_out(self._lm_params(state))["judge"]
            self.phases.enter("update")
            self._monitor = monitor.observe_judge(self._monitor, judged)
            added["judge"] = Metric(np.float32(judged), np.float32(1))
        found = monitor.alarms(self._monitor, parts.monitor)
        self._monitor, messages = monitor.control(self._monitor, parts.monitor, parts.config.beta, found)
        for message in messages:
            self._say(f"step {step + 1}: {message}")
        return added | {"alarms": Metric(np.float32(len(found)), np.float32(1))}


def _ids(array: np.ndarray) -> tuple[int, ...]:
    return tuple(array.tolist())


def _sum(metrics: Sequence[Metric]) -> Metric:
    total, weight = (sum(part[1:], part[0]) for part in zip(*metrics, strict=True))
    return Metric(total, weight)
