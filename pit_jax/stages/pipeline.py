"""A recipe: what all stages share, and the stages in their order. `pit-jax pipeline` runs it from end to end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from etils import epath

from pit_jax.core.errors import ConfigError, invalid, nearest
from pit_jax.io import serialize
from pit_jax.io.progress import duration
from pit_jax.sharding import processes, rules
from pit_jax.stages import together
from pit_jax.stages.artifact import BEST, MANIFEST, nothing_made, split_reference
from pit_jax.stages.dpo import Dpo
from pit_jax.stages.lm import LanguageModel
from pit_jax.stages.reward import Reward
from pit_jax.stages.rl import Rl
from pit_jax.stages.run import Experiment, Run
from pit_jax.stages.sft import Sft
from pit_jax.stages.srt_tune import SrtTune
from pit_jax.stages.training_programs import ahead
from pit_jax.train.compiling import Compiling, threads

_LOG = logging.getLogger(__name__)
_TAKEN = ("report", "tokenizer")


class Stage(Protocol):
    """A frozen dataclass that does one stage; it is complete once its result is written."""

    verb: ClassVar[str]
    """Command that runs it alone: lm, sft, reward, rl, dpo, evaluate, ..."""

    @property
    def name(self) -> str:
        """Name of its directory in the run."""
        ...

    @property
    def role(self) -> str:
        """Which of the two stages of a verb it is, "" where there is one."""
        ...

    def inputs(self) -> list[str]:
        """Return references of the checkpoints it starts from or reads."""
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
        """Check that names are distinct and can be directories of the run."""
        object.__setattr__(self, "stages", tuple(self.stages))
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise invalid("Recipe.stages", twice, "have different names", "Rename one of them.")
        bad = [name for name in names if name in _TAKEN or not name or set(name) & set("/:")]
        if bad:
            raise invalid("Recipe.stages", bad, f"have names without / and :, other than {_TAKEN}", "Rename them.")
        if self.seed < 0:
            raise invalid("RANDOM_SEED", self.seed, "be 0 or more", "Use a small whole number.")

    def run(self, names: Sequence[str] | None = None, claimed: Callable[[], None] | None = None) -> None:
        """Run the named stages, or all: finished ones are skipped, an interrupted one continues.

        Args:
          names: of the stages.
          claimed: called once all that the run directory holds is found to be this recipe's; nothing is computed yet.
        Raises:
          ConfigError: a name is not that of a stage, or a stage needs one that is not made before it.
          CheckpointError: the run directory belongs to another seed or configuration.
          ProcessError: the hosts do not have the same recipe, versions, data or directory.
        """
        known = {stage.name: stage for stage in self.stages}
        for name in names or ():
            if name not in known:
                raise ConfigError(f"There is no stage {name!r} in the recipe.{nearest(name, known)}")
        together.agree_on_settings({"stages to run": list(names or ()), "recipe": serialize.to_json(self)})
        self.check_references()
        run = Run.claim(self.model_dir, self.seed, self.experiment)
        wanted = [stage for stage in self.stages if names is None or stage.name in names]
        together.write("check of what is there", lambda: _check_same(run, wanted))
        if claimed is not None:
            claimed()
        for stage in wanted:
            run_stage(run, stage)

    def check_references(self) -> None:
        """Check that each stage finds what it names: hours of training should not end at a misspelt name.

        Raises:
          ConfigError: a stage names one that the recipe has not or has later, or a snapshot that is not kept.
        """
        made: dict[str, Stage] = {}
        self._check_base()
        for stage in self.stages:
            for reference in self.experiment.inputs(stage):
                place, snapshot = split_reference(reference)
                if "/" not in place:
                    self._check_reference(stage.name, place, snapshot, made)
            made[stage.name] = stage

    def _check_base(self) -> None:
        """Check that the base of adapters, if it is a stage of this run, is one of the recipe or was made before."""
        base = self.experiment.base
        if base is None or "/" in base:
            return
        place, names = split_reference(base)[0], [stage.name for stage in self.stages]
        if place not in names and not (epath.Path(self.model_dir) / place / MANIFEST).exists():
            fix = f"Name a stage that comes first, a path or a hub name.{nearest(place, names)}"
            raise invalid("Adapters.base", base, "name a stage of the recipe, or a checkpoint", fix)

    def _check_reference(self, name: str, place: str, snapshot: str | None, made: Mapping[str, Stage]) -> None:
        source = made.get(place)
        if source is None:
            if (epath.Path(self.model_dir) / place / MANIFEST).exists() and place not in {s.name for s in self.stages}:
                return  # made by another recipe of the same run
            path = f" For the directory of that name write './{place}'." if epath.Path(place).exists() else ""
            raise ConfigError(
                f"The stage {name!r} needs {place!r}, but no stage before it has that name.{path}{nearest(place, made)}"
            )
        kept = source.kept() if isinstance(source, Rl) else {}
        if snapshot is not None and snapshot not in kept and not (snapshot == BEST and _keeps_best(source)):
            raise ConfigError(
                f"The stage {name!r} needs '{place}:{snapshot}', but {place!r} keeps {sorted(kept) or 'no snapshots'}. "
                "Name one of them, add it to Rl.snapshots, or set keep_best for ':best'."
            )


def _keeps_best(stage: Stage) -> bool:
    """Return whether a stage keeps the checkpoint of its best evaluation."""
    if isinstance(stage, Rl):
        return stage.training.keep_best is not None
    return isinstance(stage, LanguageModel | Sft | Reward | Dpo | SrtTune) and stage.training.loop.keep_best is not None


def _check_same(run: Run, stages: Sequence[Stage]) -> None:
    """Check that what the stages have made so far is of this configuration, before the first of them goes on.

    Raises:
      CheckpointError: something is not.
    """
    for stage in stages:
        if not nothing_made(run.stage_directory(stage.name)):
            run.check_same(stage)


def run_stage(run: Run, stage: Stage) -> None:
    """Run one stage unless it is finished with this very configuration."""
    if processes.first(f"state of {stage.name}", lambda: _is_finished(run, stage)):
        _LOG.info("%s: finished before, skipped", stage.name)
        return
    begin = run.began = time.monotonic()
    processes.barrier(f"begin of {stage.name}")
    compiling = Compiling(threads(run.experiment.compile_threads), lambda: ahead(run, stage))
    # `rules.use`: what activations are cut by, see `sharding.rules.constrain`.
    with rules.use(run.mesh, run.rules), compiling as run.compiling:
        result = stage.run(run)
    run.finish(stage.name, result)
    _LOG.info("%s: done in %s", stage.name, duration(time.monotonic() - begin))


def _is_finished(run: Run, stage: Stage) -> bool:
    """Return whether a stage has run to its end.

    Raises:
      CheckpointError: it has, with another configuration.
    """
    if run.result(stage.name) is None:
        return False
    run.check_same(stage)
    return True
