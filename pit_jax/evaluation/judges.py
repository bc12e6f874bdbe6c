"""Judges that give each response a score; the higher of two scores wins."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import ConfigError, nearest


class Judge(Protocol):
    """Anything that scores responses to prompts."""

    @property
    def name(self) -> str:
        """Name shown in tables and in report.json."""
        ...

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return one score per (prompt, response)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionJudge:
    """A program that checks a response: `function(prompt, response) -> float`."""

    name: str
    function: Callable[[str, str], float]

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return the function's value for every pair."""
        return np.array([self.function(x, y) for x, y in zip(prompts, responses, strict=True)], np.float64)


def import_function(path: str) -> Callable[[str, str], float]:
    """Return the function an import path `package.module:name` stands for."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"judge = {path!r} must be an import path 'module:function'; {error}. Fix the module."
        ) from error
    if not name or name not in vars(found):
        raise ConfigError(f"judge = {path!r} must name a function of module {module!r}.{nearest(name, vars(found))}")
    return vars(found)[name]
