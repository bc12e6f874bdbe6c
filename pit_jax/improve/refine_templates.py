"""What a model that refines its own answers is told: prompt sets as text files.

    === feedback ===
    ... {prompt} ... {response} ...
    === entry ===
    ... {response} ... {feedback} ...
    === refine ===
    ... {prompt} ... {history} ...
    === stop ===
    a text that says, in a feedback, that nothing is left to improve
    === score ===
    Total score: {score}/30

The first three sections must be there, the others need not. `{history}` is the entries of all earlier rounds and of the
present one, oldest first, one after another. A field occurs once in its section; `{{` and `}}` are braces. A section
reaches to the line before the next heading: leave empty lines where the model is to see some. What stands before the
first heading is a comment.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from pit_jax.core.errors import invalid, nearest
from pit_jax.text.prompt_files import Shelf, fill
from pit_jax.text.template import Field, Literally, Piece, parse

FIELDS: dict[str, tuple[str, ...]] = {
    "feedback": ("prompt", "response"),
    "entry": ("response", "feedback"),
    "refine": ("prompt", "history"),
    "stop": (),
    "score": ("score",),
}
SHELF = Shelf(package="pit_jax.improve", folder="refine_prompts", setting="SelfRefine.prompts")
NEEDED = ("feedback", "entry", "refine")
_HEADING = re.compile(r"^=== *(.*?) *===[ \t]*\n?", re.MULTILINE)
_NOISE = r"[\s*_]*"
"""What models put between the words of a form that they were asked for: line breaks, and emphasis of Markdown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinePrompts:
    """A prompt set; the fields are its sections.

    name: of the file, for errors and reports. stop, score: empty where the set has none.
    """

    name: str
    feedback: str
    entry: str
    refine: str
    stop: str = ""
    score: str = ""

    def __post_init__(self) -> None:
        """Parse every section, so that a mistake shows at once."""
        for section in NEEDED:
            self._pieces(section)
        _ = self.marker, self._score

    def ask_feedback(self, prompt: str, response: str) -> str:
        """Return the request for feedback on a response."""
        return self._fill("feedback", prompt=prompt, response=response)

    def ask_refinement(self, prompt: str, history: Sequence[tuple[str, str]]) -> str:
        """Return the request for a better response.

        Args:
          prompt: x.
          history: (response, feedback) of the rounds to be shown, the present one last.
        """
        entries = [self._fill("entry", response=response, feedback=feedback) for response, feedback in history]
        return self._fill("refine", prompt=prompt, history="".join(entries))

    @functools.cached_property
    def marker(self) -> str:
        """What says in a feedback that nothing is left to improve, in lower case; empty for none."""
        pieces = parse(self.stop, (), self._where("stop"))
        return "".join(piece.text for piece in pieces if isinstance(piece, Literally)).strip().lower()

    @property
    def scored(self) -> bool:
        """Whether feedback holds a score."""
        return bool(self.score.strip())

    @functools.cached_property
    def highest(self) -> float:
        """The highest score there is: what follows `{score}/`; infinite where nothing of the kind does."""
        return math.inf if self._score is None else self._score[1]

    def says_stop(self, feedback: str) -> bool:
        """Return whether a feedback holds the stop text; case does not count."""
        return bool(self.marker) and self.marker in feedback.lower()

    def read_score(self, feedback: str) -> float | None:
        """Return the score that a feedback gives, None if it gives none or an impossible one.

        Of several the last counts: it follows the explanation. White space, emphasis and case do not.
        """
        if self._score is None:
            return None
        pattern, highest = self._score
        found = pattern.findall(feedback)
        value = float(found[-1]) if found else math.nan
        return value if 0.0 <= value <= highest else None

    @functools.cached_property
    def _score(self) -> tuple[re.Pattern[str], float] | None:
        if not self.scored:
            return None
        pieces = self._pieces("score")
        if all(isinstance(piece, Field) for piece in pieces):
            fix = "Write words around {score}, such as Total score: {score}/30."
            raise invalid(self._where("score"), self.score, "have words by which the score is found", fix)
        parts = [r"(\d+(?:\.\d+)?)" if isinstance(piece, Field) else _lenient(piece.text) for piece in pieces]
        after = pieces[-1].text if isinstance(pieces[-1], Literally) else ""
        most = re.match(r"\s*/\s*(\d+(?:\.\d+)?)", after)
        # Neither 4/30 in -4/30 nor 24/3 in 24/30 is meant.
        pattern = re.compile(r"(?<![\d.-])" + _NOISE.join(parts) + r"(?!\.?\d)", re.IGNORECASE)
        return pattern, float(most.group(1)) if most else math.inf

    def _fill(self, section: str, **texts: str) -> str:
        """Return a section with its fields filled in; what looks like a field in a text stays as it is."""
        return fill(self._pieces(section), **texts)

    def _pieces(self, section: str) -> tuple[Piece, ...]:
        return parse(vars(self)[section], FIELDS[section], self._where(section))

    def _where(self, section: str) -> str:
        return f"section {section!r} of refine prompts {self.name}"


def shipped() -> list[str]:
    """Return the names of the prompt sets that come with pit_jax."""
    return SHELF.shipped()


def load(name: str) -> RefinePrompts:
    """Return a prompt set by its name, or from a file ending in `.txt`.

    Raises:
      ConfigError: there is no such set, a section is missing or unknown, or its fields are wrong.
      DataError: the file is not UTF-8.
    """
    file = SHELF.read(name)
    return RefinePrompts(name=file.name, **_sections(file.text, name))


def _sections(text: str, where: str) -> dict[str, str]:
    """Cut a file at its headings."""
    _, *cut = _HEADING.split(text)
    found: dict[str, str] = {}
    for heading, body in zip(cut[::2], cut[1::2], strict=True):
        if heading not in FIELDS:
            fix = f"Rename the section.{nearest(heading, FIELDS)}"
            raise invalid(f"{where}: heading", heading, f"be one of {list(FIELDS)}", fix)
        if heading in found:
            raise invalid(f"{where}: heading", heading, "be there once", "Join the sections, or remove one.")
        found[heading] = body.removesuffix("\n")
    missing = [section for section in NEEDED if not found.get(section, "").strip()]
    if missing:
        fix = f"Add a line `=== {missing[0]} ===` and the text below it."
        raise invalid(f"{where}: sections", list(found), f"have {missing[0]!r} with a text", fix)
    return found


def _lenient(text: str) -> str:
    """Return a pattern for a text, in which white space may be any, and words may be emphasised."""
    words = [re.escape(word) for word in re.findall(r"\w+|[^\w\s]", text)]
    return _NOISE.join(words)
