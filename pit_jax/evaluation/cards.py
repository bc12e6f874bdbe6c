"""Side-by-side examples: a card for each pair of responses, with what every judge said of it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import invalid
from pit_jax.evaluation import document

Outcome = Literal["win", "lose", "tie", "none"]
OUTCOMES: tuple[Outcome, ...] = ("win", "lose", "tie", "none")
LABELS = {"win": "win", "lose": "lose", "tie": "tie", "none": "no verdict"}
SCORES = "score"
"""Name of the judge of an example that has scores and no opinions."""
# Letters of a detail up to which it is shown beside the outcome; longer ones open on a click.
_SHORT = 60
# Pairs of words up to which two texts are compared word by word; the time grows with it.
_MOST_PAIRS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opinion:
    """What one judge said of an example, from the improved response's side; detail: its scores or words, if any."""

    judge: str
    outcome: Outcome
    detail: str = ""

    def __post_init__(self) -> None:
        """Check the outcome."""
        if self.outcome not in OUTCOMES:
            raise invalid("Opinion.outcome", self.outcome, f"be one of {OUTCOMES}", "'none' stands for no verdict.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with the original and the improved response.

    score_original, score_improved: of the first judge, where it gives scores. system: who wrote the improved response.
    opinions: of the judges, the first of which decides where nobody chooses another; without any, the scores do.
    """

    prompt: str
    original: str
    improved: str
    score_original: float | None = None
    score_improved: float | None = None
    system: str = "pit"
    opinions: Sequence[Opinion] = ()

    @property
    def said(self) -> tuple[Opinion, ...]:
        """The opinions, or the one that the scores stand for."""
        if self.opinions or self.score_original is None or self.score_improved is None:
            return tuple(self.opinions)
        before, after = self.score_original, self.score_improved
        outcome: Outcome = "tie" if before == after else "win" if after > before else "lose"
        return (Opinion(judge=SCORES, outcome=outcome, detail=f"{before:.2f} → {after:.2f}"),)

    @property
    def outcome(self) -> Outcome:
        """Who won by the first judge, from the improved response's side."""
        return self.said[0].outcome if self.said else "none"


def opinions(judge: str, outcomes: Float[np.ndarray, " n"], details: Sequence[str] = ()) -> list[Opinion]:
    """Return a judge's opinions of a response set.

    Args:
      judge: its name.
      outcomes: +1 the improved response wins, -1 the original, 0 tie, NaN no verdict.
      details: its scores or words, one for each outcome, or none at all.
    """
    words = details or [""] * len(outcomes)
    return [
        Opinion(judge=judge, outcome=_named(float(outcome)), detail=detail)
        for outcome, detail in zip(outcomes, words, strict=True)
    ]


def _named(outcome: float) -> Outcome:
    if np.isnan(outcome):
        return "none"
    return "tie" if outcome == 0 else "win" if outcome > 0 else "lose"


def side_by_side(
    prompts: Sequence[str],
    original: Sequence[str],
    improved: Mapping[str, Sequence[str]],
    said: Mapping[str, Sequence[Sequence[Opinion]]],
    *,
    most: int = 60,
) -> list[Example]:
    """Return examples of several systems, for each of them those first that changed something.

    Args:
      prompts, original: of the Original.
      improved: system -> its responses to the same prompts.
      said: system -> what each judge said of each prompt (see `opinions`), the first judge first.
      most: examples of one system.
    """
    found = []
    for system, responses in improved.items():
        order = sorted(range(len(prompts)), key=lambda i: (original[i] == responses[i], i))
        found += [
            Example(
                prompt=prompts[i],
                original=original[i],
                improved=responses[i],
                system=system,
                opinions=tuple(judge[i] for judge in said.get(system, ())),
            )
            for i in order[:most]
        ]
    return found


def select(examples: Sequence[Example], most: int) -> list[Example]:
    """Return at most `most` examples, of every system and outcome in turn, in their given order."""
    rank: dict[tuple[str, str], int] = {}
    order = []
    for index, example in enumerate(examples):
        key = (example.system, example.outcome)
        rank[key] = rank.get(key, 0) + 1
        order.append((rank[key], index))
    return [examples[index] for index in sorted(index for _, index in sorted(order)[:most])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cards:
    """The examples of a report. most, most_lines: cards of the page and entries of the Markdown at most."""

    examples: Sequence[Example]
    most: int = 300
    most_lines: int = 12

    def markdown(self) -> str:
        """Return a list of the first examples of every system and outcome."""
        chosen = select(self.examples, self.most_lines)
        lines = [*self._left_out(len(chosen), "report.html and report.json have more")]
        for example in chosen:
            said = "; ".join(_sentence(opinion, document.short(opinion.detail)) for opinion in example.said)
            lines += [
                f"* *{_line(example.prompt)}*",
                f"  * original: {_line(example.original)}",
                f"  * {document.inline(example.system)}: {_line(example.improved)}",
                *([f"  * {document.inline(said)}"] if said else []),
            ]
        return "\n".join(lines)

    def html(self, directory: epath.Path) -> str:
        """Return the filters and the cards; by who won, they work without a script."""
        if not self.examples:
            return "<p>No examples.</p>"
        chosen = select(self.examples, self.most)
        judges = list(dict.fromkeys(opinion.judge for example in chosen for opinion in example.said))
        systems = list(dict.fromkeys(example.system for example in chosen))
        note = "".join(f'<p class="note">{line}</p>' for line in self._left_out(len(chosen), "report.json has all"))
        return _filters(chosen, judges, systems) + note + "".join(_card(each, judges, systems) for each in chosen)

    def _left_out(self, shown: int, where: str) -> list[str]:
        rest = len(self.examples) - shown
        if not rest:
            return []
        return [f"{shown} of {len(self.examples)} examples, of every system and outcome in turn; {where}.\n"]


def _line(text: str) -> str:
    return document.inline(text) or "(empty)"


def _sentence(opinion: Opinion, detail: str) -> str:
    return f"{opinion.judge}: {LABELS[opinion.outcome]}" + (f" ({detail})" if detail else "")


def _filters(examples: Sequence[Example], judges: Sequence[str], systems: Sequence[str]) -> str:
    """Return check boxes by outcome (pure CSS), and choices that a script brings to life."""
    open_ones = any(_outcome(example, judge) == "none" for example in examples for judge in judges or [""])
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{name}" checked> {LABELS[name]}</label>'
        for name in OUTCOMES
        if name != "none" or open_ones
    )
    by_judge = "".join(f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(judges or ["-"]))
    by_system = "".join(f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(systems))
    return (
        f"<fieldset><legend>Show</legend>{boxes}"
        '<span id="tools" class="scripted" hidden>'
        f'<label{_hidden(len(judges) < 2)}>by judge <select id="judge">{by_judge}</select></label>'
        f'<label{_hidden(len(systems) < 2)}>system <select id="system"><option value="">all</option>{by_system}'
        "</select></label>"
        f'<label{_hidden(len(judges) < 2)}><input type="checkbox" id="split"> only where judges differ</label>'
        '<label>search <input type="search" id="search" autocomplete="off" spellcheck="false"></label>'
        '<output id="count" aria-live="polite"></output></span></fieldset>'
    )


def _hidden(hide: bool) -> str:
    return " hidden" if hide else ""


def _outcome(example: Example, judge: str) -> Outcome:
    found: list[Outcome] = [opinion.outcome for opinion in example.said if opinion.judge == judge]
    return found[0] if found else "none"


def _card(example: Example, judges: Sequence[str], systems: Sequence[str]) -> str:
    before, after = difference(example.original, example.improved)
    outcomes = [_outcome(example, judge) for judge in judges] or ["none"]
    brief = [(opinion, opinion.detail if len(opinion.detail) <= _SHORT else "") for opinion in example.said]
    said = "".join(f'<li class="{each.outcome}">{escape(_sentence(each, detail))}</li>' for each, detail in brief)
    words = "".join(
        f"<details><summary>In the words of {escape(opinion.judge)}</summary><p>{escape(opinion.detail)}</p></details>"
        for opinion, detail in brief
        if opinion.detail and not detail
    )
    empty = "<i>(empty)</i>"
    return (
        f'<article class="card {outcomes[0]}" data-system="{systems.index(example.system)}" '
        f'data-outcomes="{" ".join(outcomes)}"><h3 dir="auto">{escape(example.prompt.strip()) or empty}</h3>'
        f'<div class="pair"><div><h4>original</h4><p dir="auto">{before or empty}</p></div>'
        f'<div><h4>{escape(example.system)}</h4><p dir="auto">{after or empty}</p></div></div>'
        f'<ul class="said">{said}</ul>{words}</article>'
    )


def difference(old: str, new: str) -> tuple[str, str]:
    """Return both texts as HTML with words only in the old one struck out and words only in the new one marked.

    Lines stay as they are. Where both texts are very long, all between their common beginning and end is marked.
    """
    left, right = _words(old), _words(new)
    before, after = [], []
    for same, i, j, k, m in _runs([word.rstrip() for word in left], [word.rstrip() for word in right]):
        before.append(_marked("".join(left[i:j]), None if same else "del"))
        after.append(_marked("".join(right[k:m]), None if same else "ins"))
    return "".join(before).rstrip(), "".join(after).rstrip()


def _words(text: str) -> list[str]:
    """Return the words of a text, each with the white space behind it."""
    return re.findall(r"\S+\s*", text)


def _marked(text: str, tag: str | None) -> str:
    body = text.rstrip()
    shown, space = escape(body), text[len(body) :]
    return (shown if tag is None or not shown else f"<{tag}>{shown}</{tag}>") + space


def _runs(left: Sequence[str], right: Sequence[str]) -> list[tuple[bool, int, int, int, int]]:
    """Return (equal?, from, to, from, to) of both word lists, in order."""
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    end = 0
    while end < min(len(left), len(right)) - start and left[-1 - end] == right[-1 - end]:
        end += 1
    a, b = left[start : len(left) - end], right[start : len(right) - end]
    if len(a) * len(b) > _MOST_PAIRS:
        middle = [(False, 0, len(a), 0, len(b))]
    else:
        codes = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes()
        middle = [(kind == "equal", i, j, k, m) for kind, i, j, k, m in codes]
    return [
        (True, 0, start, 0, start),
        *((same, start + i, start + j, start + k, start + m) for same, i, j, k, m in middle),
        (True, len(left) - end, len(left), len(right) - end, len(right)),
    ]
