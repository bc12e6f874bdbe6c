"""Ratings of any number of systems from comparisons of pairs: Bradley-Terry, Davidson's ties, and ELO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from pit_jax.core.errors import DataError, invalid, nearest
from pit_jax.evaluation import bootstrap, loglinear

# A difference of 400 points is odds of 10 to 1 (Elo 1978).
POINTS = 400 / np.log(10)
# Random orders of games that are held in memory at once, in games.
_BLOCK = 20_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Battles:
    """Comparisons of pairs of systems, a row each.

    first, second: places in `systems`. outcome: +1 first wins, -1 second wins, 0 tie.
    groups: the prompt (or prompt group) of each row. unanswered: comparisons left out for want of a verdict.
    """

    systems: tuple[str, ...]
    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    outcome: Float[np.ndarray, " n"]
    groups: tuple[str, ...]
    unanswered: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingConfig:
    """How ratings are computed.

    anchor: system whose rating is `at`; None puts the mean of all systems there.
    prior: games added to every pair that met, spread evenly over the outcomes. It keeps the rating of a system that
      won every game finite; 1 is Jeffreys' prior for two systems.
    ties: "half" counts a tie as half a win for both sides; "davidson" gives ties a parameter of their own.
    k, rounds: step of ELO, and its number of random orders; `resample` also draws prompts with replacement in each.
    draws: bootstrap samples of Bradley-Terry.
    """

    anchor: str | None = None
    at: float = 1000.0
    prior: float = 1.0
    ties: Literal["half", "davidson"] = "half"
    draws: int = 1000
    k: float = 4.0
    rounds: int = 1000
    resample: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.prior > 0:
            fix = "Without it, a system that won every game has no finite rating; 1.0 is the default."
            raise invalid("RatingConfig.prior", self.prior, "be above 0", fix)
        if self.ties not in ("half", "davidson"):
            raise invalid("RatingConfig.ties", self.ties, "be 'half' or 'davidson'", "Correct it.")
        if not self.k > 0:
            raise invalid("RatingConfig.k", self.k, "be above 0", "4.0 is what MT-Bench uses.")
        for name, value in (("draws", self.draws), ("rounds", self.rounds)):
            if value < 100:
                raise invalid(f"RatingConfig.{name}", value, "be at least 100", "1000 gives steady 95 % intervals.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating:
    """A system's rating with its 95 % interval, and the games it rests on."""

    system: str
    rating: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingTable:
    """Ratings, best first.

    tie: Davidson's parameter: two equal systems tie with probability tie / (2 + tie). None in other methods.
    notes: what a reader has to know, such as systems whose distance rests on the prior.
    """

    method: str
    rows: tuple[Rating, ...]
    tie: float | None
    notes: tuple[str, ...]


def battles(results: Mapping[tuple[str, str], Float[np.ndarray, " n"]], groups: Sequence[str]) -> Battles:
    """Return the comparisons of pairs of systems over the same prompts.

    Args:
      results: (first, second) -> outcome on each prompt: +1 first wins, -1 second wins, 0 tie, NaN no verdict.
      groups: the prompt (or prompt group) of each outcome.

    Raises:
      DataError: a system meets itself, outcomes are missing or outside of [-1, 1], or no verdict is left.
    """
    systems = tuple(dict.fromkeys(name for pair in results for name in pair))
    place = {name: i for i, name in enumerate(systems)}
    parts = []
    for (a, b), outcome in results.items():
        values = np.asarray(outcome, np.float64)
        if a == b:
            raise DataError(f"results: system {a!r} meets itself. Give the two response sets different names.")
        if len(values) != len(groups):
            raise DataError(f"results[{a!r}, {b!r}] has {len(values)} outcomes for {len(groups)} prompts.")
        if (np.abs(values) > 1).any():
            raise DataError(f"results[{a!r}, {b!r}] holds {np.nanmax(np.abs(values))}; outcomes lie in [-1, 1].")
        parts.append((np.full(len(values), place[a]), np.full(len(values), place[b]), values))
    first, second, outcomes = (np.concatenate([part[k] for part in parts]) if parts else np.zeros(0) for k in range(3))
    answered = ~np.isnan(outcomes)
    if not answered.any():
        raise DataError("results: not one comparison has a verdict. Check the judge.")
    names = np.tile(np.asarray(groups, dtype=object), len(parts))
    return Battles(
        systems=systems,
        first=first[answered],
        second=second[answered],
        outcome=outcomes[answered],
        groups=tuple(names[answered]),
        unanswered=int(np.sum(~answered)),
    )


