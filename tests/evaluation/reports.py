"""A report with everything in it: several systems, judges, temperatures, ratings, examples and odd texts."""

import itertools

import numpy as np

from pit_jax.evaluation import agreement, report, report_parts
from pit_jax.evaluation.judge_facts import JudgeFacts
from pit_jax.evaluation.pairwise import PositionBias
from pit_jax.evaluation.ratings import RatingConfig
from pit_jax.evaluation.winrate import Comparison, ResponseSet, compare

EVIL = '</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"><!-- `|` \u2028'
GROUPS = [f"g{i // 2}" for i in range(60)]
QUALITY = {
    "original": 0.0, "pit": 0.9, "pit_iter2": 1.1, "pit_iter3": 1.0, "self_refine": 0.1, "self_refine_iter2": -0.1,
    "self_refine_iter3": -0.2, "best_of_2": 0.4, "dpo": 0.3, "srt": 0.5, "a|b_<c>": 0.0,
}  # fmt: skip
JUDGES = ("exact", "r_p", "gpt <4>")


def response_sets() -> dict[str, ResponseSet]:
    """Return a response set for each system; better ones are longer."""
    rng = np.random.default_rng(0)
    return {
        name: ResponseSet(
            name=name,
            temperature=1.0,
            responses=tuple(f"{name} {i}" for i in range(len(GROUPS))),
            lengths=tuple(rng.integers(5, 12, len(GROUPS)) + int(3 * value)),
        )
        for name, value in QUALITY.items()
    }


def scores(judge: str) -> dict[str, np.ndarray]:
    """Return one judge's score of every response."""
    rng = np.random.default_rng(JUDGES.index(judge))
    return {name: np.round(value + rng.normal(size=len(GROUPS)), 0) for name, value in QUALITY.items()}


def rows(temperature: float = 1.0, judge: str = "exact") -> list[Comparison]:
    """Return the rows of all systems against the Original."""
    sets, found = response_sets(), scores(judge)
    sets = {name: ResponseSet(**{**vars(entry), "temperature": temperature}) for name, entry in sets.items()}
    return [
        compare(
            sets[name], sets["original"], (found[name] + (1 - temperature), found["original"]),
            groups=GROUPS, judge=judge, seed=1,
        )
        for name in QUALITY
        if name != "original"
    ]  # fmt: skip


def ratings(judge: str) -> report_parts.Rated:
    """Return the ratings of all systems by one judge."""
    found = scores(judge)
    results = {(a, b): np.sign(found[a] - found[b]) for a, b in itertools.combinations(QUALITY, 2)}
    config = RatingConfig(anchor="original", draws=100, rounds=100)
    return report_parts.rate(results, GROUPS, judge=judge, seed=1, config=config)


def lengths() -> list[report_parts.LengthRow]:
    """Return what length explains of every system against the Original."""
    sets, found = response_sets(), scores("exact")
    return [
        report_parts.length_row(
            sets[name], sets["original"], np.sign(found[name] - found["original"]), groups=GROUPS, judge="exact", seed=1
        )
        for name in ("pit", "pit_iter2", "dpo")
    ]


def examples() -> list[report.Example]:
    """Return 18 examples of two systems; the second judge disagrees now and then, the third says nothing of one."""
    words = ["", "It is <b>bold</b> & nice.\nSecond line.\n\nThird.", EVIL, "one two three four five six"]
    kinds = ("win", "lose", "tie")
    found = []
    for i, system in itertools.product(range(9), ("pit", "self_refine")):
        first, second = kinds[i % 3], kinds[(i // 3 + i) % 3]
        found.append(
            report.Example(
                prompt=f"Prompt number {i}: {words[i % 4]}",
                original=words[i % 4] or "short",
                improved=f"{words[(i + 1) % 4]} by {system} changed",
                system=system,
                opinions=(
                    report.Opinion(judge="exact", outcome=first, detail="0.50 → 1.00"),
                    report.Opinion(judge="r_p", outcome=second),
                    *(
                        [report.Opinion(judge="gpt <4>", outcome="none", detail="no reply: " + EVIL + " long" * 40)]
                        if i == 4
                        else []
                    ),
                ),
            )
        )
    return found


def judges() -> list[JudgeFacts]:
    """Return the facts of three judges, the last of which looks at places."""
    return [
        JudgeFacts(name="exact", kind="program", questions=600, unanswered=0),
        JudgeFacts(name="r_p", kind="the run's own R_P", questions=600, unanswered=0),
        JudgeFacts(
            name="gpt <4>", kind="language model at an endpoint", questions=128, unanswered=3, requests=260, known=12,
            tokens=(120_345, 9_876), cost=1.234, position=PositionBias(consistent=40, half=5, first=75, second=5),
        ),
    ]  # fmt: skip


def whole() -> report.Report:
    """Return the report."""
    votes = np.stack([np.sign(scores(judge)["pit"] - scores(judge)["original"]) for judge in JUDGES], axis=1)
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 5.0]}
    main = [*rows(), *rows(judge="r_p"), *rows(judge="gpt <4>"), *rows(0.7), *rows(0.4)]
    quality = {name: {t: (q + 1 - t, q, q + 2 - 2 * t) for t in (1.0, 0.7, 0.4)} for name, q in QUALITY.items()}
    return report.Report(
        title="A <run>: does it improve?", seed=3,
        facts={"model": "2 x 64, 105,000 parameters", "configuration": "`config.gin` in the run's directory"},
        notes=("honest & short", "`pit` keeps the Original's answer unless r_gap(y', y) > r_gap(y, y) + margin."),
        comparisons=main, policy_curve=((50, rows()[:2]), (100, rows()[:2])), original_steps=100, quality=quality,
        reward_models={
            "gap": {
                "accuracy": {"wl > ww": {"value": 0.9, "ci95": [0.8, 0.95], "n": 100}},
                "scalars": {"length correlation": 0.01},
                "histograms": {name: histogram for name in ("wl", "ww", "ll", "lw")},
            }
        },
        supervised={
            f"sft_{k}": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval/loss": 1.1}] for k in range(6)
        },
        reinforced={"rl": [{"step": 1, "reward/mean": 0.1, "kl/mean": 0.0, "length/mean": 8.0, "eos_rate": 1.0}]},
        examples=examples(), ratings=[ratings("exact"), ratings("r_p")], lengths=lengths(), judges=judges(),
        agreement=agreement.agreement(JUDGES, votes, GROUPS, seed=1),
        dropped=[
            report.Dropped(what="self_refine", reason="feedback without a score", count=3, total=60, example=EVIL),
            report.Dropped(what="prompts", reason="occurs twice", count=2),
        ],
        warnings=["gap is right on 0.900 of held-out records for wl > ww, below 0.93."],
        rerun=report.Rerun(
            command="pit-jax pipeline --gin_file=recipes/demo.gin --gin.MODEL_DIR=\"'runs/demo 1'\"", seed=3,
            versions={"python": "3.11.9", "jax": "0.10.2"}, inputs={"rl_policy:100": "ab" * 32},
            config="# all\nRecipe.seed = 3\n" + f"x = '{EVIL}'\n", settings="{}",
        ),
    )  # fmt: skip
