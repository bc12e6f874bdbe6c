"""The systems of an evaluation: each gives the held-out prompts responses, anew or from another one's responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from pit_jax.core.errors import invalid
from pit_jax.improve.accept import Improve
from pit_jax.stages.answers import Answered, Answers, iterated

ORIGINAL = "original"
"""Name of the system that the others are compared with."""


class System(Protocol):
    """Anything that answers prompts: a frozen dataclass, so that a gin file can list several."""

    @property
    def name(self) -> str:
        """Name of its responses in tables, and of their file."""
        ...

    def names(self) -> list[str]:
        """Return the names of all response sets it makes."""
        ...

    def inputs(self) -> list[str]:
        """Return references of the checkpoints it reads."""
        ...

    def starts_from(self) -> str | None:
        """Return the name of the response set it begins with, which must be made before; None if it needs none."""
        ...

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return its response sets, in the order of `names`.

        Args:
          answers: of these prompts.
          made: the sets made before at this temperature.
          temperature: of sampling.
        """
        ...


def check_systems(field: str, systems: Sequence[System]) -> None:
    """Check that all response sets have names of their own, and that each system finds what it begins with.

    Raises:
      ConfigError: one has not, or does not.
    """
    made: list[str] = []
    for system in systems:
        start = system.starts_from()
        if start is not None and start not in made:
            rule = f"begin with a response set made before: one of {made}"
            raise invalid(field, f"{system.name} (which begins with {start!r})", rule, "Correct `of`, or the order.")
        made += system.names()
    twice = sorted({name for name in made if made.count(name) > 1})
    if twice or any(not name or "/" in name for name in made):
        rule = f"differ from each other; {twice} occur twice" if twice else "have names without /"
        raise invalid(field, made, rule, "Rename them.")


def answer_all(systems: Sequence[System], answers: Answers, temperature: float) -> dict[str, Answered]:
    """Return the response sets of all systems at one temperature by name, in order."""
    made: dict[str, Answered] = {}
    for system in systems:
        made |= {entry.name: entry for entry in system.answer(answers, made, temperature)}
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """Samples of a policy; `sample` 1, 2, ... are further samples of the same prompts (resampling)."""

    name: str
    policy: str
    sample: int = 0

    def __post_init__(self) -> None:
        """Check the number."""
        if self.sample < 0:
            raise invalid("Sampled.sample", self.sample, "be 0 or more", "0 is the first sample, 1 the second.")

    def names(self) -> list[str]:
        """Return its one name."""
        return [self.name]

    def inputs(self) -> list[str]:
        """Return the policy."""
        return [self.policy]

    def starts_from(self) -> str | None:
        """Begin with the prompt."""
        return None

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return the samples."""
        del made
        return [answers.originals(self.name, self.policy, temperature, self.sample)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOf:
    """The best of n samples of a policy by R_P; the first of them is that of `Sampled`."""

    name: str
    policy: str
    reward: str
    n: int

    def names(self) -> list[str]:
        """Return its one name."""
        return [self.name]

    def inputs(self) -> list[str]:
        """Return the policy and R_P."""
        return [self.policy, self.reward]

    def starts_from(self) -> str | None:
        """Begin with the prompt."""
        return None

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return the chosen samples."""
        del made
        return [answers.best_of(self.name, self.policy, self.reward, temperature, self.n)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Improved:
    """An improver's responses after 1, 2, ... steps from the responses of another system: NAME, NAME_iter2, ..."""

    name: str
    improver: str
    gap: str
    improve: Improve = dataclasses.field(default_factory=Improve)
    of: str = ORIGINAL

    def names(self) -> list[str]:
        """Return a name for each step."""
        return iterated(self.name, self.improve.iterations)

    def inputs(self) -> list[str]:
        """Return the improver and R_PIT."""
        return [self.improver, self.gap]

    def starts_from(self) -> str | None:
        """Begin with the responses of `of`."""
        return self.of

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return the responses after each step."""
        del temperature  # that of the responses it begins with
        return answers.improved(self.name, self.improver, self.gap, self.improve, made[self.of])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """The replies of the data: y_w ("chosen") or y_l ("rejected")."""

    name: str
    which: Literal["chosen", "rejected"] = "chosen"

    def __post_init__(self) -> None:
        """Check the choice."""
        if self.which not in ("chosen", "rejected"):
            raise invalid("Replies.which", self.which, "be 'chosen' or 'rejected'", "Choose one of them.")

    def names(self) -> list[str]:
        """Return its one name."""
        return [self.name]

    def inputs(self) -> list[str]:
        """Read no checkpoint."""
        return []

    def starts_from(self) -> str | None:
        """Begin with the prompt."""
        return None

    def answer(self, answers: Answers, made: Mapping[str, Answered], temperature: float) -> list[Answered]:
        """Return the replies; one that is too long is cut, as a sample would be."""
        del made
        return [answers.replies(self.name, self.which, temperature)]