def bradley_terry(games: Battles, config: RatingConfig, *, seed: int) -> RatingTable:
    """Return maximum-likelihood ratings with 95 % bootstrap intervals, resampling whole prompts.

    With d the difference of two ratings in natural units (POINTS each):

        half      P(win) = 1 / (1 + exp(-d)); a tie is half a win and half a loss   (Bradley & Terry 1952)
        davidson  P(win) : P(lose) : P(tie) = exp(d / 2) : exp(-d / 2) : tie        (Davidson 1970)

    Both with `config.prior` games added to every pair that met. Intervals are of the differences from the anchor,
    whose own is therefore a point; without an anchor, from the mean of all systems.

    Raises:
      DataError: systems fall into parts that never met, so that nothing can be said of their distance.
    """
    _check_anchor(games, config)
    pairs, sums = _pair_sums(games, config.ties)
    kinds = sums.shape[2]
    _check_connected(games.systems, pairs)
    flat = sums.reshape(len(sums), -1)
    samples = bootstrap.resample(flat, seed=seed, draws=config.draws)
    samples = np.concatenate([flat.sum(axis=0)[None], samples]).reshape(-1, len(pairs), kinds) + config.prior / kinds
    theta = loglinear.fit(_features(pairs, len(games.systems), kinds), samples, ridge=0.0)
    naturals = np.pad(theta[:, : len(games.systems) - 1], ((0, 0), (1, 0)))
    points = _anchored(POINTS * naturals, games.systems, config)
    low, high = bootstrap.percentiles(points[1:], len(sums))
    return RatingTable(
        method="Bradley-Terry" if kinds == 2 else "Bradley-Terry, Davidson's ties",
        rows=_rows(games, points[0], low, high),
        tie=float(np.exp(theta[0, -1])) if kinds == 3 else None,
        notes=(*_separated(games, config.prior), *_unanswered(games)),
    )


def elo(games: Battles, config: RatingConfig, *, seed: int) -> RatingTable:
    """Return ELO ratings as in MT-Bench: the median over many random orders of the games, and their 95 % range.

        rating_i += k (score - 1 / (1 + 10^((rating_j - rating_i) / 400))), and rating_j the opposite; a tie scores 1/2

    All start at `config.at` (Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena"). With a
    small k and few games ratings do not reach their final distance; `bradley_terry` is their limit.
    """
    _check_anchor(games, config)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(games.outcome))
    rounds = [
        _play(games, _orders(games, min(block, config.rounds - start), config.resample, rng), config)
        for start in range(0, config.rounds, block)
    ]
    points = _anchored(np.concatenate(rounds), games.systems, config)
    low, centre, high = np.percentile(points, [2.5, 50, 97.5], axis=0)
    over = "orders and samples of prompts" if config.resample else "orders"
    method = f"ELO, K = {config.k:g}, {config.rounds} random {over}"
    return RatingTable(method=method, rows=_rows(games, centre, low, high), tie=None, notes=_unanswered(games))


def _check_anchor(games: Battles, config: RatingConfig) -> None:
    if config.anchor is not None and config.anchor not in games.systems:
        rule = f"be one of the systems {list(games.systems)}"
        raise invalid("RatingConfig.anchor", config.anchor, rule, "Correct it." + nearest(config.anchor, games.systems))


def _pair_sums(games: Battles, ties: str) -> tuple[Int[np.ndarray, "p 2"], Float[np.ndarray, "g p k"]]:
    """Return the pairs that met and, for each group of prompts, how often each outcome of each pair was seen."""
    swap = games.first > games.second
    ordered = np.stack([np.minimum(games.first, games.second), np.maximum(games.first, games.second)], axis=1)
    pairs, pair = np.unique(ordered, axis=0, return_inverse=True)
    outcome = np.where(swap, -games.outcome, games.outcome)
    member, count = bootstrap.members(games.groups, len(outcome))
    cell = member * len(pairs) + pair.ravel()
    if ties == "half":
        shares = [(1 + outcome) / 2, (1 - outcome) / 2]
    else:
        shares = [np.maximum(outcome, 0), np.maximum(-outcome, 0), 1 - np.abs(outcome)]
    sums = [np.bincount(cell, weights=share, minlength=count * len(pairs)) for share in shares]
    return pairs, np.stack(sums, axis=1).reshape(count, len(pairs), len(shares))


def _features(pairs: Int[np.ndarray, "p 2"], systems: int, kinds: int) -> Float[np.ndarray, "p k q"]:
    """Return what outcomes depend on: half the difference of ratings each way, and (Davidson) the tie's parameter.

    The first system's rating is fixed at 0: only differences count.
    """
    difference = np.eye(systems)[pairs[:, 0]] - np.eye(systems)[pairs[:, 1]]
    difference = difference[:, 1:] / 2
    win, lose = difference, -difference
    if kinds == 2:
        return np.stack([win, lose], axis=1)
    tie = np.zeros_like(difference)
    own = np.broadcast_to(np.array([0.0, 0.0, 1.0])[None, :, None], (len(pairs), 3, 1))
    return np.concatenate([np.stack([win, lose, tie], axis=1), own], axis=2)


