"""Errors a user can act on: each names the field, the value, the rule and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PitError(Exception):
    """Base of every error whose cause lies in what the user gave; the CLI prints it without a traceback."""


class ConfigError(PitError):
    """A setting is wrong, missing or contradicts another."""


class DataError(PitError):
    """A data file, record, task or tokenizer cannot be used."""


class CheckpointError(PitError):
    """A checkpoint is missing, broken, or belongs to another run, model or stage."""


class TrainingError(PitError):
    """Training cannot go on, for example because a loss is not finite."""


class ProcessError(PitError):
    """The processes of a run do not go together: one is missing, or differs from the others."""


def invalid(field: str, value: object, rule: str, fix: str) -> ConfigError:
    """Return the error for a bad setting, in the one form all of them share.

    Args:
      field: name as the user writes it, for example `Optimizer.learning_rate`.
      value: what was given.
      rule: what must hold, completing "must ...".
      fix: what to do, as an imperative sentence.
    """
    return ConfigError(f"{field} = {value!r} must {rule}. {fix}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
