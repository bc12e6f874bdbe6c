"""A synthetic preference set whose every answer a program can judge exactly.

The set exists so that the whole method can be trained, measured and tested in minutes, without downloads
and without a judge that has opinions. A record is an instruction, a better reply and a worse one:

    prompt    goal from oak by red blue red green bring lamp end thanks
    chosen    pond via farm mill tower pond with lamp thanks
    rejected  inn via farm mill tower pond with rope thanks

Families of instructions
    route   Walk the listed roads from a place and name every stop. ``TOWN_MAP`` says where a road leads; it is
            the same for all prompts, so a model can learn it. With ``goal`` the reply starts with the
            destination, *before* the stops.
    sort    Write the given words in alphabetical order; with ``middle`` the middle one comes first.
    list    Write so many colors in alphabetical order, some of them required, one of them forbidden.

Kinds of constraint (``KINDS``)
    headline  the word that opens the reply (destination, middle word) is right
    legs      each stop follows from the stop before it and the road taken
    order     words are in alphabetical order, without repeats
    count     as many stops or words as asked for
    include   items to bring, words to use
    avoid     a word that must not occur
    end       the closing word
    form      no word that the reply's grammar has no room for (always judged)

Why the headline comes first. It asks for the result before the working. Every step of the working is an easy
look-up, but a small model cannot chain the steps in its head, so its headlines are wrong *at its mode*: low
temperature, best-of-n and more reinforcement learning do not mend them. In a finished reply the fault is easy
to see (the headline differs from the last stop) and easy to mend. That is the situation in which improving a
given answer pays. The writers of the set make the same mistake: ``headline_fault_rate`` of the *chosen* replies
have a wrong headline over right working. Without that a model would learn to copy its headline into the last
stop, and wrong headlines would ruin the working.

The presets. ``easy`` has short routes over two roads, few enough to be learned by heart. ``demo`` is the setting
above, with few words and longer routes, so that a small network learns the working but not the headline. ``hard``
adds the third family, longer routes and lists, and more constraints in a prompt.

How a pair is made. The better reply is a perfect one with a few slips. For ``related_share`` of the records the
worse reply is the better one with ``extra_faults`` more; else it is an independent, worse attempt. Improvement
is learnable only where the two are related. At last the two are swapped with probability
``sigmoid(-(difference of quality) / label_noise)``. Record ``i`` depends on the configuration and ``i`` alone.

``quality`` and ``faults`` judge any text from the words of the prompt alone, so they also judge what a model
wrote. ``group`` is the prompt's canonical text: cut folds by a hash of it, and no prompt is in two folds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from pit_jax.core.errors import invalid
from pit_jax.data.instructions import (
    CLOSERS,
    COLORS,
    ITEMS,
    KINDS,
    NUMBERS,
    PLACES,
    ROADS,
    TOWN_MAP,
    Dice,
    Reply,
    Task,
    critique,
    faults,
    judge,
    mean,
    parse_prompt,
    perfect_reply,
    quality,
    rating,
    read_reply,
    solve,
    walk,
    write_prompt,
    write_reply,
)

__all__ = [
    "PRESETS",
    "Difficulty",
    "SyntheticConfig",
    "critique",
    "faults",
    "generate",
    "make_record",
    "parse_prompt",
    "perfect_reply",
    "quality",
    "rating",
    "vocabulary",
    "write_jsonl",
]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What the prompts of a preset look like: shares of the families, sizes, number of roads in use."""

    families: Mapping[str, float]
    legs: tuple[int, int] = (4, 5)
    roads: int = 4
    colors: int = 12
    sort_words: tuple[int, ...] = (5,)
    list_words: tuple[int, int] = (3, 5)
    # Chance that a prompt asks for each optional constraint.
    optional: float = 0.75


