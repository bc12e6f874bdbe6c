"""The judges of an evaluation: what each says of two response sets, computed once and kept as files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import invalid, nearest
from pit_jax.evaluation import judges, pairwise, winrate
from pit_jax.evaluation.agreement import Agreement, agreement
from pit_jax.evaluation.cards import Example, Opinion, Outcome
from pit_jax.evaluation.classifier_judge import ClassifierJudgeConfig
from pit_jax.evaluation.judge_facts import KINDS, JudgeFacts, facts_of
from pit_jax.evaluation.judges import FunctionJudge
from pit_jax.evaluation.llm_judge import LlmJudgeConfig
from pit_jax.evaluation.pairwise import PairJudge, Question, Verdict
from pit_jax.evaluation.ratings import RatingConfig
from pit_jax.evaluation.report_parts import LengthRow, Rated, length_row, rate
from pit_jax.evaluation.reward_judge import GapJudge, RewardJudge
from pit_jax.evaluation.winrate import Comparison, ResponseSet
from pit_jax.io import files
from pit_jax.sharding import processes
from pit_jax.stages import together
from pit_jax.stages.answers import Answered, Answers
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.systems import ORIGINAL

VERDICTS = "verdicts"
"""Directory of the verdicts in an evaluation's own, a directory for each judge."""
EXACT = "exact"
"""Name of the experiment's own program as a judge."""
JUDGES = "judges"
"""Directory of paid replies in the run's own: evaluations share them, and nothing is paid twice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Who judges an evaluation besides its programs and R_P, and how much of it.

    judge: a language model or a classifier. It compares pairs, which costs time or money.
    pairs: (candidate, baseline) response sets it compares, at the first temperature.
    prompts: the first so many; None is all. The paper gave GPT-4 128 and the classifier 1,000.
    """

    judge: LlmJudgeConfig | ClassifierJudgeConfig
    pairs: tuple[tuple[str, str], ...] = (("pit", ORIGINAL),)
    prompts: int | None = None

    def __post_init__(self) -> None:
        """Check the number; make lists from gin hashable."""
        object.__setattr__(self, "pairs", tuple((first, second) for first, second in self.pairs))
        if self.prompts is not None and self.prompts < 2:
            raise invalid("Bench.prompts", self.prompts, "be at least 2", "128 and 1000 are the paper's.")


