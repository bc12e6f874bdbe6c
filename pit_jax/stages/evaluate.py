"""Evaluation: who wins against the Original M_P^RL, by how much, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from pit_jax.core.errors import invalid
from pit_jax.evaluation import report
from pit_jax.evaluation.bootstrap import mean_interval
from pit_jax.evaluation.winrate import Comparison
from pit_jax.improve.accept import Improve
from pit_jax.stages import together
from pit_jax.stages.answers import Answered, Answers
from pit_jax.stages.jury import Bench, ByGap, Jury, check_bench
from pit_jax.stages.reporting import write_report
from pit_jax.stages.run import Run
from pit_jax.stages.systems import ORIGINAL, BestOf, Improved, Sampled, System, answer_all, check_systems

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
    others: further systems, such as Self-Refine and SRT; those that begin with the Original's answers are rivals too.
    policy_curve: RLHF steps -> checkpoint: the improvement of policies stopped there.
    original_steps: RLHF steps of the Original, for the report. margin: of the accept rule.
    bench: judges besides the exact one and R_P. judge_by_gap: let R_PIT judge PIT against the Original as well.
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
    others: tuple[System, ...] = ()
    policy_curve: Mapping[int, str] = dataclasses.field(default_factory=dict)
    original_steps: int | None = None
    margin: float = 0.0
    batch_size: int = 256
    bench: tuple[Bench, ...] = ()
    judge_by_gap: bool = False
    title: str = "Does it improve its own answers?"

    def __post_init__(self) -> None:
        """Check the numbers; make lists from gin tuples."""
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        object.__setattr__(self, "best_of", tuple(self.best_of))
        if self.prompts < 2:
            raise invalid("Evaluate.prompts", self.prompts, "be at least 2", "1000 gives intervals of about 3 points.")
        if not self.temperatures:
            raise invalid("Evaluate.temperatures", self.temperatures, "have at least one entry", "Use (1.0,).")
        object.__setattr__(self, "others", tuple(self.others))
        object.__setattr__(self, "bench", tuple(self.bench))
        curve = [system for steps in self.policy_curve for system in self._on_curve(steps)]
        check_systems("Evaluate.improvers, .policies, .others", [*self._systems(first=True), *curve])
        check_bench(self.bench, [name for system in self._systems(first=True) for name in system.names()])

    def _systems(self, *, first: bool) -> list[System]:
        """Return the systems at the first temperature, or at one of the others."""
        return [
            Sampled(name=ORIGINAL, policy=self.original),
            *self._pit(ORIGINAL, "", self.iterations if first else 1),
            *(BestOf(name=f"best_of_{n}", policy=self.original, reward=self.reward, n=n) for n in self.best_of),
            *(Sampled(name=name, policy=policy) for name, policy in self.policies.items()),
            *self.others,
            *(self._other_improvers() if first else ()),
        ]

    def _pit(self, of: str, suffix: str, iterations: int) -> list[System]:
        """Return the improver with the accept rule, and without."""
        rules = {
            "pit": Improve(iterations=iterations, accept="gap", margin=self.margin),
            "pit_raw": Improve(iterations=iterations, accept="always"),
        }
        return [
            Improved(name=name + suffix, improver=self.improver, gap=self.gap, improve=rule, of=of)
            for name, rule in rules.items()
        ]

    def _other_improvers(self) -> list[System]:
        rules = {"": Improve(margin=self.margin), "_raw": Improve(accept="always")}
        return [
            Improved(name=name + suffix, improver=improver, gap=self.gap, improve=rule)
            for name, improver in self.improvers.items()
            for suffix, rule in rules.items()
        ]

    def _on_curve(self, steps: int) -> list[System]:
        """Return the policy stopped after some steps, and what improves it."""
        policy = f"policy_{steps}"
        return [Sampled(name=policy, policy=self.policy_curve[steps]), *self._pit(policy, f"_of_{policy}", 1)]

    @property
    def role(self) -> str:
        """No role: its verb has one stage only."""
        return ""

    def inputs(self) -> list[str]:
        """Return every checkpoint that is read."""
        main = [self.original, self.improver, self.gap, self.reward]
        others = [reference for system in self.others for reference in system.inputs()]
        named = [*self.improvers.values(), *self.policies.values(), *self.policy_curve.values()]
        return list(dict.fromkeys([*main, *named, *others]))

    def run(self, run: Run) -> dict[str, Any]:
        """Sample, compare, write the report; return the row of PIT against the Original."""
        directory = run.begin(self, run.lm, snapshots={})
        answers = Answers.of_stage(run, self.name, self.prompts, self.batch_size)
        own = (("pit", ORIGINAL), ("pit_raw", ORIGINAL))
        gap = ByGap(gap=self.gap, pairs=own) if self.judge_by_gap else None
        jury = Jury(answers, directory, reward=self.reward, gap=gap, bench=self.bench)
        rows, sets = self._against_original(jury)
        rows += self._head_to_head(jury, sets)
        curve = [(steps, self._curve_rows(jury, steps)) for steps in sorted(self.policy_curve)]
        top = self.temperatures[0]
        pairs = [(sets[name, top], sets[ORIGINAL, top]) for name in self._shown()]
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
            examples=jury.examples(sets[ORIGINAL, top], [sets[name, top] for name in self._shown()]),
            lengths=jury.lengths(pairs),
            judges=jury.facts(),
            agreement=jury.agreement(pairs),
            dropped=answers.left_out(),
        )
        together.write("report", lambda: write_report(run, self.name, found))
        best = next(row for row in rows if row.candidate == "pit" and row.baseline == "original")
        return dataclasses.asdict(best)

    def _shown(self) -> list[str]:
        """Return the systems whose responses are shown beside the Original's, and whose lengths are looked into."""
        others = [system.name for system in self.others]
        return ["pit", "pit_raw", *(f"best_of_{n}" for n in self.best_of[:1]), *others]

    def _against_original(self, jury: Jury) -> tuple[list[Comparison], dict[tuple[str, float], Answered]]:
        """Answer with every system at every temperature, and compare each with the Original at the same one."""
        sets: dict[tuple[str, float], Answered] = {}
        for temperature in self.temperatures:
            systems = self._systems(first=temperature == self.temperatures[0])
            made = answer_all(systems, jury.answers, temperature)
            sets |= {(name, temperature): entry for name, entry in made.items()}
        top = self.temperatures[0]
        rows = [
            jury.compare(entry, sets[ORIGINAL, temperature], judge)
            for judge in jury.scoring
            for (name, temperature), entry in sets.items()
            if name != ORIGINAL and (judge == jury.scoring[0] or temperature == top)
        ]
        asked = [(first, second, judge) for judge in jury.comparing for first, second in jury.pairs(judge)]
        rows += [jury.compare(sets[first, top], sets[second, top], judge) for first, second, judge in asked]
        return rows, sets

    def _head_to_head(self, jury: Jury, sets: Mapping[tuple[str, float], Answered]) -> list[Comparison]:
        """Compare PIT directly with its rivals at each temperature, and with the Original at the others."""
        others = [name for system in self.others for name in system.names()]
        rivals = [*(f"best_of_{n}" for n in self.best_of), *self.policies, *others]
        rows = [
            jury.compare(sets["pit", temperature], sets[rival, temperature], jury.scoring[0])
            for temperature in self.temperatures
            for rival in rivals
        ]
        top = self.temperatures[0]
        return rows + [
            jury.compare(sets["pit", top], sets[ORIGINAL, temperature], jury.scoring[0])
            for temperature in self.temperatures[1:]
        ]

    def _curve_rows(self, jury: Jury, steps: int) -> list[Comparison]:
        original, *improved = answer_all(self._on_curve(steps), jury.answers, self.temperatures[0]).values()
        return [
            dataclasses.replace(jury.compare(entry, original, jury.scoring[0]), candidate=name)
            for name, entry in zip(("pit", "pit_raw"), improved, strict=True)
        ]

    def _quality(self, jury: Jury, sets: Mapping[tuple[str, float], Answered]) -> Quality:
        """Return mean scores of the systems that were sampled at every temperature, and of one-offs at the first."""
        found: Quality = {}
        for (name, temperature), entry in sets.items():
            scores = jury.scores(entry, jury.scoring[0])
            low, high = mean_interval(scores, jury.groups, seed=jury.run.seed, draws=500)
            found.setdefault(name, {})[temperature] = (float(np.mean(scores)), low, high)
        return found

    def _notes(self, jury: Jury, sets: Mapping[tuple[str, float], Answered]) -> list[str]:
        top = self.temperatures[0]
        width = float(np.mean([len(prompt.ids) for prompt in jury.answers.prompts]))
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
        return notes + jury.notes()