PRESETS: dict[str, Difficulty] = {
    "easy": Difficulty(families={"route": 0.5, "list": 0.5}, legs=(2, 3), roads=2, list_words=(2, 4)),
    "demo": Difficulty(families={"route": 0.7, "list": 0.3}, legs=(4, 5), roads=3, colors=8, list_words=(3, 4)),
    "hard": Difficulty(
        families={"route": 0.5, "sort": 0.25, "list": 0.25},
        legs=(5, 8),
        sort_words=(5, 7),
        list_words=(4, 7),
        optional=0.9,
    ),
}
# Faults that are hard to see (a wrong stop) are drawn more often than those that any model sees at once.
_DEFAULT_FAULTS = MappingProxyType(
    {
        "headline": 3.0,
        "legs": 3.0,
        "order": 1.0,
        "count": 0.7,
        "include": 3.0,
        "avoid": 3.0,
        "end": 0.5,
        "form": 0.7,
    }
)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What to generate. Every field is part of the fingerprint except ``num_records``."""

    difficulty: str = "demo"
    # Constraints that prompts may carry. The families' own (legs, order, count, form) cannot be left out.
    kinds: tuple[str, ...] = KINDS
    num_records: int = 100_000
    seed: int = 0
    # Temperature of the labels: 0 never flips; 0.04 flips 2-3 % of the pairs that differ by one constraint in seven.
    label_noise: float = 0.04
    # Share of better replies whose headline is wrong although the working is right.
    headline_fault_rate: float = 0.3
    # Chance of each other slip in a better reply (two tries).
    slip_rate: float = 0.1
    # Share of worse replies that are the better one with further faults.
    related_share: float = 0.85
    # Fewest and most faults that the worse reply has on top.
    extra_faults: tuple[int, int] = (1, 3)
    # How often each kind of fault is drawn, relative to the others that the prompt allows.
    fault_weights: Mapping[str, float] = field(default_factory=lambda: dict(_DEFAULT_FAULTS))

    def __post_init__(self) -> None:
        def need(name: str, ok: bool, rule: str, fix: str) -> None:
            if not ok:
                raise invalid(f"SyntheticConfig.{name}", getattr(self, name), rule, fix)

        need(
            "difficulty",
            self.difficulty in PRESETS,
            f"be one of {sorted(PRESETS)}",
            "Choose one of them, or add an entry to PRESETS.",
        )
        fixed = {"legs", "order", "count", "form"}
        need(
            "kinds",
            fixed <= set(self.kinds) <= set(KINDS),
            f"hold {sorted(fixed)} and otherwise only names out of {KINDS}",
            "Start from synthetic.KINDS and leave out headline, include, avoid or end.",
        )
        need("num_records", self.num_records >= 0, "be 0 or more", "Give the number of records to write.")
        need("seed", self.seed >= 0, "be 0 or more", "Use 0 or a positive integer.")
        need("label_noise", self.label_noise >= 0, "be 0 or more", "Use 0 for labels without noise.")
        for name in ("headline_fault_rate", "slip_rate", "related_share"):
            need(name, 0.0 <= getattr(self, name) <= 1.0, "be a probability", "Give a number from 0 to 1.")
        low, high = self.extra_faults
        need("extra_faults", 1 <= low <= high, "be (fewest, most) with 1 <= fewest <= most", "Use (1, 3), for example.")
        need(
            "fault_weights",
            set(self.fault_weights) <= set(KINDS) and all(w > 0 for w in self.fault_weights.values()),
            f"give positive weights to names out of {KINDS}",
            "Leave out a kind to never draw it.",
        )

    def fingerprint(self) -> str:
        """Hash of all that decides the records' content, stable across runs and machines."""
        content = dataclasses.asdict(self) | {"kinds": sorted(self.kinds)}
        del content["num_records"]
        content["preset"] = dataclasses.asdict(PRESETS[self.difficulty])
        content["data"] = [list(map(list, (PLACES, ITEMS, COLORS, CLOSERS))), {r: dict(m) for r, m in TOWN_MAP.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _draw_task(config: SyntheticConfig, dice: Dice) -> Task:
    preset = PRESETS[config.difficulty]
    family = dice.weighted(preset.families)
    wanted = {k: k in config.kinds and dice.chance(preset.optional) for k in ("include", "avoid", "end")}
    closer = dice.pick(CLOSERS) if wanted["end"] else ""
    headline = "headline" in config.kinds and family != "list"
    if family == "route":
        legs = dice.between(*preset.legs)
        roads = tuple(dice.pick(ROADS[: preset.roads]) for _ in range(legs))
        items = (dice.pick(ITEMS),) if wanted["include"] else ()
        return Task("route", headline, legs, dice.pick(PLACES), roads, (), items, (), closer)
    if family == "sort":
        count = preset.sort_words[dice.between(0, len(preset.sort_words) - 1)]
        return Task("sort", headline, count, given=dice.draw(dice.colors, count), closer=closer)
    count = dice.between(*preset.list_words)
    named = dice.draw(dice.colors, 3)
    include = named[: dice.between(1, min(2, count))] if wanted["include"] else ()
    return Task("list", False, count, include=include, avoid=named[2:] if wanted["avoid"] else (), closer=closer)


# --- Faults ----------------------------------------------------------------------------------------------------------


def _other(dice: Dice, options: Sequence[str], *taken: str) -> str:
    return dice.pick([o for o in options if o not in taken])


def _break_headline(task: Task, reply: Reply, dice: Dice) -> Reply:
    right = solve(task).headline
    return dataclasses.replace(reply, headline=_other(dice, PLACES if task.roads else task.given, right))


def _break_legs(task: Task, reply: Reply, dice: Dice) -> Reply:
    """A wrong stop. The later ones follow from it, or the last one is bent to agree with the headline."""
    if len(reply.body) != task.count:
        return reply
    if reply.headline and reply.headline != reply.body[-1] and dice.chance(0.5):
        return dataclasses.replace(reply, body=(*reply.body[:-1], reply.headline))
    i = dice.between(0, task.count - 1)
    stop = _other(dice, PLACES, reply.body[i])
    rest = walk(stop, task.roads[i + 1 :]) if dice.chance(0.7) else reply.body[i + 1 :]
    return dataclasses.replace(reply, body=(*reply.body[:i], stop, *rest))


def _break_order(task: Task, reply: Reply, dice: Dice) -> Reply:
    body = list(reply.body)
    if len(body) > 1:
        i = dice.between(0, len(body) - 2)
        body[i], body[i + 1] = body[i + 1], body[i]
    return dataclasses.replace(reply, body=tuple(body))


def _break_count(task: Task, reply: Reply, dice: Dice) -> Reply:
    body = reply.body
    if len(body) > 1 and dice.chance(0.5):
        if task.family == "route":
            return dataclasses.replace(reply, body=body[:-1])
        i = dice.between(0, len(body) - 1)
        return dataclasses.replace(reply, body=body[:i] + body[i + 1 :])
    if task.family == "route":
        return dataclasses.replace(reply, body=(*body, _other(dice, PLACES, *body[-1:])))
    return dataclasses.replace(reply, body=tuple(sorted((*body, _other(dice, dice.colors, *body, *task.avoid)))))


def _swap_word(reply: Reply, old: str, new: str) -> Reply:
    """Replaces a word of a list and keeps the alphabet."""
    return dataclasses.replace(reply, body=tuple(sorted(new if w == old else w for w in reply.body)))


def _break_include(task: Task, reply: Reply, dice: Dice) -> Reply:
    if task.family == "route":
        items = () if dice.chance(0.3) else (_other(dice, ITEMS, *task.include),)
        return dataclasses.replace(reply, items=items)
    wanted = [w for w in task.given or task.include if w in reply.body]
    if not wanted:
        return reply
    return _swap_word(reply, dice.pick(wanted), _other(dice, dice.colors, *reply.body, *task.avoid, *task.given))


def _break_avoid(task: Task, reply: Reply, dice: Dice) -> Reply:
    spare = [w for w in reply.body if w not in task.include]
    return _swap_word(reply, dice.pick(spare), task.avoid[0]) if spare else reply


def _break_end(task: Task, reply: Reply, dice: Dice) -> Reply:
    return dataclasses.replace(reply, closer="" if dice.chance(0.3) else _other(dice, CLOSERS, task.closer))


def _break_form(task: Task, reply: Reply, dice: Dice) -> Reply:
    """A slip of the pen: a word left out, written twice, out of place, or the rest of the reply missing."""
    words = write_reply(task, reply).split()
    i = dice.between(0, len(words) - 1)
    slip = dice.between(0, 3)
    if slip == 0:
        words[i : i + 1] = []
    elif slip == 1:
        words[i:i] = [words[i]]
    elif slip == 2:
        words[i:i] = [dice.pick(write_prompt(task).split() + words)]
    else:
        words[i:] = []
    return dataclasses.replace(reply, raw=" ".join(words))


_BREAKERS: Mapping[str, Callable[[Task, Reply, Dice], Reply]] = MappingProxyType(
    {
        "headline": _break_headline,
        "legs": _break_legs,
        "order": _break_order,
        "count": _break_count,
        "include": _break_include,
        "avoid": _break_avoid,
        "end": _break_end,
        "form": _break_form,
    }
)


def _breakable(config: SyntheticConfig, task: Task) -> dict[str, float]:
    """The kinds of fault that can occur under this task, with their weights."""
    asked = {
        "headline": task.headline,
        "legs": task.family == "route",
        "order": task.family != "route",
        "count": True,
        "include": bool(task.include or task.given),
        "avoid": bool(task.avoid) and task.count > len(task.include),
        "end": bool(task.closer),
        "form": True,
    }
    return {k: config.fault_weights[k] for k, on in asked.items() if on and k in config.fault_weights}


def _score(task: Task, reply: Reply) -> float:
    text = write_reply(task, reply)
    return mean(judge(task, read_reply(task, text), text.split()))


def _break(task: Task, reply: Reply, dice: Dice, n: int, weights: Mapping[str, float]) -> Reply:
    """``n`` faults of different kinds, each of which lowers the quality; fewer where the task has too few kinds."""
    kinds = dict(weights)
    score = _score(task, reply)
    while n > 0 and kinds:
        kind = dice.weighted(kinds)
        del kinds[kind]
        broken = _BREAKERS[kind](task, reply, dice)
        if (lower := _score(task, broken)) < score:
            reply, score, n = broken, lower, n - 1
    return reply


def _better_reply(config: SyntheticConfig, task: Task, dice: Dice) -> Reply:
    reply = solve(task, dice)
    if task.headline and dice.chance(config.headline_fault_rate):
        reply = _break_headline(task, reply, dice)
    slips = dice.chance(config.slip_rate) + dice.chance(config.slip_rate)
    # The rate of wrong headlines has its own field; slips are of the other kinds.
    weights = {k: w for k, w in _breakable(config, task).items() if k not in ("headline", "form")}
    return _break(task, reply, dice, slips, weights)


def _worse_reply(config: SyntheticConfig, task: Task, better: Reply, dice: Dice) -> Reply:
    extra = dice.between(*config.extra_faults)
    weights, score = _breakable(config, task), _score(task, better)
    independent = not dice.chance(config.related_share)
    for _ in range(8):
        start = _better_reply(config, task, dice) if independent else better
        worse = _break(task, start, dice, extra, weights)
        if _score(task, worse) < score:
            return worse
    # The better reply was too bad for one more fault: what is left is a closing word that nobody asked for.
    return Reply(closer=_other(dice, CLOSERS, task.closer))


# --- Records ---------------------------------------------------------------------------------------------------------


def make_record(config: SyntheticConfig, index: int) -> dict[str, str]:
    """Record number ``index``, whatever the number of records."""
    dice = Dice(config.seed, index, COLORS[: PRESETS[config.difficulty].colors])
    task = _draw_task(config, dice)
    better = _better_reply(config, task, dice)
    worse = _worse_reply(config, task, better, dice)
    chosen, rejected = write_reply(task, better), write_reply(task, worse)
    if config.label_noise > 0:
        difference = _score(task, better) - _score(task, worse)
        if dice.chance(1.0 / (1.0 + math.exp(min(700.0, difference / config.label_noise)))):
            chosen, rejected = rejected, chosen
    prompt = write_prompt(task)
    return {
        "id": f"{config.difficulty}-{config.seed}-{index:07d}",
        "group": prompt,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
    }


def generate(config: SyntheticConfig) -> Iterator[dict[str, str]]:
    """Yields ``config.num_records`` records with the keys id, group, prompt, chosen and rejected."""
    for index in range(config.num_records):
        yield make_record(config, index)


def vocabulary(config: SyntheticConfig) -> list[str]:
    """Every word that prompts and replies of this configuration can hold, sorted."""
    preset = PRESETS[config.difficulty]
    words = {"end", "with", *CLOSERS}
    if "route" in preset.families:
        words |= {"goal", "from", "by", "bring", "via", *PLACES, *ROADS[: preset.roads], *ITEMS}
    if "sort" in preset.families:
        words |= {"middle", "sort", "sorted", *COLORS[: preset.colors]}
    if "list" in preset.families:
        low, high = preset.list_words
        words |= {"colors", "no", *COLORS[: preset.colors], *NUMBERS[low : high + 1]}
    return sorted(words)


def write_jsonl(config: SyntheticConfig, path: str | os.PathLike[str]) -> None:
    """Writes the records to ``path``, one JSON object a line; the file appears whole or not at all."""
    target = os.fspath(path)
    partial = f"{target}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in generate(config))
    os.replace(partial, target)
