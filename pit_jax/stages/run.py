"""A run directory: what its stages share, and how one stage finds what another has made.

MODEL_DIR/
  run.json                  seed and experiment; a run of another seed or experiment is refused
  tokenizer/                trained here or copied here
  stages.json               names of the finished stages, in the order in which they were finished
  STAGE/stage.json          manifest: stage config, network, templates, lengths, tokenizer
  STAGE/tokenizer/          so that a stage's directory can be used on its own
  STAGE/checkpoint_STEP/    parameters, optimiser, step, data position
  STAGE/snapshots/          parameters kept at chosen steps and at the end of curriculum rounds
  STAGE/metrics.jsonl       one line a record
  report/                   tables and pictures
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, DataError, invalid
from pit_jax.core.rng import key_for, stream_id
from pit_jax.core.tree import named_leaves, parameter_count
from pit_jax.core.types import Params
from pit_jax.data.folds import Split
from pit_jax.data.open import DataSpec, iterate_examples, open_records, open_source
from pit_jax.data.source import Source
from pit_jax.data.views import DropReport, Example
from pit_jax.io import files, serialize
from pit_jax.models import lora
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert import pretrained
from pit_jax.models.heads import ScalarModel
from pit_jax.models.presets.catalog import language_model
from pit_jax.models.trained import Network, abstract_params, has_head
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import init_sharded
from pit_jax.sharding.rules import Rules
from pit_jax.stages import together
from pit_jax.stages.artifact import (
    MANIFEST,
    RESULT,
    RUN,
    Artifact,
    base_key,
    changes,
    claim,
    different,
    frozen,
    note_finished,
    nothing_made,
    open_checkpoint,
    other_model,
    split_reference,
)
from pit_jax.stages.external import External, manifest_of
from pit_jax.stages.tokenizers import make_tokenizer, save_tokenizer
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import SentencePieceTraining, Tokenizer, load_tokenizer
from pit_jax.train.compiling import Compiling

TOKENIZER = "tokenizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Train adapters on one frozen base instead of whole models.

    base: the checkpoint that all adapters of the run stand on: a stage (it is trained whole, and so are `lm` stages),
      or a path or hub name. lora: size and place of the adapters.
    quantise: "int8" stores the base's kernels as integers, a quarter of float32's bytes. What is trained whole is not,
      nor is what adapters are merged into.
    """

    base: str
    lora: lora.Lora
    quantise: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all stages of a run have in common.

    model: the network's config. data: where preference records come from. tokenizer: a path, "bytes", or a
    training to be run on the experiment's own texts. lengths: token budgets, as `Lengths` or as
    `{'inputs': .., 'targets': ..}`. judge: import path `module:function` of a program that scores a response,
    if the data has one. adapters: what is trained instead of whole models.
    portions: continuous batching of the stages' samplers (`decode.batches.Sampler`): where a sampler has more prompts
    than rows, rows that have ended are replaced, in so many portions of a batch; 0 for whole batches. The samples are
    the same.
    draft_tokens: what the improver will say next is guessed from the reference in its prompt, so many tokens at a time,
    and checked in one pass (`decode.sampling.Sampling`, which says when it pays); 0 for none. The samples are the same.
    compile_threads: that compile programs of a stage that trains ahead of its first step; 0 for none: then each is
    compiled when it is called. None: one a core, where there are enough of them (`train.compiling.threads`).
    """

    model: ModelConfig
    data: DataSpec
    tokenizer: str | SentencePieceTraining
    lengths: Lengths | Mapping[str, int]
    templates: Templates = Templates()
    mesh: MeshConfig = MeshConfig()
    judge: str | None = None
    adapters: Adapters | None = None
    portions: int = 0
    draft_tokens: int = 0
    compile_threads: int | None = None
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        """Accept lengths as the mapping T5X users write.

        Raises:
          ConfigError: the mapping has other keys, adapters are set where they do not belong, or a number is negative.
        """
        if self.draft_tokens < 0:
            raise invalid("Experiment.draft_tokens", self.draft_tokens, "be at least 0", "Use 0 to guess no tokens.")
        if self.portions < 0:
            raise invalid("Experiment.portions", self.portions, "be at least 0", "Use 0 for whole batches.")
        if self.compile_threads is not None and self.compile_threads < 0:
            raise invalid("Experiment.compile_threads", self.compile_threads, "be at least 0", "Leave it out.")
        if self.model.lora is not None:
            fix = "Set Experiment.adapters, which also says what they stand on."
            raise invalid("Experiment.model.lora", self.model.lora, "not be set", fix)
        if isinstance(self.lengths, Mapping):
            if set(self.lengths) != {"inputs", "targets"}:
                raise invalid(
                    "TASK_FEATURE_LENGTHS", dict(self.lengths), "have the keys 'inputs' and 'targets'", "Set both."
                )
            object.__setattr__(self, "lengths", Lengths(**self.lengths))

    @property
    def base(self) -> str | None:
        """Reference of what all adapters stand on, None without adapters."""
        return None if self.adapters is None else self.adapters.base

    def is_whole(self, stage: Any) -> bool:
        """Return whether a stage trains all parameters: without adapters, as their base, or as pre-training."""
        return self.base is None or stage.verb == "lm" or stage.name == split_reference(self.base)[0]

    def inputs(self, stage: Any) -> list[str]:
        """Return references of all that a stage reads, the base of its adapters included."""
        base = [] if self.base is None or self.is_whole(stage) else [self.base]
        return list(dict.fromkeys([*stage.inputs(), *base]))


class HeldOut(NamedTuple):
    """A held-out prompt as ids and as text, the group by which splits were made and intervals are clustered, replies.

    chosen, rejected: y_w and y_l of the first record with this prompt.
    """

    ids: tuple[int, ...]
    text: str
    group: str
    chosen: str
    rejected: str


class Run:
    """One run directory, opened for writing: `Run.claim` checks that it belongs to this seed and experiment."""

    def __init__(self, model_dir: str, seed: int, experiment: Experiment) -> None:
        self.directory = epath.Path(model_dir)
        self.seed = seed
        self.experiment = experiment
        self.whole = language_model(experiment.model)
        """The model without adapters."""
        adapters = experiment.adapters
        changes = {} if adapters is None else {"lora": adapters.lora, "quantised": adapters.quantise}
        self.lm = language_model(dataclasses.replace(experiment.model, **changes))
        """The model that answers and scores: with adapters, where the run has them."""
        self.began: float | None = None  # the newest stage, by `time.monotonic`
        self.compiling = Compiling()
        """What the stage compiles."""
        self._bases: dict[str, Params] = {}

    @classmethod
    def claim(cls, model_dir: str, seed: int, experiment: Experiment) -> Run:
        """Open `model_dir` for this seed and experiment, making it where it does not exist.

        A run in which nothing has been made yet, because its settings were refused, say, begins anew.

        Raises:
          CheckpointError: the directory holds a run of another seed or experiment; the first differing
            setting is named. Nothing is changed then.
          ConfigError: the tokenizer does not fit the model, or the lengths leave no room.
          ProcessError: `model_dir` is not shared by all hosts.
        """
        run = cls(model_dir, seed, experiment)
        together.check_shared(run.directory)
        together.write("claim of MODEL_DIR", run._claim, run.directory / RUN)
        if run.tokenizer.vocab_size > experiment.model.vocab_size:
            raise invalid(
                "vocab_size", experiment.model.vocab_size,
                f"be at least the tokenizer's vocabulary of {run.tokenizer.vocab_size} pieces",
                "Raise the model's vocab_size or use a smaller tokenizer.",
            )  # fmt: skip
        _ = run.codec, run.mesh  # checked before anything is made
        return run

    def _claim(self) -> None:
        path, wanted = self.directory / RUN, {"seed": self.seed, "experiment": serialize.to_json(self.experiment)}
        if path.exists() and changes(files.read_json(path), serialize.to_json(wanted)) and self.is_empty():
            path.unlink()
            if (self.directory / TOKENIZER).exists():
                (self.directory / TOKENIZER).rmtree()
        claim(path, wanted, what="run")

    def is_empty(self) -> bool:
        """Return whether no stage has made anything."""
        return all(nothing_made(path.parent) for path in self.directory.glob(f"*/{MANIFEST}"))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, trained or copied into the run directory on first use."""
        directory = self.directory / TOKENIZER
        chosen = self.experiment.tokenizer
        together.write("tokenizer", lambda: make_tokenizer(chosen, self._texts(), directory), directory)
        return load_tokenizer(str(directory))

    def _texts(self) -> Iterator[str]:
        for record in open_records(self.experiment.data, split="train"):
            yield from (record.prompt, record.chosen, record.rejected)

    @functools.cached_property
    def codec(self) -> Codec:
        """How records become token rows in this run."""
        assert isinstance(self.experiment.lengths, Lengths)
        return Codec(tokenizer=self.tokenizer, templates=self.experiment.templates, lengths=self.experiment.lengths)

    def seed_for(self, stream: str) -> int:
        """Return a seed of its own for a stage or another stream of random numbers."""
        return (self.seed * 1_000_003 + stream_id(stream)) % (1 << 31)

    def source(self, view: str, split: Split, *, stream: str) -> Source:
        """Return a seeded endless source of one view's examples; `stream` tells stages apart.

        Raises:
          ProcessError: another host has other examples.
        """
        seed = self.seed_for(stream)
        source = open_source(self.experiment.data, view=view, split=split, codec=self.codec, seed=seed)
        return together.same_everywhere(source, stream)

    def examples(self, view: str, split: Split, *, limit: int) -> list[Example]:
        """Return the first `limit` examples of a view, in the data's own order.

        Raises:
          DataError: there are none.
        """
        report = DropReport()
        examples = iterate_examples(self.experiment.data, view=view, split=split, codec=self.codec, report=report)
        found = list(itertools.islice(examples, limit))
        if not found:
            raise DataError(
                f"The {split} split has no example for view {view!r} ({report.summary()}). Give more data, raise "
                "TASK_FEATURE_LENGTHS if replies are too long, or raise Folds.validation_fraction."
            )
        return found

    def held_out(self, limit: int) -> list[HeldOut]:
        """Return the first `limit` distinct prompts of the validation split, with their groups.

        Raises:
          DataError: there are none.
        """
        found: dict[tuple[int, ...], HeldOut] = {}
        for record in open_records(self.experiment.data, split="validation"):
            ids = self.codec.prompt_ids(record.prompt)
            if ids:
                found.setdefault(ids, HeldOut(ids, record.prompt, record.group, record.chosen, record.rejected))
            if len(found) == limit:
                break
        if not found:
            raise DataError("The validation split has no prompt. Give more data, or raise the validation fraction.")
        return list(found.values())

    def stage_directory(self, name: str) -> epath.Path:
        """Return where a stage keeps everything it makes."""
        return self.directory / name

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The run's device mesh, over the devices of all hosts."""
        return make_mesh(self.experiment.mesh)

    @property
    def rules(self) -> Rules:
        """By which arrays are cut over the mesh."""
        return self.experiment.mesh.rules

    def begin(self, stage: Any, network: Network, *, snapshots: Mapping[str, int]) -> epath.Path:
        """Claim a stage's directory and make it usable on its own; return it.

        Args:
          stage: the stage's config (a dataclass that is a `pipeline.Stage`).
          network: whose parameters the stage trains.
          snapshots: names of parameters kept for good -> the step after which they are kept.

        Raises:
          CheckpointError: the directory belongs to another configuration, or to other inputs.
        """
        directory, _ = self.stage_directory(stage.name), self.codec  # all processes make the codec together
        claimed = functools.partial(self._begin, stage, network, snapshots)
        together.write(f"begin of {stage.name}", claimed, directory / MANIFEST, directory / TOKENIZER)
        self.compiling.start()
        return directory

    def _begin(self, stage: Any, network: Network, snapshots: Mapping[str, int]) -> None:
        directory = self.stage_directory(stage.name)
        if (directory / MANIFEST).exists() and nothing_made(directory):
            directory.rmtree()
        self.check_same(stage)
        manifest = {
            "seed": self.seed,
            "verb": stage.verb,
            "role": stage.role,
            "stage": serialize.to_json(stage),
            "network": serialize.to_json(network),
            "templates": serialize.to_json(self.codec.templates),
            "lengths": serialize.to_json(self.codec.lengths),
            "tokenizer": self.tokenizer.fingerprint(),
            "base": self._base_of(stage),
            "inputs": {
                reference: files.json_hash(self.artifact(reference).manifest)
                for reference in self.experiment.inputs(stage)
            },
            "snapshots": dict(snapshots),
        }
        claim(directory / MANIFEST, manifest, what=f"stage {stage.name!r}")
        if not (directory / TOKENIZER).exists():
            save_tokenizer(self.tokenizer, directory / TOKENIZER)
        files.write_text(directory / "model-info.txt", "".join(f"{line}\n" for line in self._model_info(network)))

    def _base_of(self, stage: Any) -> str | None:
        """Return what a stage's adapters stand on: a stage of this run by its name, so that a run can be moved."""
        base = self.experiment.base
        if base is None or self.experiment.is_whole(stage):
            return None
        return base_key(base, self.directory) if "/" in split_reference(base)[0] else base

    def _model_info(self, network: Network) -> Iterator[str]:
        """Yield name, shape, logical axes and partition of every parameter, and their number."""
        shapes, axes = self.shapes(network), dict(named_leaves(network.axes(), is_leaf=lambda x: isinstance(x, tuple)))
        for name, leaf in named_leaves(shapes):
            yield f"{name:60} {leaf.dtype} {leaf.shape!s:24} {axes[name]} {leaf.sharding.spec}"
        yield f"Total number of parameters: {parameter_count(shapes)}"

    def check_same(self, stage: Any) -> None:
        """Check that what a stage's directory holds, if anything, is of this configuration and of these inputs.

        Raises:
          CheckpointError: it was made with another configuration, or from a stage that was made anew since then
            with another one.
        """
        directory = self.stage_directory(stage.name)
        if not (directory / MANIFEST).exists():
            return
        manifest = files.read_json(directory / MANIFEST)
        found = changes(manifest["stage"], serialize.to_json(stage))
        if found:
            raise CheckpointError(different(directory, f"stage {stage.name!r}", found))
        for reference, before in manifest["inputs"].items():
            now = self._manifest(reference)
            if now is not None and files.json_hash(now) != before:
                raise CheckpointError(
                    f"{directory} was made from another {reference!r} than {self._place(reference)} holds now. "
                    f"Delete {directory} to make it anew, or bring that back."
                )

    def _manifest(self, reference: str) -> dict[str, Any] | None:
        """Return the manifest of what a reference names, None where there is nothing of the kind any more."""
        place = self._place(reference)
        if (place / MANIFEST).exists():
            return files.read_json(place / MANIFEST)
        return manifest_of(place) if place.exists() and pretrained.is_checkpoint(str(place)) else None

    def lm_of(self, stage: Any) -> ConditionalLM:
        """Return the language model that a stage trains, with or without adapters."""
        return self.whole if self.experiment.is_whole(stage) else self.lm

    def artifact(self, reference: str) -> Artifact | External:
        """Return the checkpoint a reference names: a stage of this run, or a path to one of another run or project.

        Raises:
          CheckpointError: it does not exist, was not finished, or has another network than this run.
        """
        place, _ = split_reference(reference)
        directory = self._place(reference)
        if "/" not in place and self.result(place) is None:
            raise CheckpointError(
                f"The stage {place!r} is not finished ({directory}). Run it first (`pit-jax pipeline` does)."
            )
        artifact = open_checkpoint(place if "/" in place else str(directory), self.experiment.model)
        ours = self.whole if artifact.lm.config.lora is None else self.lm
        found = other_model(serialize.to_json(artifact.lm), serialize.to_json(ours))
        if found:
            raise CheckpointError(
                f"{artifact.directory} holds another model than this run's: {found[0]}. "
                "Set the experiment's model to that of the checkpoint."
            )
        return artifact

    def _place(self, reference: str) -> epath.Path:
        place, _ = split_reference(reference)
        return epath.Path(place) if "/" in place else self.stage_directory(place)

    def language_model(self, reference: str, role: str | None = None, lm: ConditionalLM | None = None) -> Params:
        """Return the parameters of a language model, of a role (policy, improver) if one is asked for.

        Args:
          reference: which.
          role: what it must have been trained for.
          lm: whose parameters are wanted: `whole`, or `lm` (default), for which whole models get fresh adapters.
        Raises:
          CheckpointError: the stage has trained a reward model, or the other role.
        """
        artifact = self.artifact(reference)
        if isinstance(artifact.network, ScalarModel):
            raise CheckpointError(
                f"{reference!r} must be a language model, but it is a reward model. Name a stage lm, sft or rl."
            )
        found = artifact.manifest["role"]
        if role is not None and found not in ("", role):
            raise CheckpointError(
                f"{reference!r} must be a model of role {role!r}, but is of role {found!r}. Name another stage."
            )
        return self.trunk(reference, lm)

    def reward_model(self, reference: str, role: str) -> ScalarModel:
        """Return the network of a reward model of a role (bt, gap).

        Raises:
          CheckpointError: the stage has trained a language model, or the other role.
        """
        artifact = self.artifact(reference)
        if not isinstance(artifact.network, ScalarModel):
            raise CheckpointError(
                f"{reference!r} must be a reward model, but it is a language model. Name a stage reward --role={role}."
            )
        if artifact.manifest["role"] not in ("", role):
            raise CheckpointError(
                f"{reference!r} must be a reward model of role {role!r}, but is of role {artifact.manifest['role']!r}. "
                "Name another stage."
            )
        return artifact.network if artifact.lm == self.lm else dataclasses.replace(artifact.network, lm=self.lm)

    def params(self, reference: str, lm: ConditionalLM | None = None) -> Params:
        """Return the parameters of a checkpoint, with its head if it has one, for `lm` (default: the run's).

        The base is read once and shared by all that stands on it. A whole model gets fresh adapters where `lm` has
        some.

        Raises:
          CheckpointError: a whole model is wanted, but the checkpoint holds adapters.
        """
        artifact, adapted = self.artifact(reference), (lm or self.lm).config.lora is not None
        if artifact.lm.config.lora is not None and not adapted:
            raise CheckpointError(
                f"{reference!r} holds adapters, which cannot be the start of a stage that trains a whole model. "
                "Merge it first (`pit-jax convert`), or name a whole model."
            )
        if not adapted or artifact.lm.config.lora is not None:
            return artifact.params(split_reference(reference)[1], self.mesh, self._bases)
        params = self._read_frozen(reference, artifact)
        if has_head(artifact.network):
            return params | {"trunk": lora.join(params["trunk"], self._fresh_adapters)}
        return lora.join(params, self._fresh_adapters)

    def trunk(self, reference: str, lm: ConditionalLM | None = None) -> Params:
        """Return the language-model parameters of a checkpoint of any kind; otherwise as `params`."""
        params = self.params(reference, lm)
        return params["trunk"] if has_head(self.artifact(reference).network) else params

    def _read_frozen(self, reference: str, artifact: Artifact | External) -> Params:
        """Return a whole model as it lies under adapters; that of the base is kept, for everything stands on it."""
        _, snapshot = split_reference(reference)
        key = base_key(reference, self.directory)
        if key in self._bases:
            return self._bases[key]
        params = frozen(artifact.params(snapshot, self.mesh), self.lm)
        if reference == self.experiment.base and not has_head(artifact.network):
            self._bases[key] = params
        return params

    @functools.cached_property
    def _fresh_adapters(self) -> Params:
        """Adapters that change nothing yet, on the run's mesh."""
        places = jax.tree.map(lambda leaf: leaf.sharding, lora.split(self.shapes(self.lm))[1])
        return init_sharded(lambda key: lora.split(self.lm.init(key))[1], key_for(self.seed, "adapters"), places)

    def result(self, stage: str) -> dict[str, Any] | None:
        """Return what a finished stage reported, None while it is not finished."""
        path = self.stage_directory(stage) / RESULT
        return files.read_json(path) if path.exists() else None

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Write a stage's result, which also marks it as finished."""
        path = self.stage_directory(stage) / RESULT

        def write() -> None:
            note_finished(self.directory, stage)
            files.write_json(path, dict(result))

        together.write(f"end of {stage}", write, path)

    def shapes(self, network: Network) -> Params:
        """Return abstract parameters with their places on the run's mesh."""
        return abstract_params(network, self.mesh)
