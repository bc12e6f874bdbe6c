"""Low-rank adapters: W + s A B with W frozen (LoRA, Hu et al. 2021, arXiv 2106.09685), as part of the parameter tree.

A projection with an adapter has the leaves `kernel` (frozen), `lora_a` (D, r) and `lora_b` (r, ...). So a network's
parameters fall into two trees of one shape: the frozen base, which any number of networks can share, and what is
trained, which is all that optimisers and checkpoints see.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pit_jax.core.errors import invalid, nearest
from pit_jax.core.types import Params

A, B = "lora_a", "lora_b"
TARGETS = ("query", "key", "value", "out", "gate", "up", "down", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which linear maps get an adapter, and how large it is.

    rank: r. alpha: the adapter is scaled by s = alpha / r.
    targets: any of query, key, value, out (of every attention), gate, up, down (of the feed-forward layers) and
      head (the output matrix, where it is not tied).
    rslora: scale by alpha / r^1/2 instead, which keeps the update's size over ranks (arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    rslora: bool = False

    def __post_init__(self) -> None:
        """Check every field; make lists from gin hashable.

        Raises:
          ConfigError: a field is out of range, or names no linear map.
        """
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise invalid("Lora.rank", self.rank, "be at least 1", "8 to 64 is usual.")
        if not self.alpha > 0:
            raise invalid("Lora.alpha", self.alpha, "be positive", "Twice the rank is usual.")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            hint = nearest(unknown[0], TARGETS) if unknown else ""
            raise invalid("Lora.targets", self.targets, f"be some of {', '.join(TARGETS)}", f"Mend the list.{hint}")

    @property
    def scale(self) -> float:
        """Factor s of the adapter's product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def is_adapter(path: tuple[str, ...]) -> bool:
    """Return whether a leaf, given by the keys that lead to it, is a matrix of an adapter."""
    return path[-1] in (A, B)


def split(params: Params) -> tuple[Params, Params]:
    """Return (base, adapters): two trees that hold each leaf once; branches left empty are dropped."""
    base: Params = {}
    adapters: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            for part, kept in zip((base, adapters), split(value), strict=True):
                if kept:
                    part[name] = kept
        else:
            (adapters if is_adapter((name,)) else base)[name] = value
    return base, adapters


def join(base: Params, rest: Params) -> Params:
    """Return one tree with the leaves of both, that of `rest` where both have one; arrays are shared, not copied.

    Where `base` has a bare matrix and `rest` its adapter (the output matrix), the matrix becomes their `kernel`.
    """
    joined: dict[str, Any] = dict(base)
    for name, value in rest.items():
        under = joined.get(name, {})
        if isinstance(value, dict):
            joined[name] = join(under if isinstance(under, dict) else {"kernel": under}, value)
        else:
            joined[name] = value
    return joined
