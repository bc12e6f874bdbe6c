"""Which references the improver meets in which round of RL.

METHOD stage 1 sums over y_ref in {y_l, y_w} of the data set, stage 2 takes y_ref ~ M_P^RL(.|x) (PIT, arXiv
2310.00898, section 3.4). Here a curriculum is any list of rounds, each with any of four kinds of references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pit_jax.core.errors import invalid, nearest
from pit_jax.text.codec import Codec

REFERENCES = ("chosen", "rejected", "policy", "improver")
"""Dataset answers y_w and y_l; a sample of M_P^RL; the improver's own improvement of such a sample."""

_KINDS = "Choose among chosen, rejected, policy, improver."


class Context(NamedTuple):
    """What the improver is asked to improve: a prompt x and a reference y_ref, as raw ids without EOS."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """A number of RL steps with the same kinds of references; each prompt meets every one of them."""

    name: str
    steps: int
    references: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the steps and the kinds of references."""
        object.__setattr__(self, "references", tuple(self.references))
        if self.steps < 0:
            raise invalid("Round.steps", self.steps, "be >= 0", f"Give the steps of round {self.name!r}.")
        if not self.references or len(set(self.references)) != len(self.references):
            raise invalid("Round.references", self.references, "name at least one kind, each once", _KINDS)
        for kind in self.references:
            if kind not in REFERENCES:
                raise invalid("Round.references", kind, f"be one of {REFERENCES}", _KINDS + nearest(kind, REFERENCES))


class Position(NamedTuple):
    """A place in the curriculum: the round, its number, and the step inside it."""

    round: Round
    number: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Rounds in the order in which they are trained; the parameters go from each to the next."""

    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        """Check that there is a round and that names tell rounds apart."""
        object.__setattr__(self, "rounds", tuple(self.rounds))
        names = [entry.name for entry in self.rounds]
        if not names:
            raise invalid("Curriculum.rounds", names, "have at least one round", "Add a Round.")
        if len(set(names)) != len(names):
            raise invalid("Curriculum.rounds", names, "have different names", "Rename one of the rounds.")

    @property
    def steps(self) -> int:
        """Number of RL steps of all rounds."""
        return sum(entry.steps for entry in self.rounds)

    def at(self, step: int) -> Position:
        """Return the place of global step `step` (0-based); rounds of no steps are skipped.

        Raises:
          ConfigError: the step is outside the curriculum.
        """
        inside = step
        for number, entry in enumerate(self.rounds):
            if 0 <= inside < entry.steps:
                return Position(entry, number, inside)
            inside -= entry.steps
        raise invalid("step", step, f"lie in 0..{self.steps - 1}", "Add a round or raise the steps of the last one.")

    def check_contexts(self, contexts: int) -> None:
        """Check that `contexts` per step can be shared out evenly over the references of every round.

        Raises:
          ConfigError: a round's number of references does not divide `contexts`.
        """
        for entry in self.rounds:
            records_per_step(entry, contexts)


def records_per_step(entry: Round, contexts: int) -> int:
    """Return how many records make `contexts` contexts of this round: each record gives one per reference."""
    kinds = len(entry.references)
    if contexts % kinds:
        fix = f"Choose a multiple of {kinds}, or other references for round {entry.name!r}."
        raise invalid("contexts per step", contexts, f"be a multiple of the round's {kinds} references", fix)
    return contexts // kinds


def contexts(
    codec: Codec,
    entry: Round,
    records: Sequence[Mapping[str, Sequence[int]]],
    sampled: Mapping[str, Sequence[Sequence[int]]],
) -> list[Context]:
    """Return the contexts of a step, each record followed through all references of the round.

    Args:
      codec: knows the EOS that dataset answers end with and references do not.
      entry: the round.
      records: examples of the `rl` view, `{prompt, chosen, rejected}` as token ids.
      sampled: for "policy" and "improver", where the round names them, one reference for each record.
    """
    answers = {kind: [record[kind] for record in records] for kind in ("chosen", "rejected")} | dict(sampled)
    return [
        Context(tuple(record["prompt"]), codec.without_eos(answers[kind][number]))
        for number, record in enumerate(records)
        for kind in entry.references
    ]