def _anchored(
    points: Float[np.ndarray, "draws s"], systems: tuple[str, ...], config: RatingConfig
) -> Float[np.ndarray, "draws s"]:
    zero = points.mean(axis=1) if config.anchor is None else points[:, systems.index(config.anchor)]
    return points - zero[:, None] + config.at


def _rows(games: Battles, points: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[Rating, ...]:
    """Return a row a system, best first."""
    found = []
    for i in np.argsort(-points, kind="stable"):
        own = np.concatenate([games.outcome[games.first == i], -games.outcome[games.second == i]])
        found.append(
            Rating(
                system=games.systems[i], rating=float(points[i]), low=float(low[i]), high=float(high[i]),
                wins=int(np.sum(own > 0)), losses=int(np.sum(own < 0)), ties=int(np.sum(own == 0)),
            )
        )  # fmt: skip
    return tuple(found)


def _reachable(links: Bool[np.ndarray, "s s"]) -> Bool[np.ndarray, "s s"]:
    """Return which system can be reached from which over any number of links, itself included."""
    reach = links | np.eye(len(links), dtype=bool)
    for _ in range(len(links)):
        reach = reach @ reach
    return reach


def _check_connected(systems: tuple[str, ...], pairs: Int[np.ndarray, "p 2"]) -> None:
    links = np.zeros((len(systems), len(systems)), bool)
    links[pairs[:, 0], pairs[:, 1]] = links[pairs[:, 1], pairs[:, 0]] = True
    together = _reachable(links)[0]
    if not together.all():
        one, other = ([name for name, here in zip(systems, together == side, strict=True) if here] for side in (1, 0))
        raise DataError(
            f"No system of {one} was compared with any of {other}, so their ratings have no common scale. "
            "Compare at least one pair across, or rate the parts on their own."
        )


def _separated(games: Battles, prior: float) -> tuple[str, ...]:
    """Return a note where some systems took every point from the rest: then only the prior bounds their distance.

    Without a prior the maximum exists if and only if no such division does (Ford 1957).
    """
    size = len(games.systems)
    points = np.zeros((size, size))
    np.add.at(points, (games.first, games.second), (1 + games.outcome) / 2)
    np.add.at(points, (games.second, games.first), (1 - games.outcome) / 2)
    took = _reachable(points > 0)
    names = np.asarray(games.systems, dtype=object)
    # Systems that nobody outside of their own circle ever took a point from.
    tops = {tuple(names[took[:, i]]) for i in range(size) if (took[:, i] <= took[i]).all()}
    return tuple(
        f"{list(top)} never lost or tied against any other system: how far ahead they are is set by the prior of "
        f"{prior:g} game(s) a pair, and their intervals say nothing of it. Compare them with stronger systems."
        for top in sorted(tops)
        if len(top) < size
    )


def _unanswered(games: Battles) -> tuple[str, ...]:
    return (f"{games.unanswered} comparisons without a verdict are left out.",) if games.unanswered else ()


def _orders(games: Battles, rounds: int, resample: bool, rng: np.random.Generator) -> Int[np.ndarray, "rounds games"]:
    """Return the rows of the games of each round, in random order; -1 fills up rounds with fewer games."""
    size = len(games.outcome)
    if not resample:
        return rng.permuted(np.tile(np.arange(size, dtype=np.int32), (rounds, 1)), axis=1)
    member, count = bootstrap.members(games.groups, size)
    times = bootstrap.drawn(count, rounds, rng).astype(np.int64)[:, member]
    filled = np.full((rounds, int(times.sum(axis=1).max())), -1, np.int32)
    for row, repeats in zip(filled, times, strict=True):
        chosen = np.repeat(np.arange(size, dtype=np.int32), repeats)
        row[: len(chosen)] = chosen
    return rng.permuted(filled, axis=1)


def _play(games: Battles, orders: Int[np.ndarray, "rounds games"], config: RatingConfig) -> np.ndarray:
    """Return every round's final ratings."""
    # The last entry is that of -1: a game that moves nothing.
    first, second = np.append(games.first, 0), np.append(games.second, 0)
    score, step = np.append((1 + games.outcome) / 2, 0.0), np.append(np.full(len(games.outcome), config.k), 0.0)
    points = np.full((len(orders), len(games.systems)), config.at)
    line = np.arange(len(orders))
    for game in orders.T:
        i, j = first[game], second[game]
        expected = 1 / (1 + 10 ** ((points[line, j] - points[line, i]) / 400))
        change = step[game] * (score[game] - expected)
        points[line, i] += change
        points[line, j] -= change
    return points
