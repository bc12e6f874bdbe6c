"""Which checkpoints are the best by an evaluation, and so are kept however old they grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from pit_jax.core.errors import ConfigError, invalid, nearest

MODES = ("max", "min")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Keep the checkpoints of the best evaluations, beside the newest ones.

    metric: name in the `eval` records. mode: whether the largest or the smallest value is best. count: how many stay;
    of equal ones the older.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    count: int = 1

    def __post_init__(self) -> None:
        """Check every field but the name, which the first evaluation tells."""
        if self.mode not in MODES:
            raise invalid("KeepBest.mode", self.mode, f"be one of {', '.join(MODES)}", "Choose one of them.")
        if self.count < 1:
            raise invalid("KeepBest.count", self.count, "be at least 1", "1 keeps the best one.")


class Best:
    """The best evaluations so far, as pairs (step, value), best first."""

    def __init__(self, config: KeepBest) -> None:
        """Start with none."""
        self._config = config
        self._ranking: list[tuple[int, float]] = []

    def to_json(self) -> dict[str, Any]:
        """Return what `restore` needs: the metric, whether it is to be large, and the ranking."""
        config = self._config
        return {"metric": config.metric, "mode": config.mode, "ranking": [list(entry) for entry in self._ranking]}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Take up the ranking of an earlier process, if it was one of the same metric."""
        if saved is not None and (saved["metric"], saved["mode"]) == (self._config.metric, self._config.mode):
            self._ranking = [(step, value) for step, value in saved["ranking"]][: self._config.count]

    @property
    def steps(self) -> list[int]:
        """Steps whose checkpoints stay."""
        return [step for step, _ in self._ranking]

    def takes(self, step: int, values: Mapping[str, float]) -> bool:
        """Return whether an evaluation is among the best, and remember it then; one that is no number never is.

        Raises:
          ConfigError: there is no such metric; those there are, are named.
        """
        name = self._config.metric
        if name not in values:
            known = ", ".join(sorted(values))
            raise ConfigError(f"KeepBest.metric = {name!r} must be one of {known}.{nearest(name, values)}")
        if math.isnan(values[name]):
            return False
        sign = -1 if self._config.mode == "max" else 1
        ranking = [*self._ranking, (step, float(values[name]))]
        self._ranking = sorted(ranking, key=lambda entry: (sign * entry[1], entry[0]))[: self._config.count]
        return step in self.steps
