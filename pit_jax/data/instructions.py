"""The language of the synthetic set: its words, what a prompt asks for, how a reply is read, and the exact judge.

`data.synthetic` describes the set and writes it with this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

PLACES = ("barn", "church", "farm", "inn", "mill", "oak", "pond", "tower")
# Where each road leads from each of PLACES, in their order. Every road is a one-to-one move that leaves no place
# where it is, and the roads do not commute: the destination cannot be had by counting roads.
TOWN_MAP: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        road: MappingProxyType(dict(zip(PLACES, leads_to.split(), strict=True)))
        for road, leads_to in (
            ("red", "pond inn church barn tower farm oak mill"),
            ("blue", "inn tower mill pond oak barn church farm"),
            ("green", "mill barn oak tower inn church farm pond"),
            ("white", "oak pond barn farm church tower mill inn"),
        )
    }
)
ROADS = tuple(TOWN_MAP)
ITEMS = ("bell", "coin", "lamp", "map", "rope", "seed")
COLORS = ("amber", "coral", "denim", "ebony", "gold", "indigo", "jade", "lemon", "olive", "ruby", "silver", "teal")
CLOSERS = ("cheers", "friend", "please", "thanks")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
KINDS = ("headline", "legs", "order", "count", "include", "avoid", "end", "form")
# A wrong leg costs as much as a wrong headline (two parts, half of it lost): bending the working until it agrees
# with a wrong headline must never pay.
KIND_WEIGHTS: Mapping[str, float] = MappingProxyType(dict.fromkeys(KINDS, 1.0) | {"legs": 2.0, "order": 2.0})
_JOINERS = MappingProxyType({"route": "via", "sort": "sorted", "list": ""})
_BODY_WORDS = MappingProxyType({"route": PLACES, "sort": COLORS, "list": COLORS})


@dataclass(frozen=True)
class Task:
    """What a prompt asks for, as read from its words."""

    family: str
    headline: bool = False
    count: int = 0
    start: str = ""
    roads: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    closer: str = ""


@dataclass(frozen=True)
class Reply:
    """A reply cut into its parts. ``stray`` counts the words that fit nowhere."""

    headline: str = ""
    body: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    closer: str = ""
    stray: int = 0
    # The text itself where a fault broke the grammar; it replaces the parts.
    raw: str = ""


class Dice:
    """Seeded choices built on ``Random.random`` alone, whose stream Python promises to keep."""

    def __init__(self, seed: int, index: int, colors: Sequence[str] = COLORS) -> None:
        self.colors = colors  # Those that this difficulty uses; the judge knows all.
        digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        self.roll = random.Random(int.from_bytes(digest, "little")).random

    def chance(self, p: float) -> bool:
        """Return True with probability p."""
        return self.roll() < p

    def between(self, low: int, high: int) -> int:
        """Return a whole number from low to high."""
        return low + int(self.roll() * (high - low + 1))

    def pick(self, options: Sequence[str]) -> str:
        """Return one of the options."""
        return options[int(self.roll() * len(options))]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """Return a name, as often as its weight says."""
        point = self.roll() * sum(weights.values())
        for name, weight in weights.items():
            point -= weight
            if point < 0:
                return name
        return name

    def draw(self, options: Sequence[str], n: int) -> tuple[str, ...]:
        """Return n different options."""
        pool = list(options)
        return tuple(pool.pop(int(self.roll() * len(pool))) for _ in range(n))


def write_prompt(task: Task) -> str:
    """Return the words of a prompt that asks for a task."""
    words: list[str] = []
    if task.family == "route":
        words += ["goal"] * task.headline + ["from", task.start, "by", *task.roads]
        words += ["bring", *task.include] if task.include else []
    elif task.family == "sort":
        words += ["middle"] * task.headline + ["sort", *task.given]
    else:
        words += [NUMBERS[task.count], "colors"]
        words += ["with", *task.include] if task.include else []
        words += ["no", *task.avoid] if task.avoid else []
    return " ".join(words + (["end", task.closer] if task.closer else []))


def _run(words: Sequence[str], start: int, allowed: Sequence[str]) -> int:
    """Index after the longest run of allowed words from ``start`` on."""
    while start < len(words) and words[start] in allowed:
        start += 1
    return start


def parse_prompt(prompt: str) -> Task:
    """Reads what a prompt asks for; raises ValueError for a prompt that the generator cannot have written."""
    words = prompt.split()
    first = words[0] if words else ""
    headline = first in ("goal", "middle")
    at = int(headline)
    lead = words[at] if at < len(words) else ""
    task: dict[str, object] = {"headline": headline}
    if lead == "from" and len(words) > at + 2:
        end = _run(words, at + 3, ROADS)
        roads = tuple(words[at + 3 : end])
        task |= {"family": "route", "count": len(roads), "start": words[at + 1], "roads": roads}
        clauses = {"bring": ("include", ITEMS)}
    elif lead == "sort":
        end = _run(words, at + 1, COLORS)
        task |= {"family": "sort", "count": end - at - 1, "given": tuple(words[at + 1 : end])}
        clauses = {}
    elif lead in NUMBERS and words[at + 1 : at + 2] == ["colors"]:
        end = at + 2
        task |= {"family": "list", "count": NUMBERS.index(lead)}
        clauses = {"with": ("include", COLORS), "no": ("avoid", COLORS)}
    else:
        raise ValueError(f"prompt {prompt!r}: no known family starts so; prompts must come from synthetic.generate.")
    for clause, (name, allowed) in (clauses | {"end": ("closer", CLOSERS)}).items():
        if words[end : end + 1] == [clause]:
            start, end = end + 1, _run(words, end + 1, allowed)
            task[name] = words[start] if name == "closer" and end > start else tuple(words[start:end])
    parsed = Task(**task)  # type: ignore[arg-type]
    if write_prompt(parsed) != " ".join(words) or (parsed.family == "route" and parsed.start not in PLACES):
        raise ValueError(
            f"prompt {prompt!r}: not understood after {' '.join(words[:end])!r}; prompts must come from "
            "synthetic.generate."
        )
    return parsed


# --- Replies ---------------------------------------------------------------------------------------------------------


def write_reply(task: Task, reply: Reply) -> str:
    """Return a reply as text."""
    if reply.raw:
        return reply.raw
    words = [reply.headline] if reply.headline else []
    words += [_JOINERS[task.family]] if _JOINERS[task.family] else []
    words += reply.body
    words += ["with", *reply.items] if reply.items else []
    return " ".join(words + ([reply.closer] if reply.closer else []))


def read_reply(task: Task, text: str) -> Reply:
    """Cuts any text into the parts of a reply; what fits nowhere is counted as stray."""
    words, joiner, stray = text.split(), _JOINERS[task.family], 0
    headline, start = "", 0
    if joiner in words:
        start = words.index(joiner) + 1
        opening = words[: start - 1]
        headline = opening[0] if opening else ""
        stray += max(0, len(opening) - int(task.headline))
    elif joiner:
        stray += 1
    end = _run(words, start, _BODY_WORDS[task.family])
    body, items = tuple(words[start:end]), ()
    if task.family == "route" and words[end : end + 1] == ["with"]:
        start, end = end + 1, _run(words, end + 1, ITEMS)
        items = tuple(words[start:end])
    closer = words[end] if end < len(words) and words[end] in CLOSERS else ""
    stray += len(words) - end - bool(closer)
    stray += bool(closer) and not task.closer
    stray += len(items) if not task.include else 0
    return Reply(headline, body, items, closer, stray)


def _middle(words: Sequence[str]) -> str:
    return sorted(words)[len(words) // 2]


def walk(place: str, roads: Sequence[str]) -> tuple[str, ...]:
    """Return the stops of a walk along the roads."""
    stops = []
    for road in roads:
        place = TOWN_MAP[road][place]
        stops.append(place)
    return tuple(stops)


def solve(task: Task, dice: Dice | None = None) -> Reply:
    """A perfect reply; ``dice`` chooses where there is a choice."""
    headline, items = "", ()
    if task.family == "route":
        body, items = walk(task.start, task.roads), task.include
        headline = body[-1]
    elif task.family == "sort":
        body = tuple(sorted(task.given))
        headline = _middle(body)
    else:
        free = [c for c in (dice.colors if dice else COLORS) if c not in task.include + task.avoid]
        missing = task.count - len(task.include)
        body = tuple(sorted(task.include + (dice.draw(free, missing) if dice else tuple(free[:missing]))))
    return Reply(headline if task.headline else "", body, items, task.closer)


def perfect_reply(prompt: str) -> str:
    """One reply of quality 1."""
    task = parse_prompt(prompt)
    return write_reply(task, solve(task))


# --- The judge -------------------------------------------------------------------------------------------------------


def _lost(mistakes: int, allowed: int = 2) -> float:
    """Score of a graded constraint: each mistake takes an equal share, ``allowed`` of them take all."""
    return max(0.0, 1.0 - mistakes / allowed)


def judge(task: Task, reply: Reply, words: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Score in [0, 1] and a description of what is wrong, for each constraint of the task."""
    body, parts = reply.body, {}
    if task.headline:
        right = walk(task.start, task.roads)[-1] if task.family == "route" else _middle(task.given)
        parts["headline"] = float(reply.headline == right), f"opens with {reply.headline or 'nothing'}, not {right}"
    if task.family == "route":
        before = (task.start, *body)
        wrong = [i for i, r in enumerate(task.roads) if i >= len(body) or body[i] != TOWN_MAP[r].get(before[i], "")]
        parts["legs"] = _lost(len(wrong)), f"wrong stops: {', '.join(NUMBERS[i + 1] for i in wrong)}"
        bad = len(set(task.include) - set(reply.items)) + len(reply.items) - len(set(task.include) & set(reply.items))
    else:
        steps = sum(a >= b for a, b in itertools.pairwise(body)) if body else 2
        parts["order"] = _lost(steps), f"{steps} steps against the alphabet"
        wanted = set(task.given or task.include)
        bad = len(wanted - set(body)) + (len(set(body) - wanted) if task.family == "sort" else 0)
    parts["count"] = _lost(abs(len(body) - task.count)), f"{len(body)} words, not {task.count}"
    if task.include or task.given:
        allowed = max(1, len(task.include)) if task.include else 2
        parts["include"] = _lost(bad, allowed), f"{bad} words missing or not asked for"
    if task.avoid:
        hit = set(task.avoid) & set(words)
        parts["avoid"] = float(not hit), f"uses {' '.join(sorted(hit))}"
    if task.closer:
        parts["end"] = float(bool(words) and words[-1] == task.closer), f"does not end with {task.closer}"
    parts["form"] = _lost(reply.stray), f"{reply.stray} words out of place"
    return parts


