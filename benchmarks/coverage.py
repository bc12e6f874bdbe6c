"""Coverage of the 95 % intervals: in how many of 1,000 simulations with a known truth they contain it.

    python benchmarks/coverage.py [--simulations 1000] [--draws 1000] [--only ratings]

A line for each setting: the share of simulations whose interval holds the truth, and in how many it lay below and
above. The share of 1,000 simulations has a standard error of 0.7 points by itself; 93 to 97 % is what to expect of a
95 % interval. The last settings are hard on purpose: few prompts.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pit_jax.evaluation import agreement, bias, bootstrap, ratings
from pit_jax.evaluation.bootstrap import mean_interval
from pit_jax.testing import comparisons

Simulated = Iterator[tuple[float, float, float]]
"""(low, truth, high) of each interval of a simulation."""
THETA = np.array([0.9, 0.4, 0.1, 0.0, -0.4, -1.0])


def plain_percentiles(data: comparisons.Compared, seed: int, draws: int) -> tuple[float, float]:
    """Return the interval without the correction for few groups, for comparison."""
    rows = np.stack([data.outcomes, np.ones_like(data.outcomes)], axis=1)
    sums = bootstrap.resample(bootstrap.group_sums(rows, data.groups), seed=seed, draws=draws)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def win_rate(
    rng: np.random.Generator,
    draws: int,
    *,
    plain: bool,
    groups: int,
    rows: int,
    score: float,
    ties: float,
    shared: float,
) -> Simulated:
    """Simulate Delta of one candidate."""
    data = comparisons.win_rates(groups, rows, score=score, ties=ties, shared=shared, rng=rng)
    seed = int(rng.integers(2**31))
    if plain:
        low, high = plain_percentiles(data, seed, draws)
    else:
        low, high = mean_interval(data.outcomes, data.groups, seed=seed, draws=draws, bounds=(-1.0, 1.0))
    yield low, data.truth, high


def rating(rng: np.random.Generator, draws: int, *, groups: int, ties: float, shared: float, model: str) -> Simulated:
    """Simulate ratings of six systems, against the first."""
    names = [str(i) for i in range(groups)]
    if model == "half":
        results = comparisons.tournament(THETA, groups, ties=ties, shared=shared, rng=rng)
        config = ratings.RatingConfig(anchor="s0", draws=draws)
    else:
        results = comparisons.davidson_tournament(THETA, groups, tie=ties, shared=shared, rng=rng)
        config = ratings.RatingConfig(anchor="s0", draws=draws, ties="davidson")
    table = ratings.bradley_terry(ratings.battles(results, names), config, seed=int(rng.integers(2**31)))
    for row in table.rows:
        if row.system != "s0":
            truth = config.at + ratings.POINTS * float(THETA[int(row.system[1:])] - THETA[0])
            yield row.low, truth, row.high


def length_control(
    rng: np.random.Generator, draws: int, *, groups: int, rows: int, effects: tuple[float, float, float], shared: float
) -> Simulated:
    """Simulate the length-controlled win rate, with the prompts' difficulty where it has an effect."""
    data = comparisons.lengths(groups, rows, effects=effects, ties=0.3, shared=shared, rng=rng)
    found = bias.length_controlled(
        data.outcomes,
        data.length_difference,
        data.groups,
        seed=int(rng.integers(2**31)),
        difficulty=data.difficulty if effects[2] else None,
        draws=draws,
    )
    yield found.ci95.low, data.truth, found.ci95.high


def kappa(rng: np.random.Generator, draws: int, *, items: int, judges: int, missing: float, measure: str) -> Simulated:
    """Simulate agreement of judges with the true kappa 0.49."""
    votes = comparisons.votes(items, judges, kinds=3, reliability=0.7, missing=missing, rng=rng)
    names, seed = [str(i) for i in range(items)], int(rng.integers(2**31))
    if measure == "cohen":
        found = agreement.cohen(votes[:, 0], votes[:, 1], names, seed=seed)
    else:
        found = {"fleiss": agreement.fleiss, "krippendorff": agreement.krippendorff}[measure](votes, names, seed=seed)
    yield found.ci95.low, 0.49, found.ci95.high


