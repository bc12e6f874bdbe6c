"""Runs on paper: what a stage asks a run for, answered with shapes."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from pit_jax.core.errors import PitError
from pit_jax.core.types import Params
from pit_jax.models.api import ConditionalLM
from pit_jax.models.heads import ScalarModel
from pit_jax.models.trained import Network, divide, has_head, whole
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.reward import Reward
from pit_jax.stages.run import Run
from pit_jax.text.tokenizer import SentencePieceTraining, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pit_jax.stages.pipeline import Recipe

BYTES = "bytes"


class RunOnPaper(Run, abc.ABC):
    """A run with shapes in the place of parameters, so that a stage's programs come from the stage's own code."""

    def __init__(self, run: Run, mesh: Mesh, tokenizer: Tokenizer) -> None:
        super().__init__(str(run.directory), run.seed, run.experiment)
        # In the place of what `Run` would make: a mesh of this machine's devices, a tokenizer that may be trained.
        vars(self).update(mesh=mesh, tokenizer=tokenizer)
        self._base: Params | None = None

    def params(self, reference: str, lm: ConditionalLM | None = None) -> Params:
        """Return the shapes of a checkpoint's parameters, with its head if it has one; a base is shared."""
        network, lm = self._network_of(reference), lm or self.lm
        if lm.config.lora is None:
            network = dataclasses.replace(network, lm=lm) if isinstance(network, ScalarModel) else lm
            return self.shapes(network)
        base, trained = divide(network, self.shapes(network))
        assert base is not None
        if not self._stands_on_base(reference):
            return whole(base, trained)
        if self._base is None:
            self._base = base["trunk"] if has_head(network) else base
        return whole({"trunk": self._base} if has_head(network) else self._base, trained)

    def trunk(self, reference: str, lm: ConditionalLM | None = None) -> Params:
        """Return the shapes of the language model of a checkpoint."""
        params = self.params(reference, lm)
        return params["trunk"] if has_head(self._network_of(reference)) else params

    def language_model(self, reference: str, role: str | None = None, lm: ConditionalLM | None = None) -> Params:
        """Return the shapes of a language model."""
        del role
        return self.trunk(reference, lm)

    @abc.abstractmethod
    def _network_of(self, reference: str) -> Network:
        """Return the network of a checkpoint."""

    @abc.abstractmethod
    def _stands_on_base(self, reference: str) -> bool:
        """Return whether a checkpoint's adapters are on the run's base."""


class PlannedRun(RunOnPaper):
    """A run of which nothing exists: a tokenizer if it can be read."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.remarks: list[str] = []
        self._stages: Mapping[str, Any] = {stage.name: stage for stage in recipe.stages}
        tokenizer = self._readable_tokenizer(recipe.experiment.tokenizer)
        super().__init__(Run(recipe.model_dir, recipe.seed, recipe.experiment), mesh, tokenizer)

    def _readable_tokenizer(self, chosen: str | SentencePieceTraining) -> Tokenizer:
        if isinstance(chosen, SentencePieceTraining):
            self.remarks.append(
                "The tokenizer is trained by the run: templates are counted in bytes, a little too long."
            )
            return load_tokenizer(BYTES)
        try:
            return load_tokenizer(chosen)
        except (PitError, OSError):
            self.remarks.append(f"The tokenizer {chosen!r} cannot be read here: templates are counted in bytes.")
            return load_tokenizer(BYTES)

    def reward_model(self, reference: str, role: str) -> ScalarModel:
        """Return the network of a reward model; one of another run is taken to have the default head."""
        del role
        found = self._network_of(reference)
        return found if isinstance(found, ScalarModel) else ScalarModel(self.lm)

    def _network_of(self, reference: str) -> Network:
        stage = self._stages.get(split_reference(reference)[0])
        return ScalarModel(self.lm, stage.readout, stage.attention) if isinstance(stage, Reward) else self.lm

    def _stands_on_base(self, reference: str) -> bool:
        return split_reference(reference)[0] in self._stages or reference == self.experiment.base


class RunAhead(RunOnPaper):
    """An open run before it has read any parameters; what it makes to be compiled is the run's own."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, run.mesh, run.tokenizer)
        self.compiling = run.compiling
        self._run = run

    def reward_model(self, reference: str, role: str) -> ScalarModel:
        """Return the network of a reward model."""
        return self._run.reward_model(reference, role)

    def _network_of(self, reference: str) -> Network:
        found = self._run.artifact(reference).network
        return dataclasses.replace(found, lm=self.lm) if isinstance(found, ScalarModel) else self.lm

    def _stands_on_base(self, reference: str) -> bool:
        return self._run.artifact(reference).lm.config.lora is not None or reference == self.experiment.base
