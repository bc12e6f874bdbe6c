"""What a stage leaves behind, and how it is found again: network, codec and parameters from one directory."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError
from pit_jax.core.types import Params
from pit_jax.io import files, serialize
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import HOW_IT_RUNS, ModelConfig
from pit_jax.models.convert import pretrained
from pit_jax.models.quantised import quantise
from pit_jax.models.trained import Network, abstract_params, divide, has_head, language_model_of, reconfigured, whole
from pit_jax.stages.external import External
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import load_tokenizer
from pit_jax.train import loop

MANIFEST = "stage.json"
RESULT = "result.json"
SNAPSHOTS = "snapshots"
BEST = "best"
"""Snapshot of a stage that keeps its best checkpoint (`Loop.keep_best`)."""
RESPONSES = "responses"
ORDER = "stages.json"
RUN = "run.json"


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


HARMLESS = frozenset(
    {"tensorboard", "wandb_project", "mesh", "log_every", "eval_every", "checkpoint_every", "keep", "keep_best"}
    # Whether prompts are computed once for their responses, rows that have ended are replaced, tokens are drafted, and
    # when programs are compiled.
    | {"share_prompts", "portions", "draft_tokens", "compile_threads"}
    # How patiently an endpoint is asked and what it may cost (evaluation/endpoint_config.py), not what it is asked.
    | {"limits", "budget", "key_env"}
)
"""Settings that change what is written or where it is computed, not what is trained: a run goes on without them."""


def changes(old: Any, new: Any) -> list[str]:
    """Return a line for every difference of two configurations that makes them different runs."""
    found = serialize.differences(old, new)
    return [line for line in found if HARMLESS.isdisjoint(line.partition(": ")[0].split("."))]


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
    """A stage's directory, opened for reading: it carries everything needed to use what was trained.

    `in_floats`: adapters that were trained on a quantised base come on the float weights that it was made of, as they
    are merged and exported.
    """

    def __init__(self, directory: epath.PathLike, *, in_floats: bool = False) -> None:
        self.directory, self._in_floats = epath.Path(directory), in_floats
        if not (self.directory / MANIFEST).exists():
            raise CheckpointError(
                f"{self.directory} is not the directory of a trained stage: it has no {MANIFEST}. "
                "Give MODEL_DIR/STAGE, or run that stage first."
            )
        self.manifest: dict[str, Any] = files.read_json(self.directory / MANIFEST)

    @property
    def base(self) -> str | None:
        """Reference of what its adapters stand on, None for a whole model; a stage of its run has its directory."""
        reference = self.manifest["base"]
        return None if reference is None else base_key(reference, self.directory.parent)

    @property
    def finished(self) -> bool:
        """Whether the stage has run to its end."""
        return (self.directory / RESULT).exists()

    @functools.cached_property
    def network(self) -> Network:
        """The network whose parameters the checkpoints hold."""
        network: Network = serialize.from_json(self.manifest["network"])
        quantised = language_model_of(network).config.quantised
        return reconfigured(network, quantised=None) if self._in_floats and quantised else network

    @functools.cached_property
    def codec(self) -> Codec:
        """How texts become this network's token rows."""
        templates, lengths = (serialize.from_json(self.manifest[name]) for name in ("templates", "lengths"))
        assert isinstance(templates, Templates)
        assert isinstance(lengths, Lengths)
        return Codec(tokenizer=load_tokenizer(str(self.directory / "tokenizer")), templates=templates, lengths=lengths)

    def params(
        self, snapshot: str | None = None, mesh: Mesh | None = None, bases: dict[str, Params] | None = None
    ) -> Params:
        """Return the parameters of the newest checkpoint, or of a named snapshot.

        Adapters come with their base: that of `bases` if it is there (and it is put there otherwise), so that one
        copy serves any number of them.

        Raises:
          CheckpointError: there is none, it cannot be read, or the snapshot is not there (those there are named).
        """
        frozen, wanted = divide(self.network, abstract_params(self.network, mesh))
        trained = self._restore(snapshot, wanted)
        if frozen is None:
            return trained
        base = self._base(mesh, {} if bases is None else bases)
        return whole({"trunk": base} if has_head(self.network) else base, trained)

    def _restore(self, snapshot: str | None, wanted: Params) -> Params:
        if snapshot is None:
            checkpoints = Checkpoints(self.directory, keep=None)
            step = checkpoints.latest()
            if step is None:
                raise CheckpointError(f"{self.directory} has no complete checkpoint. Run the stage first.")
            return checkpoints.restore_params(step, wanted)
        names = self.manifest["snapshots"]
        if snapshot == BEST and BEST not in names:
            return Checkpoints(self.directory, keep=None).restore_params(self._best_step(), wanted)
        if snapshot not in names:
            raise CheckpointError(
                f"{self.directory} keeps no snapshot {snapshot!r}; it has {sorted(names) or 'none'}. "
                "Name one of them, or add it to the stage's snapshots or rounds."
            )
        return Checkpoints(self.directory / SNAPSHOTS, keep=None).restore_params(names[snapshot], wanted)

    def _best_step(self) -> int:
        """Return the step of the best evaluation.

        Raises:
          CheckpointError: the stage is not finished, or has not kept its best checkpoint.
        """
        ranking = (loop.finished(self.directory) or {}).get("best")
        if not ranking:
            raise CheckpointError(
                f"{self.directory} keeps no best checkpoint. Set keep_best in its Loop or RlTraining and run it; "
                "or name another snapshot."
            )
        return ranking[0][0]

    def _base(self, mesh: Mesh | None, bases: dict[str, Params]) -> Params:
        """Return the frozen parameters that this stage's adapters stand on."""
        key = self.base
        assert key is not None
        if key not in bases:
            place, snapshot = split_reference(key)
            plain = dataclasses.replace(self.lm.config, lora=None, quantised=None)
            bases[key] = frozen(open_checkpoint(place, plain).trunk(snapshot, mesh), self.lm)
        return bases[key]

    def trunk(
        self, snapshot: str | None = None, mesh: Mesh | None = None, bases: dict[str, Params] | None = None
    ) -> Params:
        """Return the language-model parameters, without a reward or value head if there is one."""
        params = self.params(snapshot, mesh, bases)
        return params["trunk"] if has_head(self.network) else params

    @property
    def lm(self) -> ConditionalLM:
        """The language model inside the network."""
        return language_model_of(self.network)