def _judge_text(prompt: str, response: str) -> dict[str, tuple[float, str]]:
    task = parse_prompt(prompt)
    return judge(task, read_reply(task, response), response.split())


def mean(parts: Mapping[str, tuple[float, str]]) -> float:
    """Return the weighted mean of what `judge` says: the quality."""
    return sum(KIND_WEIGHTS[k] * s for k, (s, _) in parts.items()) / sum(KIND_WEIGHTS[k] for k in parts)


def quality(prompt: str, response: str) -> float:
    """How well the response meets the prompt: weighted mean of its graded constraints, 1 iff all are met."""
    return mean(_judge_text(prompt, response))


def faults(prompt: str, response: str) -> list[str]:
    """The broken constraints in words, e.g. ``["headline: opens with oak, not inn"]``."""
    return [f"{kind}: {what}" for kind, (score, what) in _judge_text(prompt, response).items() if score < 1.0]


# --- The critic ------------------------------------------------------------------------------------------------------

NOTHING = "no"


def rating(prompt: str, response: str) -> int:
    """Return the quality as a critic's score: 1 for none of the constraints, 10 if and only if all are met."""
    # Rounded down, so that no fault is too small to cost a point.
    return 1 + math.floor(9.0 * quality(prompt, response) + 1e-9)


