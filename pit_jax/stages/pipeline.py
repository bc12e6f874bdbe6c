"""A recipe: what all stages share, and the stages in their order. `pit-jax pipeline` runs it from end to end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from pit_jax.core.errors import ConfigError, invalid, nearest
from pit_jax.io.progress import duration
from pit_jax.stages.run import Experiment, Run

_LOG = logging.getLogger(__name__)


class Stage(Protocol):
    """A frozen dataclass that does one stage; it is complete once its result is written."""

    @property
    def verb(self) -> str:
        """Command that runs it alone: lm, sft, reward, rl, evaluate."""
        ...

    @property
    def name(self) -> str:
        """Name of its directory in the run."""
        ...

    @property
    def role(self) -> str:
        """Which of the two stages of a verb it is, "" where there is one."""
        ...

    def run(self, run: Run) -> dict[str, Any]:
        """Do it, or continue where it was interrupted, and return what is to be reported."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The root of a configuration.

    model_dir: the run's directory. seed: of everything random. stages: in the order in which they run.
    """

    model_dir: str
    seed: int
    experiment: Experiment
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Check that names are distinct."""
        object.__setattr__(self, "stages", tuple(self.stages))
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise invalid("Recipe.stages", twice, "have different names", "Rename one of them.")
        if self.seed < 0:
            raise invalid("RANDOM_SEED", self.seed, "be 0 or more", "Use a small whole number.")

    def run(self, names: Sequence[str] | None = None) -> None:
        """Run the named stages, or all: finished ones are skipped, an interrupted one continues.

        Raises:
          ConfigError: a name is not that of a stage.
          CheckpointError: the run directory belongs to another seed or configuration.
        """
        known = {stage.name: stage for stage in self.stages}
        for name in names or ():
            if name not in known:
                raise ConfigError(f"There is no stage {name!r} in the recipe.{nearest(name, known)}")
        run = Run.claim(self.model_dir, self.seed, self.experiment)
        for stage in self.stages:
            if names is None or stage.name in names:
                run_stage(run, stage)


def run_stage(run: Run, stage: Stage) -> None:
    """Run one stage unless it is finished with this very configuration."""
    before = run.result(stage.name)
    if before is not None:
        run.check_finished(stage)
        _LOG.info("%s: finished before, skipped", stage.name)
        return
    begin = time.monotonic()
    result = stage.run(run)
    run.finish(stage.name, result)
    _LOG.info("%s: done in %s", stage.name, duration(time.monotonic() - begin))