def frozen(params: Params, lm: ConditionalLM) -> Params:
    """Return a whole model, which may have a head, as it lies under the adapters of `lm`; `params` is used up."""
    if lm.config.quantised is None:
        return params
    if "trunk" in params:
        return params | {"trunk": quantise(params["trunk"], lm, donate=True)}
    return quantise(params, lm, donate=True)


def base_key(reference: str, run: epath.Path) -> str:
    """Return a reference that means the same from any run and any working directory: one name for one base.

    Args:
      reference: of a stage of `run`, a path, or a hub name.
      run: a run's directory.
    """
    place, snapshot = split_reference(reference)
    where = place if "/" in place else f"{run}/{place}"
    if files.is_local(where) and epath.Path(where).exists():
        where = os.path.abspath(where)
    return where if snapshot is None else f"{where}:{snapshot}"


def open_checkpoint(place: str, like: ModelConfig) -> Artifact | External:
    """Return what a path or a hub name holds: a stage of a run, or a checkpoint of another project.

    Args:
      place: where.
      like: how a checkpoint of another project is to run, see `External`.
    Raises:
      CheckpointError: it is neither.
    """
    if not (epath.Path(place) / MANIFEST).exists() and pretrained.is_checkpoint(place):
        return External(place, like)
    return Artifact(place)


def find_stage(path: epath.PathLike, *, in_floats: bool = False) -> tuple[Artifact, str | None] | None:
    """Return the stage and snapshot that `RUN/STAGE` or `RUN/STAGE:SNAPSHOT` names, None if it names something else.

    Raises:
      CheckpointError: it names a whole run, or a snapshot of something that is no stage.
    """
    text = os.fspath(path)
    place, snapshot = (text, None) if epath.Path(text).exists() else split_reference(text)
    directory = epath.Path(place)
    if (directory / MANIFEST).exists():
        return Artifact(directory, in_floats=in_floats), snapshot
    if (directory / RUN).exists():
        names = [stage.name for stage in finished_stages(directory) if any(stage.glob("checkpoint_*"))]
        raise CheckpointError(
            f"{directory} is a whole run. Name one of its stages: "
            f"{', '.join(f'{directory}/{name}' for name in names) or 'none is finished yet'}."
        )
    if snapshot is not None and directory.exists():
        raise CheckpointError(f"{directory} is no stage of a run, so it has no snapshot {snapshot!r}. Name it alone.")
    return None


def split_reference(reference: str) -> tuple[str, str | None]:
    """Return (stage or path, snapshot) of `stage`, `stage:snapshot`, `/path/to/stage` or `/path/to/stage:snapshot`."""
    head, colon, tail = reference.rpartition(":")
    return (head, tail) if colon and head and "/" not in tail else (reference, None)