def check_bench(bench: Sequence[Bench], made: Sequence[str]) -> None:
    """Check that the judges' pairs are of response sets that will be made.

    Raises:
      ConfigError: one is not.
    """
    for name in (name for entry in bench for pair in entry.pairs for name in pair):
        if name not in made:
            rule = f"name response sets of the evaluation.{nearest(name, made)}"
            raise invalid("Bench.pairs", name, rule, f"There are {', '.join(made)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compares:
    """A judge of pairs in a jury.

    judge: None where another process asks. everywhere: all processes run it together, for it is one of the run's own
      models; else process 0 alone asks.
    pairs, prompts: see `Bench`.
    """

    name: str
    judge: PairJudge | None
    pairs: tuple[tuple[str, str], ...]
    everywhere: bool = False
    prompts: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByGap:
    """R_PIT as a judge: which, and the (candidate, baseline) response sets it compares."""

    gap: str
    pairs: tuple[tuple[str, str], ...]


class Jury:
    """The judges of an evaluation: those that score, and those that compare.

    Args:
      answers: of the prompts that are judged.
      directory: of the evaluation.
      reward: R_P, always a judge; the experiment's own program comes first where there is one.
      gap: R_PIT, where it is to judge.
      bench: further judges of pairs.
    """

    def __init__(
        self,
        answers: Answers,
        directory: epath.Path,
        *,
        reward: str,
        gap: ByGap | None = None,
        bench: Sequence[Bench] = (),
    ) -> None:
        self.run, self.answers = answers.run, answers
        self.texts = [prompt.text for prompt in answers.prompts]
        self.groups = [prompt.group for prompt in answers.prompts]
        path = self.run.experiment.judge
        function = None if path is None else judges.import_function(path)
        self._exact = None if function is None else FunctionJudge(name=EXACT, function=function)
        self._reward = answers.judge(reward, "policy")
        self.scoring = [*([EXACT] if function else []), epath.Path(split_reference(reward)[0]).name]
        self.comparing = self._comparing(gap, bench)
        self._directory = directory / VERDICTS
        self._scores: dict[tuple[str, float, str], Float[np.ndarray, " n"]] = {}
        self._verdicts: dict[tuple[str, float, str, float, str], list[Verdict]] = {}
        self._sets: dict[tuple[str, float], ResponseSet] = {}

    def _comparing(self, gap: ByGap | None, bench: Sequence[Bench]) -> dict[str, Compares]:
        found: list[Compares] = []
        if gap is not None:
            name = epath.Path(split_reference(gap.gap)[0]).name
            own = GapJudge(name=name, codec=self.run.codec, score=self.answers.judge(gap.gap, "gap"))
            found.append(Compares(name=name, judge=own, pairs=gap.pairs, everywhere=True))
        for entry in bench:
            # Process 0 alone loads a classifier, and opens the file of replies.
            judge = entry.judge.build(self.run.directory / JUDGES) if processes.is_first() else None
            name = processes.first("name of a judge", lambda judge=judge: judge and judge.name)
            found.append(Compares(name=name, judge=judge, pairs=entry.pairs, prompts=entry.prompts))
        names = [*self.scoring, *(entry.name for entry in found)]
        if len(set(names)) < len(names):
            raise invalid("Bench.judge.name", names, "differ from the other judges'", "Give one of them another name.")
        return {entry.name: entry for entry in found}

    def pairs(self, judge: str) -> tuple[tuple[str, str], ...]:
        """Return the (candidate, baseline) response sets that one of `comparing` is asked about."""
        return self.comparing[judge].pairs

    def as_set(self, entry: Answered) -> ResponseSet:
        """Return a response set as text; it is compared many times and decoded once."""
        key = (entry.name, entry.temperature)
        if key not in self._sets:
            self._sets[key] = entry.as_set(self.run)
        return self._sets[key]

    def scores(self, entry: Answered, judge: str) -> Float[np.ndarray, " n"]:
        """Return the scores of a response set by one of `scoring`."""
        key = (entry.name, entry.temperature, judge)
        if key not in self._scores:
            if judge == EXACT and self._exact is not None:
                self._scores[key] = self._exact.scores(self.texts, self.as_set(entry).responses)
            else:
                self._scores[key] = self.answers.rewards(self._reward, entry)
        return self._scores[key]

    def outcomes(self, candidate: Answered, baseline: Answered, judge: str) -> Float[np.ndarray, " n"]:
        """Return for each prompt +1 where the candidate wins, -1 where it loses, 0 for a tie, nan without a verdict."""
        if judge in self.scoring:
            return winrate.outcomes(self.scores(candidate, judge), self.scores(baseline, judge), margin=winrate.MARGIN)
        return pairwise.outcomes(self.verdicts(candidate, baseline, judge))

    def compare(self, candidate: Answered, baseline: Answered, judge: str) -> Comparison:
        """Return the row of two response sets by one judge."""
        first, second = self.as_set(candidate), self.as_set(baseline)
        if judge in self.scoring:
            scores = (self.scores(candidate, judge), self.scores(baseline, judge))
            return winrate.compare(first, second, scores, groups=self.groups, judge=judge, seed=self.run.seed)
        found = self.verdicts(candidate, baseline, judge)
        return pairwise.comparison(first, second, found, groups=self.groups, judge=judge, seed=self.run.seed)

    def verdicts(self, candidate: Answered, baseline: Answered, judge: str) -> list[Verdict]:
        """Return what one of `comparing` says of each prompt; it has no verdict on those it is not asked about."""
        key = (candidate.name, candidate.temperature, baseline.name, baseline.temperature, judge)
        if key not in self._verdicts:
            self._verdicts[key] = self._asked(candidate, baseline, self.comparing[judge])
        return self._verdicts[key]

    def _asked(self, candidate: Answered, baseline: Answered, asked: Compares) -> list[Verdict]:
        """Ask a judge, and keep its verdicts as a file with their reasons.

        The file is written anew by every evaluation: what cost money is in the judge's own cache of replies, and what
        is said of the judge (`BothOrders.bias`) must be of all its verdicts.
        """
        sides = (self.texts, self.as_set(candidate).responses, self.as_set(baseline).responses)
        questions = [Question(*each) for each in zip(*sides, strict=True)][: asked.prompts]
        name, judge = asked.name, asked.judge
        path = self._directory / _file_name(name) / f"{_set_name(candidate)}_against_{_set_name(baseline)}.jsonl"
        own = judge.verdicts(questions) if judge is not None and asked.everywhere else None

        def write() -> None:
            assert judge is not None  # this is process 0
            _write_verdicts(path, questions, judge.verdicts(questions) if own is None else own)

        together.write(f"verdicts of {name}", write, path)
        return [*_read_verdicts(path), *(Verdict(pairwise.NO_ANSWER) for _ in self.texts[len(questions) :])]

    def notes(self) -> list[str]:
        """Return what a reader has to know of the judges."""
        if self.scoring[0] == EXACT:
            return []
        return [
            f"The judge {self.scoring[0]} is this run's own reward model, which best-of-n chooses by and RLHF was "
            "trained on: it favours them. An independent judge is needed for a claim of quality."
        ]

    def facts(self) -> list[JudgeFacts]:
        """Return what is said of each judge, those that score first, after all were asked."""
        kinds = [FunctionJudge if name == EXACT else RewardJudge for name in self.scoring]
        scoring = [JudgeFacts(name=name, kind=KINDS[kind]) for name, kind in zip(self.scoring, kinds, strict=True)]
        return [*scoring, *(self._facts(name) for name in self.comparing)]

    def _facts(self, name: str) -> JudgeFacts:
        judge, most = self.comparing[name].judge, self.comparing[name].prompts
        if judge is None:
            return JudgeFacts(name=name, kind="asked by process 0, which writes the report")
        said = [verdict for key, found in self._verdicts.items() if key[-1] == name for verdict in found[:most]]
        unanswered = sum(np.isnan(verdict.outcome) for verdict in said)
        return facts_of(judge, questions=len(said), unanswered=int(unanswered))

    def agreement(self, pairs: Sequence[tuple[Answered, Answered]]) -> Agreement | None:
        """Return how far all judges agree on these pairs; who was not asked abstains. None for one judge alone."""
        names = [*self.scoring, *self.comparing]
        if len(names) < 2 or not pairs:
            return None
        votes = [np.stack([self._vote(*pair, name) for name in names], axis=1) for pair in pairs]
        return agreement(names, np.concatenate(votes), self.groups * len(pairs), seed=self.run.seed)

    def _vote(self, candidate: Answered, baseline: Answered, judge: str) -> Float[np.ndarray, " n"]:
        if judge in self.comparing and (candidate.name, baseline.name) not in self.pairs(judge):
            return np.full(len(self.texts), np.nan)
        return self.outcomes(candidate, baseline, judge)

    def lengths(self, pairs: Sequence[tuple[Answered, Answered]]) -> list[LengthRow]:
        """Return what length explains of these pairs by the first judge."""
        judge = self.scoring[0]
        return [
            length_row(
                self.as_set(candidate), self.as_set(baseline), self.outcomes(candidate, baseline, judge),
                groups=self.groups, judge=judge, seed=self.run.seed,
            )
            for candidate, baseline in pairs
        ]  # fmt: skip

    def rated(self, entries: Sequence[Answered], anchor: str | None) -> Rated:
        """Return ratings of response sets by the first judge, from all pairs of them."""
        judge = self.scoring[0]
        results = {(a.name, b.name): self.outcomes(a, b, judge) for a, b in itertools.combinations(entries, 2)}
        return rate(results, self.groups, judge=judge, seed=self.run.seed, config=RatingConfig(anchor=anchor))

    def examples(self, original: Answered, improved: Sequence[Answered], most: int = 60) -> list[Example]:
        """Return side-by-side examples of each system, changed ones first, with what each judge said."""
        return [example for entry in improved for example in self._examples(original, entry, most)]

    def _examples(self, original: Answered, improved: Answered, most: int) -> list[Example]:
        before, after = (self.as_set(entry).responses for entry in (original, improved))
        asked = [name for name in self.comparing if (improved.name, original.name) in self.pairs(name)]
        said = {name: self.outcomes(improved, original, name) for name in [*self.scoring, *asked]}
        scores = {name: (self.scores(original, name), self.scores(improved, name)) for name in self.scoring}

        def detail(name: str, i: int) -> str:
            if name in scores:
                return f"{scores[name][0][i]:.2f} → {scores[name][1][i]:.2f}"
            return self.verdicts(improved, original, name)[i].reason

        order = sorted(range(len(before)), key=lambda i: (before[i] == after[i], i))[:most]
        return [
            Example(
                prompt=self.texts[i],
                original=before[i],
                improved=after[i],
                system=improved.name,
                opinions=[Opinion(judge=name, outcome=_word(said[name][i]), detail=detail(name, i)) for name in said],
            )
            for i in order
        ]


def _word(outcome: float) -> Outcome:
    if np.isnan(outcome):
        return "none"
    return "tie" if outcome == 0 else "win" if outcome > 0 else "lose"


def _write_verdicts(path: epath.Path, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> None:
    rows = [
        question._asdict()
        | {"outcome": None if np.isnan(verdict.outcome) else verdict.outcome, "reason": verdict.reason}
        for question, verdict in zip(questions, verdicts, strict=True)
    ]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_verdicts(path: epath.Path) -> list[Verdict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Verdict(pairwise.NO_ANSWER if row["outcome"] is None else row["outcome"], row["reason"]) for row in rows]


def _set_name(entry: Answered) -> str:
    return f"{entry.name}_T{entry.temperature:g}"


def _file_name(judge: str) -> str:
    """Return a judge's name as that of a directory: models are called `organisation/name`."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in judge)