Setting = tuple[str, Callable[..., Simulated], dict[str, object]]


def settings() -> Sequence[Setting]:
    """Return all settings, named."""
    rates: list[tuple[str, dict[str, object]]] = [
        ("200 prompts, 20 % ties", {"groups": 200, "rows": 1, "score": 0.6, "ties": 0.25, "shared": 0.0}),
        ("1000 prompts", {"groups": 1000, "rows": 1, "score": 0.55, "ties": 0.25, "shared": 0.0}),
        ("100 prompts x 4 samples, clustered", {"groups": 100, "rows": 4, "score": 0.6, "ties": 0.25, "shared": 0.6}),
        ("200 prompts, 80 % ties", {"groups": 200, "rows": 1, "score": 0.52, "ties": 0.83, "shared": 0.0}),
        ("300 prompts, Delta = 80", {"groups": 300, "rows": 1, "score": 0.9, "ties": 0.3, "shared": 0.0}),
        ("20 prompts x 4 samples, clustered", {"groups": 20, "rows": 4, "score": 0.6, "ties": 0.25, "shared": 0.6}),
        ("10 prompts x 8 samples, clustered", {"groups": 10, "rows": 8, "score": 0.6, "ties": 0.25, "shared": 0.6}),
    ]
    found: list[Setting] = []
    for name, setting in rates:
        found.append((f"Delta, plain percentiles: {name}", win_rate, {"plain": True, **setting}))
        found.append((f"Delta: {name}", win_rate, {"plain": False, **setting}))
    for groups, shared in ((100, 0.0), (100, 0.5), (20, 0.5)):
        for model, ties in (("half", 0.3), ("davidson", 0.7)):
            setting = {"groups": groups, "ties": ties, "shared": shared, "model": model}
            found.append((f"ratings: {model}, {groups} prompts x 15 pairs, shared {shared}", rating, setting))
    for groups, rows, effects, shared in (
        (300, 1, (0.3, 1.0, 0.0), 0.0),
        (100, 4, (0.3, 1.0, 0.0), 0.6),
        (300, 1, (0.3, 1.0, 0.8), 0.0),
        (30, 2, (0.3, 1.0, 0.0), 0.6),
    ):
        setting = {"groups": groups, "rows": rows, "effects": effects, "shared": shared}
        found.append((f"length-controlled: {groups} prompts x {rows}, effects {effects}", length_control, setting))
    for measure, judges, missing in (("cohen", 2, 0.0), ("fleiss", 4, 0.0), ("krippendorff", 4, 0.3)):
        for items in (150, 30):
            setting = {"items": items, "judges": judges, "missing": missing, "measure": measure}
            found.append((f"agreement: {measure}, {items} items, {judges} judges", kappa, setting))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--only", default="", help="part of the names of the settings wanted")
    options = parser.parse_args()
    print(f"{'setting':72} {'covered':>8} {'below':>6} {'above':>6} {'s':>5}")
    for name, simulate, setting in settings():
        if options.only not in name:
            continue
        start = time.perf_counter()
        # Of what is simulated, not of the method: methods are compared on the same data.
        stream = zlib.crc32(name.rsplit(": ")[-1].encode())
        found = np.array(
            [
                interval
                for number in range(options.simulations)
                for interval in simulate(np.random.default_rng([stream, number]), options.draws, **setting)
            ]
        )
        below, above = np.mean(found[:, 1] < found[:, 0]), np.mean(found[:, 1] > found[:, 2])
        covered = f"{100 * (1 - below - above):>6.1f} %"
        seconds = time.perf_counter() - start
        print(f"{name:72} {covered} {100 * below:>6.1f} {100 * above:>6.1f} {seconds:>5.0f}", flush=True)


if __name__ == "__main__":
    main()
