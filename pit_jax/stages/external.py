"""Checkpoints of other projects where a stage's directory could stand: as a start, an anchor or a base."""

from __future__ import annotations

from typing import Any

from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError
from pit_jax.core.hub import locate
from pit_jax.core.types import Params
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert import pretrained
from pit_jax.models.trained import Network, has_head, language_model_of


class External:
    """A Hugging Face or T5X checkpoint, opened for reading; it has the methods of `artifact.Artifact`.

    Args:
      place: its directory, or a name on the Hugging Face hub.
      like: the config that says how it is to run (dtypes, remat, ...); the architecture is the checkpoint's own.
    """

    def __init__(self, place: str, like: ModelConfig) -> None:
        self.directory = locate(place)
        self.network: Network = pretrained.read_network(self.directory, like=like)
        self.manifest = manifest_of(self.directory)

    @property
    def lm(self) -> ConditionalLM:
        """The language model inside the network."""
        return language_model_of(self.network)

    def params(
        self, snapshot: str | None = None, mesh: Mesh | None = None, bases: dict[str, Params] | None = None
    ) -> Params:
        """Return the parameters, with a head if there is one; `bases` is for checkpoints of adapters.

        Raises:
          CheckpointError: they cannot be read, or a snapshot is asked for.
        """
        if snapshot is not None:
            raise CheckpointError(f"{self.directory} has no snapshot {snapshot!r}. Name the directory alone.")
        return pretrained.load(self.directory, self.network, mesh)

    def trunk(
        self, snapshot: str | None = None, mesh: Mesh | None = None, bases: dict[str, Params] | None = None
    ) -> Params:
        """Return the language-model parameters."""
        params = self.params(snapshot, mesh, bases)
        return params["trunk"] if has_head(self.network) else params


def manifest_of(directory: epath.Path) -> dict[str, Any]:
    """Return what stands for the manifest that a stage's directory has."""
    return {"verb": "", "role": "", "files": pretrained.file_sizes(directory)}
