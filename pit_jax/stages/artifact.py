"""What a stage leaves behind, and how it is found again: network, codec and parameters from one directory."""

from __future__ import annotations

import functools
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError
from pit_jax.core.types import Params
from pit_jax.io import files, serialize
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models.api import ConditionalLM
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.sharding import rules
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import load_tokenizer

MANIFEST = "stage.json"
RESULT = "result.json"
SNAPSHOTS = "snapshots"
RESPONSES = "responses"
ORDER = "stages.json"

Network = ConditionalLM | ScalarModel | ValueModel


def abstract_params(network: Network, mesh: Mesh | None) -> Params:
    """Return shapes of a network's parameters, with shardings on `mesh` (None: the default device)."""
    shapes = network.abstract()
    if mesh is None:
        return shapes
    shardings = rules.specs(network.axes(), shapes, rules.DEFAULT_RULES, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def nothing_made(stage: epath.Path) -> bool:
    """Return whether a stage directory holds nothing that would be lost: no record, checkpoint, answer or result."""
    made = any((stage / name).exists() for name in ("metrics.jsonl", SNAPSHOTS, RESPONSES, RESULT))
    return not made and not list(stage.glob("checkpoint_*"))


def finished_stages(run: epath.Path) -> list[epath.Path]:
    """Return the directories of a run's finished stages, in the order in which they were finished.

    The order is written down, for times of files do not survive a copy.
    """
    found = {path.parent.name: path.parent for path in run.glob(f"*/{MANIFEST}") if (path.parent / RESULT).exists()}
    order = [name for name in _order(run) if name in found]
    return [found[name] for name in [*order, *sorted(found.keys() - set(order))]]


def note_finished(run: epath.Path, stage: str) -> None:
    """Put a stage at the end of the run's order; one that was made anew keeps its place."""
    order = _order(run)
    if stage not in order:
        files.write_json(run / ORDER, [*order, stage])


def _order(run: epath.Path) -> list[str]:
    return files.read_json(run / ORDER) if (run / ORDER).exists() else []


HARMLESS = frozenset({"tensorboard", "wandb_project", "mesh", "log_every", "eval_every", "checkpoint_every", "keep"})
"""Settings that change what is written or where it is computed, not what is trained: a run goes on without them."""


def changes(old: Any, new: Any) -> list[str]:
    """Return a line for every difference of two configurations that makes them different runs."""
    found = serialize.differences(old, new)
    return [line for line in found if HARMLESS.isdisjoint(line.partition(": ")[0].split("."))]


HOW_IT_RUNS = frozenset({"remat", "scan_layers", "dtype", "param_dtype", "logprob_chunk", "dropout"})
"""Fields of a model's config that a run may set otherwise than the checkpoint it starts from."""


def other_model(old: Any, new: Any) -> list[str]:
    """Return a line for every difference of two networks that makes their parameters unusable for each other."""
    found = serialize.differences(old, new)
    return [line for line in found if line.partition(": ")[0].rpartition(".")[2] not in HOW_IT_RUNS]


def claim(path: epath.Path, wanted: dict[str, Any], *, what: str) -> None:
    """Write `wanted` as the JSON file `path`, or check that the file says the same.

    Raises:
      CheckpointError: it says something else; the first difference is named and nothing is changed.
    """
    if not path.exists():
        files.write_json(path, wanted)
        return
    found = changes(files.read_json(path), serialize.to_json(wanted))
    if found:
        raise CheckpointError(different(path.parent, what, found))


def different(directory: epath.Path, what: str, found: list[str]) -> str:
    """Return the message for a directory that was made with another configuration."""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{directory} holds a {what} with another configuration: {found[0]}{more}. "
        "Use another MODEL_DIR, set the value back, or delete that directory to start anew."
    )


class Artifact:
    """A stage's directory, opened for reading: it carries everything needed to use what was trained."""

    def __init__(self, directory: epath.PathLike) -> None:
        self.directory = epath.Path(directory)
        if not (self.directory / MANIFEST).exists():
            raise CheckpointError(
                f"{self.directory} is not the directory of a trained stage: it has no {MANIFEST}. "
                "Give MODEL_DIR/STAGE, or run that stage first."
            )
        self.manifest: dict[str, Any] = files.read_json(self.directory / MANIFEST)

    @property
    def finished(self) -> bool:
        """Whether the stage has run to its end."""
        return (self.directory / RESULT).exists()

    @functools.cached_property
    def network(self) -> Network:
        """The network whose parameters the checkpoints hold."""
        return serialize.from_json(self.manifest["network"])

    @functools.cached_property
    def codec(self) -> Codec:
        """How texts become this network's token rows."""
        templates, lengths = (serialize.from_json(self.manifest[name]) for name in ("templates", "lengths"))
        assert isinstance(templates, Templates)
        assert isinstance(lengths, Lengths)
        return Codec(tokenizer=load_tokenizer(str(self.directory / "tokenizer")), templates=templates, lengths=lengths)

    def params(self, snapshot: str | None = None, mesh: Mesh | None = None) -> Params:
        """Return the parameters of the newest checkpoint, or of a named snapshot.

        Raises:
          CheckpointError: there is none, it cannot be read, or the snapshot is not there (those there are named).
        """
        wanted = abstract_params(self.network, mesh)
        if snapshot is None:
            checkpoints = Checkpoints(self.directory, keep=None)
            step = checkpoints.latest()
            if step is None:
                raise CheckpointError(f"{self.directory} has no complete checkpoint. Run the stage first.")
            return checkpoints.restore_params(step, wanted)
        names = self.manifest["snapshots"]
        if snapshot not in names:
            raise CheckpointError(
                f"{self.directory} keeps no snapshot {snapshot!r}; it has {sorted(names) or 'none'}. "
                "Name one of them, or add it to the stage's snapshots or rounds."
            )
        return Checkpoints(self.directory / SNAPSHOTS, keep=None).restore_params(names[snapshot], wanted)

    def trunk(self, snapshot: str | None = None, mesh: Mesh | None = None) -> Params:
        """Return the language-model parameters, without a reward or value head if there is one."""
        params = self.params(snapshot, mesh)
        return params["trunk"] if isinstance(self.network, ScalarModel | ValueModel) else params

    @property
    def lm(self) -> ConditionalLM:
        """The language model inside the network."""
        return self.network.lm if isinstance(self.network, ScalarModel | ValueModel) else self.network


def split_reference(reference: str) -> tuple[str, str | None]:
    """Return (stage or path, snapshot) of `stage`, `stage:snapshot`, `/path/to/stage` or `/path/to/stage:snapshot`."""
    head, colon, tail = reference.rpartition(":")
    return (head, tail) if colon and head and "/" not in tail else (reference, None)