def critique(prompt: str, response: str) -> str:
    """Return weaknesses, suggestions, score and an improved response, in the set's own words.

    Each broken constraint is named by the word of the prompt that asks for it (legs, which none asks for, by `via`),
    followed by what is wrong and by what would be right:

        ### Weaknesses                  goal inn via inn bring rope
        ### Suggestions                 goal pond via farm bring lamp
        Overall Score: [[5]]
        ### Improved Response           pond via farm mill tower pond with lamp thanks

    The improved response is perfect and keeps what was right; where nothing is wrong both parts are `no`.

    Raises:
      ValueError: the generator cannot have written the prompt.
    """
    task = parse_prompt(prompt)
    reply = read_reply(task, response)
    better = _mended(task, reply)
    broken = [kind for kind, (score, _) in judge(task, reply, response.split()).items() if score < 1.0]
    named = [_advice(kind, task, reply, better) for kind in broken]
    weaknesses, suggestions = (" ".join(words[side] for words in named) or NOTHING for side in (0, 1))
    return (
        f"### Weaknesses\n{weaknesses}\n### Suggestions\n{suggestions}\n"
        f"Overall Score: [[{rating(prompt, response)}]]\n### Improved Response\n{write_reply(task, better)}"
    )


def _mended(task: Task, reply: Reply) -> Reply:
    """Return a perfect reply with as much of the given one in it as can stay."""
    perfect = solve(task)
    if task.family != "list":
        return perfect
    right = [word for word in dict.fromkeys((*reply.body, *perfect.body)) if word not in task.include + task.avoid]
    body = tuple(sorted((*task.include, *right[: task.count - len(task.include)])))
    return dataclasses.replace(perfect, body=body)


def _advice(kind: str, task: Task, reply: Reply, better: Reply) -> tuple[str, str]:
    """Return what is wrong with a constraint and what would be right, each after the word that asks for it."""
    lead = {"route": "from", "sort": "sort", "list": "colors"}[task.family]
    if kind == "headline":
        name, wrong, right = "goal" if task.family == "route" else "middle", [reply.headline], [better.headline]
    elif kind == "legs":
        at = next(i for i, stop in enumerate(better.body) if reply.body[i : i + 1] != (stop,))
        name, wrong, right = "via", list(reply.body[at : at + 1]), [better.body[at]]
    elif kind == "include" and task.family == "route":
        name, wrong, right = "bring", list(reply.items), list(task.include)
    elif kind == "include":
        missing = [word for word in task.include or task.given if word not in reply.body]
        name, wrong, right = "with", [], missing
    elif kind == "avoid":
        name, wrong, right = "no", list(task.avoid), []
    elif kind == "end":
        name, wrong, right = "end", [reply.closer], [task.closer]
    elif kind == "count":
        name, wrong, right = "by" if task.family == "route" else lead, [], []
    else:  # order and form: the right words in their places are the improved response
        name, wrong, right = lead, [], []
    return " ".join([name, *filter(None, wrong)]), " ".join([name, *filter(None, right)])
