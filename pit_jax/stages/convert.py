"""`pit-jax convert`: checkpoints of runs, Hugging Face, T5X and PEFT into each other."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath

from pit_jax.core.errors import CheckpointError, ConfigError, invalid
from pit_jax.core.hub import locate
from pit_jax.core.tree import parameter_count
from pit_jax.core.types import Params
from pit_jax.io import files, serialize
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.io.safetensors_writer import new_directory
from pit_jax.models import lora
from pit_jax.models.convert import hf_load, hf_save, peft, pretrained, t5x_save
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.trained import Network, has_head, language_model_of, reconfigured
from pit_jax.stages.artifact import MANIFEST, RESULT, Artifact, base_key, find_stage, split_reference
from pit_jax.text.tokenizer import Tokenizer, find_tokenizer, tokenizer_files

FORMATS = ("hf", "t5x", "peft", "pit")
_ONLY_FOR = {
    "dtype": ("hf", "t5x", "pit"),
    "max_shard_size": ("hf",),
    "layout": ("t5x",),
    "scanned": ("t5x",),
    "step": ("t5x",),
}
"""Settings that say something about some formats only."""
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `pit-jax convert` is asked for.

    source: a stage of a run (`RUN/STAGE`, `RUN/STAGE:SNAPSHOT`), a Hugging Face or T5X checkpoint, a hub name, or a
      PEFT adapter with its `base`, which is any of these. A value head is left out.
    format: hf (merges adapters), t5x, peft (adapters alone), or pit (ours: what a pod reads fastest).
    dtype: of the tensors; None keeps it.
    config: JSON description of a T5X network. layout, scanned, step: of a T5X checkpoint that is written.
    """

    source: str
    output: str
    format: Literal["hf", "t5x", "peft", "pit"] = "hf"
    base: str | None = None
    dtype: str | None = None
    config: str | None = None
    max_shard_size: int = hf_save.MAX_SHARD_SIZE
    layout: Literal["orbax", "legacy"] = "orbax"
    scanned: bool = False
    step: int = 0

    def __post_init__(self) -> None:
        """Check the format, and that it has a use for the other settings."""
        if self.format not in FORMATS:
            raise invalid("convert.format", self.format, f"be one of {', '.join(FORMATS)}", "Use one of them.")
        if self.max_shard_size < 1:
            raise invalid("convert.max_shard_size", self.max_shard_size, "be at least 1", "It is in bytes.")
        for field in dataclasses.fields(self):
            value, formats = vars(self)[field.name], _ONLY_FOR.get(field.name, FORMATS)
            if self.format not in formats and value != field.default:
                rule = f"be left out for the format {self.format}"
                raise invalid(f"convert.{field.name}", value, rule, f"It is for {', '.join(formats)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """What a source holds.

    load: reads the parameters. config: `config.json` of the Hugging Face checkpoint it is, or comes from.
    """

    network: Network
    load: Callable[[], Params]
    tokenizer: Tokenizer | None
    config: dict[str, Any] | None
    base_name: str | None = None

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, read when first asked for: what a format refuses is refused before."""
        return self.load()


def convert(request: Conversion) -> None:
    """Read a checkpoint and write it in another format; the output appears when it is complete.

    Raises:
      CheckpointError, ConfigError, DataError: the source cannot be read, the format has no such network, or there is
        something at the output already.
    """
    output = epath.Path(request.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Give a directory that does not exist yet.")
    model = _read(request.source, request)
    _WRITERS[request.format](output, model, request)
    _LOG.info("%s: %s parameters", output, f"{parameter_count(model.params):,}")


def _read(source: str, request: Conversion) -> _Model:
    stage = find_stage(source, in_floats=True)
    if stage is not None:
        return _read_stage(*stage)
    directory = locate(source)
    if (directory / peft.CONFIG).exists():
        return _read_adapter(directory, request)
    network = pretrained.read_network(directory, config=request.config)
    return _Model(
        network=network,
        load=lambda: pretrained.load(directory, network, None),
        tokenizer=find_tokenizer(directory),
        config=_config_of(directory),
    )


def _read_stage(artifact: Artifact, snapshot: str | None) -> _Model:
    if not artifact.finished:
        _LOG.warning("%s has not run to its end: this is its newest checkpoint.", artifact.directory)
    # A value head was of use in training alone.
    alone = isinstance(artifact.network, ValueModel)
    return _Model(
        network=artifact.lm if alone else artifact.network,
        load=lambda: artifact.trunk(snapshot) if alone else artifact.params(snapshot),
        tokenizer=find_tokenizer(artifact.directory / "tokenizer"),
        config=_origin(artifact),
        base_name=artifact.base,
    )


def _origin(artifact: Artifact) -> dict[str, Any] | None:
    """Return `config.json` of the local checkpoint that a stage comes from, by way of other stages or not.

    It has fields that mean nothing here and much elsewhere, such as the longest context.
    """
    stage = artifact.manifest["stage"]
    reference = artifact.base or stage.get("init_from") or stage.get("source")
    if reference is None:
        return None
    place = epath.Path(split_reference(base_key(reference, artifact.directory.parent))[0])
    return _origin(Artifact(place)) if (place / MANIFEST).exists() else _config_of(place)


def _config_of(directory: epath.Path) -> dict[str, Any] | None:
    path = directory / hf_load.CONFIG
    return files.read_json(path) if path.exists() else None


def _read_adapter(directory: epath.Path, request: Conversion) -> _Model:
    named = files.read_json(directory / peft.CONFIG).get("base_model_name_or_path")
    if request.base is None:
        raise ConfigError(
            f"{directory} is an adapter. Give the model it stands on with --base; its file names {named!r}."
        )
    base = _read(request.base, dataclasses.replace(request, base=None))
    if has_head(base.network) or language_model_of(base.network).config.lora is not None:
        raise CheckpointError(
            f"{request.base} is a reward model or has adapters of its own. Give the plain language model that the "
            "adapter was trained on."
        )
    adapter = peft.load_peft(directory, language_model_of(base.network).config)
    if named and named != request.base:
        _LOG.warning("%s was trained on %r by its file: %s must hold the same weights.", directory, named, request.base)
    network = reconfigured(base.network, lora=adapter.lora)
    if adapter.head is not None:
        network = ScalarModel(language_model_of(network), readout="last", attention="causal")

    def load() -> Params:
        params = lora.join(base.params, jax.tree.map(jnp.asarray, adapter.params))
        if adapter.head is None:
            return params
        head = {"kernel": jnp.asarray(adapter.head, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
        return {"trunk": params, "head": head}

    return _Model(
        network=network,
        load=load,
        tokenizer=find_tokenizer(directory) or base.tokenizer,
        config=base.config,
        base_name=request.base,
    )


def _write_hf(output: epath.Path, model: _Model, request: Conversion) -> None:
    hf_save.save_hf(
        output,
        model.network,
        model.params,
        tokenizer=None if model.tokenizer is None else tokenizer_files(model.tokenizer),
        dtype=request.dtype,
        max_shard_size=request.max_shard_size,
        source_config=model.config,
        special=_special(model.tokenizer),
    )


def _write_t5x(output: epath.Path, model: _Model, request: Conversion) -> None:
    network = model.network
    if has_head(network):
        raise ConfigError("T5X has no models with a scalar head. Keep the reward model as a pit_jax checkpoint.")
    if not isinstance(network, EncoderDecoder | DecoderOnly):
        raise ConfigError(f"T5X has no {type(network).__name__}. Convert to hf, or keep it as a pit_jax checkpoint.")
    if network.config.lora is not None:
        raise ConfigError("T5X has no adapters. Convert to hf first, which merges them, and that to t5x.")
    network, params = _cast(model, request.dtype)
    assert isinstance(network, EncoderDecoder | DecoderOnly)
    with new_directory(output) as place:
        t5x_save.save_t5x(place, network, params, step=request.step, layout=request.layout, scanned=request.scanned)


def _write_peft(output: epath.Path, model: _Model, request: Conversion) -> None:
    network, config = model.network, language_model_of(model.network).config
    if config.lora is None:
        raise ConfigError(f"{request.source} has no adapters. Use --format=hf for whole models.")
    head = None
    if isinstance(network, ScalarModel):
        hf_save.check_scalar(network, model.params)
        head = model.params["head"]["kernel"]
    trunk = model.params["trunk"] if has_head(network) else model.params
    name = request.base or model.base_name or ""
    peft.save_peft(output, trunk, config, family=peft.kind_of(config), base_name=name, head=head)


def _write_pit(output: epath.Path, model: _Model, request: Conversion) -> None:
    """Write a directory that any `init_from`, `anchor` or `base` can name."""
    if language_model_of(model.network).config.lora is not None:
        raise ConfigError("A pit_jax checkpoint of adapters belongs to a run. Convert to hf, which merges them.")
    network, params = _cast(model, request.dtype)
    manifest = {
        "verb": "convert",
        "role": "",
        "stage": {"source": request.source},
        "network": serialize.to_json(network),
        "base": None,
        "inputs": {},
        "snapshots": {},
    }
    with new_directory(output) as place:
        Checkpoints(place, keep=None, asynchronous=False).save(0, {"params": params}, {})
        if model.tokenizer is not None:
            model.tokenizer.save(place / "tokenizer")
        files.write_json(place / RESULT, {})
        files.write_json(place / MANIFEST, manifest)


_WRITERS = {"hf": _write_hf, "t5x": _write_t5x, "peft": _write_peft, "pit": _write_pit}


def _cast(model: _Model, dtype: str | None) -> tuple[Network, Params]:
    """Return a model with its parameters in another dtype."""
    if dtype is None:
        return model.network, model.params
    network = reconfigured(model.network, param_dtype=dtype)
    return network, jax.tree.map(lambda leaf, want: leaf.astype(want.dtype), model.params, network.abstract())


def _special(tokenizer: Tokenizer | None) -> hf_save.Special | None:
    if tokenizer is None:
        return None
    return hf_save.Special(pad=tokenizer.pad_id, bos=tokenizer.bos_id, eos=tokenizer.eos_ids)
