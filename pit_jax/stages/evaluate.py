"""Evaluation: who wins against the Original M_P^RL, by how much, and how sure that is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.evaluation import judges, report
from pit_jax.evaluation.bootstrap import mean_interval
from pit_jax.evaluation.winrate import Comparison, ResponseSet, compare
from pit_jax.improve.accept import Improve
from pit_jax.stages import together
from pit_jax.stages.answers import Answered, Answers
from pit_jax.stages.artifact import RESPONSES, split_reference
from pit_jax.stages.reporting import write_report
from pit_jax.stages.run import HeldOut, Run

_LOG = logging.getLogger(__name__)
Quality = dict[str, dict[float, tuple[float, float, float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Stage: answer held-out prompts with every system, compare, and write the report.

    original: M_P^RL, such as `rl_policy` or `rl_policy:100`; improver: M_PIT^RL; gap: R_PIT; reward: R_P.
    prompts: distinct held-out prompts; intervals are clustered by their groups.
    temperatures: of sampling, alike for both sides.
    iterations: improvement steps at the first temperature. best_of: n of best-of-n by R_P.
    improvers: name -> checkpoint of other improvers (SFT only, one stage only), one step each.
    policies: name -> checkpoint of other policies (SFT, trained longer).
    policy_curve: RLHF steps -> checkpoint: the improvement of policies stopped there.
    original_steps: RLHF steps of the Original, for the report. margin: of the accept rule.
    """

    verb: ClassVar[str] = "evaluate"
    name: str
    original: str
    improver: str
    gap: str
    reward: str
    prompts: int = 1000
    temperatures: tuple[float, ...] = (1.0,)
    iterations: int = 5
    best_of: tuple[int, ...] = (2,)
    improvers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    policies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    policy_curve: Mapping[int, str] = dataclasses.field(default_factory=dict)
    original_steps: int | None = None
    margin: float = 0.0
    batch_size: int = 256
    title: str = "Does it improve its own answers?"

    def __post_init__(self) -> None:
        """Check the numbers; make lists from gin tuples."""
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        object.__setattr__(self, "best_of", tuple(self.best_of))
        if self.prompts < 2:
            raise invalid("Evaluate.prompts", self.prompts, "be at least 2", "1000 gives intervals of about 3 points.")
        if not self.temperatures:
            raise invalid("Evaluate.temperatures", self.temperatures, "have at least one entry", "Use (1.0,).")
        names = self._system_names()
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or any("/" in name for name in names):
            rule = f"differ from each other and from those the evaluation makes; {twice} occur twice"
            raise invalid("Evaluate.improvers, .policies", [*self.improvers, *self.policies], rule, "Rename them.")

    def _system_names(self) -> list[str]:
        """Return the names of all response sets, which are also those of their files."""
        steps = ["", *(f"_iter{k}" for k in range(2, self.iterations + 1))]
        curve = [f"policy_{count}" for count in self.policy_curve]
        return [
            "original",
            *(f"{name}{step}" for name in ("pit", "pit_raw") for step in steps),
            *(f"best_of_{n}" for n in self.best_of),
            *(f"{name}{suffix}" for name in self.improvers for suffix in ("", "_raw")),
            *self.policies,
            *curve,
            *(f"{name}_of_{policy}" for name in ("pit", "pit_raw") for policy in curve),
        ]

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return every checkpoint that is read."""
        main = [self.original, self.improver, self.gap, self.reward]
        return list(
            dict.fromkeys([*main, *self.improvers.values(), *self.policies.values(), *self.policy_curve.values()])
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Sample, compare, write the report; return the row of PIT against the Original."""
        directory = run.begin(self, run.lm, snapshots={})
        prompts = run.held_out(self.prompts)
        if len(prompts) < self.prompts:
            _LOG.warning("%s: only %d of %d held-out prompts exist", self.name, len(prompts), self.prompts)
        answers = Answers(run, directory / RESPONSES, [prompt.ids for prompt in prompts], self.batch_size)
        jury = Jury(answers, prompts, self.reward)
        rows, sets = self._against_original(jury)
        rows += self._head_to_head(jury, sets)
        curve = [(steps, self._curve_rows(jury, steps)) for steps in sorted(self.policy_curve)]
        top = self.temperatures[0]
        found = report.Report(
            title=self.title,
            seed=run.seed,
            facts={},
            notes=self._notes(jury, sets),
            comparisons=rows,
            policy_curve=curve,
            original_steps=self.original_steps,
            quality=self._quality(jury, sets),
            reward_models={},
            supervised={},
            reinforced={},
            examples=jury.examples(sets["original", top], sets["pit", top]),
        )
        together.write("report", lambda: write_report(run, self.name, found))
        best = next(row for row in rows if row.candidate == "pit" and row.baseline == "original")
        return dataclasses.asdict(best)

    def _against_original(self, jury: Jury) -> tuple[list[Comparison], dict[tuple[str, float], Answered]]:
        """Answer with every system at every temperature, and compare each with the Original at the same one."""
        sets: dict[tuple[str, float], Answered] = {}
        for temperature in self.temperatures:
            first = temperature == self.temperatures[0]
            original = jury.answers.originals("original", self.original, temperature)
            found = [original, *self._improved(jury.answers, original, self.iterations if first else 1)]
            found += [
                jury.answers.best_of(f"best_of_{n}", self.original, self.reward, temperature, n) for n in self.best_of
            ]
            found += [jury.answers.originals(name, policy, temperature) for name, policy in self.policies.items()]
            if first:
                found += self._other_improvers(jury.answers, original)
            sets |= {(entry.name, temperature): entry for entry in found}
        rows = [
            jury.compare(entry, sets["original", temperature], judge)
            for judge in jury.names
            for (name, temperature), entry in sets.items()
            if name != "original" and (judge == jury.names[0] or temperature == self.temperatures[0])
        ]
        return rows, sets

    def _improved(self, answers: Answers, original: Answered, iterations: int) -> list[Answered]:
        suffix = "" if original.name == "original" else "_of_" + original.name
        rule = Improve(iterations=iterations, accept="gap", margin=self.margin)
        always = Improve(iterations=iterations, accept="always")
        return [
            *answers.improved("pit" + suffix, self.improver, self.gap, rule, original),
            *answers.improved("pit_raw" + suffix, self.improver, self.gap, always, original),
        ]

    def _other_improvers(self, answers: Answers, original: Answered) -> list[Answered]:
        rules = {"": Improve(margin=self.margin), "_raw": Improve(accept="always")}
        return [
            entry
            for name, improver in self.improvers.items()
            for suffix, rule in rules.items()
            for entry in answers.improved(name + suffix, improver, self.gap, rule, original)
        ]

    def _head_to_head(self, jury: Jury, sets: Mapping[tuple[str, float], Answered]) -> list[Comparison]:
        """Compare PIT directly with its rivals at each temperature, and with the Original at the others."""
        rivals = [f"best_of_{n}" for n in self.best_of] + list(self.policies)
        rows = [
            jury.compare(sets["pit", temperature], sets[rival, temperature], jury.names[0])
            for temperature in self.temperatures
            for rival in rivals
        ]
        top = self.temperatures[0]
        return rows + [
            jury.compare(sets["pit", top], sets["original", temperature], jury.names[0])
            for temperature in self.temperatures[1:]
        ]

    def _curve_rows(self, jury: Jury, steps: int) -> list[Comparison]:
        original = jury.answers.originals(f"policy_{steps}", self.policy_curve[steps], self.temperatures[0])
        improved = self._improved(jury.answers, original, 1)
        return [
            dataclasses.replace(jury.compare(entry, original, jury.names[0]), candidate=name, baseline=original.name)
            for name, entry in zip(("pit", "pit_raw"), improved, strict=True)
        ]

    def _quality(self, jury: Jury, sets: Mapping[tuple[str, float], Answered]) -> Quality:
        """Return mean scores of the systems that were sampled at every temperature, and of one-offs at the first."""
        found: Quality = {}
        for (name, temperature), entry in sets.items():
            scores = jury.scores(entry, jury.names[0])
            low, high = mean_interval(scores, jury.groups, seed=jury.run.seed, draws=500)
            found.setdefault(name, {})[temperature] = (float(np.mean(scores)), low, high)
        return found

    def _notes(self, jury: Jury, sets: Mapping[tuple[str, float], Answered]) -> list[str]:
        top = self.temperatures[0]
        width = float(np.mean([len(prompt) for prompt in jury.answers.prompts]))
        first, improved = (
            float(np.mean([len(r.ids) for r in sets[name, top].responses])) for name in ("original", "pit_raw")
        )
        # Tokens put through a network: PIT reads x, y_0 and writes y_1, then scores (y_1, y_0) and (y_0, y_0).
        step, sample = 3 * (width + first) + 2 * improved + first, 2 * (width + first)
        notes = [
            f"Original = {self.original}"
            + (f", stopped after {self.original_steps} RLHF steps." if self.original_steps is not None else "."),
            "`pit` keeps the Original's answer unless r_gap(y', y) > r_gap(y, y) + margin; `pit_raw` never does.",
            f"Equal compute at inference: one PIT step with the accept rule puts about {step:.0f} tokens through a "
            f"network, a further sample with its R_P score {sample:.0f}: best-of-n with n = {1 + step / sample:.1f}.",
            f"Intervals are bootstrapped over {len(set(jury.groups))} prompt groups ({len(jury.groups)} prompts), one "
            "sample a prompt, for this one seed.",
        ]
        if jury.names[0] != "exact":
            notes.append(
                f"The judge {jury.names[0]} is this run's own reward model, which best-of-n chooses by and RLHF was "
                "trained on: it favours them. An independent judge is needed for a claim of quality."
            )
        return notes


