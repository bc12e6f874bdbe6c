"""What a critic writes, and how it is read: weaknesses, suggestions, a score, and an improved response.

    ### Weaknesses
    ...
    ### Suggestions
    ...
    Overall Score: [[7]]
    ### Improved Response
    ...

Headings may have any number of `#` or `*` and a colon; the last one needs its `#`, because everything after it is the
response. The score may stand anywhere before it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

LOWEST, HIGHEST = 1.0, 10.0
_FLAGS = re.MULTILINE | re.IGNORECASE
_NUMBER = r"\[\[[ \t]*(\d+(?:\.\d+)?)[ \t]*\]\]"
_IMPROVED = re.compile(r"^[ \t]*#{1,6}[ \t*]*improved response[ \t*]*(?::[ \t*]*|$)", _FLAGS)
_SCORE = re.compile(rf"[ \t#*]*overall score[\s:*]*{_NUMBER}[ \t*]*", _FLAGS)
_HEADINGS = {
    "weaknesses": re.compile(r"^[ \t#*]*weakness(?:es)?[ \t*]*(?::[ \t*]*|$)", _FLAGS),
    "suggestions": re.compile(r"^[ \t#*]*suggestions?[ \t*]*(?::[ \t*]*|$)", _FLAGS),
}


class Drop(NamedTuple):
    """Why something is left out: a reason to be counted, and what is known of this case."""

    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critique:
    """A critic's feedback on a response with its score (1 to 10), and the response it would have given itself."""

    weaknesses: str
    suggestions: str
    score: float
    refinement: str


def read_critique(text: str) -> Critique | Drop:
    """Return the parts of a critic's text; a part that is missing or empty is the reason to drop it.

    The reasons are no_weaknesses, no_suggestions, no_score and no_refinement.
    """
    improved = _IMPROVED.search(text)
    refinement = text[improved.end() :].strip() if improved else ""
    if improved is None or not refinement:
        return Drop("no_refinement", text[-200:])
    head = text[: improved.start()]
    # The last of several: a critic that reasons about scores comes to its own in the end.
    scores = list(_SCORE.finditer(head))
    score = in_range(scores[-1].group(1)) if scores else None
    if score is None:
        return Drop("no_score", head[-200:])
    found = {name: pattern.search(head) for name, pattern in _HEADINGS.items()}
    starts = sorted([scores[-1].start(), *(match.start() for match in found.values() if match)])
    parts = {}
    for name, match in found.items():
        end = next((start for start in starts if match and start >= match.end()), len(head))
        parts[name] = head[match.end() : end].strip() if match else ""
        if not parts[name]:
            return Drop(f"no_{name}", head[:200])
    return Critique(**parts, score=score, refinement=refinement)


def read_score(text: str) -> float | None:
    """Return the last score of a text, None where it has none from 1 to 10."""
    found = re.findall(_NUMBER, text)
    return in_range(found[-1]) if found else None


def in_range(number: str) -> float | None:
    """Return a written number as a score, None where it is outside of 1 to 10."""
    return score if LOWEST <= (score := float(number)) <= HIGHEST else None