class Jury:
    """The judges of an evaluation, and the scores they have given."""

    def __init__(self, answers: Answers, prompts: Sequence[HeldOut], reward: str) -> None:
        self.run, self.answers = answers.run, answers
        self.texts = [prompt.text for prompt in prompts]
        self.groups = [prompt.group for prompt in prompts]
        run = self.run
        path = run.experiment.judge
        exact = None if path is None else judges.import_function(path)
        self._exact = None if exact is None else judges.FunctionJudge(name="exact", function=exact)
        self._reward = answers.judge(reward, "policy")
        self.names = [*(["exact"] if exact else []), epath.Path(split_reference(reward)[0]).name]
        self._scores: dict[tuple[str, float, str], Float[np.ndarray, " n"]] = {}
        self._sets: dict[tuple[str, float], ResponseSet] = {}

    def as_set(self, entry: Answered) -> ResponseSet:
        """Return a response set as text; it is compared many times and decoded once."""
        key = (entry.name, entry.temperature)
        if key not in self._sets:
            self._sets[key] = entry.as_set(self.run)
        return self._sets[key]

    def scores(self, entry: Answered, judge: str) -> Float[np.ndarray, " n"]:
        """Return one judge's scores of a response set."""
        key = (entry.name, entry.temperature, judge)
        if key not in self._scores:
            if judge == "exact" and self._exact is not None:
                self._scores[key] = self._exact.scores(self.texts, self.as_set(entry).responses)
            else:
                self._scores[key] = self.answers.rewards(self._reward, entry)
        return self._scores[key]

    def compare(self, candidate: Answered, baseline: Answered, judge: str) -> Comparison:
        """Return the row of two response sets by one judge."""
        return compare(
            self.as_set(candidate), self.as_set(baseline),
            (self.scores(candidate, judge), self.scores(baseline, judge)),
            groups=self.groups, judge=judge, seed=self.run.seed,
        )  # fmt: skip

    def examples(self, original: Answered, improved: Answered, most: int = 60) -> list[report.Example]:
        """Return side-by-side examples, changed ones first."""
        before, after = (self.as_set(entry).responses for entry in (original, improved))
        first, second = (self.scores(entry, self.names[0]) for entry in (original, improved))
        order: Sequence[int] = sorted(range(len(before)), key=lambda i: (before[i] == after[i], i))[:most]
        return [
            report.Example(
                prompt=self.texts[i], original=before[i], improved=after[i],
                score_original=float(first[i]), score_improved=float(second[i]),
            )
            for i in order
        ]  # fmt: skip
