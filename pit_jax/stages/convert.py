"""`pit-jax convert`: checkpoints of runs, Hugging Face, T5X and PEFT into each other."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath

from pit_jax.core.errors import CheckpointError, ConfigError, invalid
from pit_jax.core.tree import parameter_count
from pit_jax.core.types import Params
from pit_jax.io import files, serialize
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models import lora
from pit_jax.models.convert import hf_export_config, hf_save, peft, pretrained, t5x_save
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import ScalarModel
from pit_jax.models.presets.catalog import language_model
from pit_jax.models.trained import Network, has_head, language_model_of
from pit_jax.stages.artifact import MANIFEST, RESULT, Artifact, split_reference
from pit_jax.text.tokenizer import Tokenizer, find_tokenizer, tokenizer_files

FORMATS = ("hf", "t5x", "peft", "pit")
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `pit-jax convert` is asked for.

    source: a stage of a run (`RUN/STAGE`, `RUN/STAGE:SNAPSHOT`), a Hugging Face or T5X checkpoint, a hub name, or a
      PEFT adapter with its `base`.
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
        """Check the format."""
        if self.format not in FORMATS:
            raise invalid("convert.format", self.format, f"be one of {', '.join(FORMATS)}", "Use one of them.")


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a source holds."""

    network: Network
    params: Params
    tokenizer: Tokenizer | None
    config: dict[str, Any] | None
    """`config.json` of a Hugging Face source."""
    base_name: str | None


def convert(request: Conversion) -> None:
    """Read a checkpoint and write it in another format; the output appears when it is complete.

    Raises:
      CheckpointError, ConfigError, DataError: the source cannot be read, the format has no such network, or there is
        something at the output already.
    """
    output = epath.Path(request.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Give a directory that does not exist yet.")
    model = _read(request)
    _WRITERS[request.format](output, model, request)
    _LOG.info("%s: %s parameters", output, f"{parameter_count(model.params):,}")


def _read(request: Conversion) -> _Model:
    place, snapshot = (request.source, None) if epath.Path(request.source).exists() else split_reference(request.source)
    if (epath.Path(place) / MANIFEST).exists():
        artifact = Artifact(place, in_floats=True)
        params = artifact.params(snapshot)
        return _Model(artifact.network, params, find_tokenizer(artifact.directory / "tokenizer"), None, artifact.base)
    if snapshot is not None:
        raise CheckpointError(f"{place} is no stage of a run, so it has no snapshot {snapshot!r}. Name the directory.")
    directory = pretrained.locate(place)
    if (directory / peft.CONFIG).exists():
        return _read_adapter(directory, request)
    network = pretrained.read_network(directory, config=request.config)
    path = directory / "config.json"
    config = files.read_json(path) if path.exists() else None
    return _Model(network, pretrained.load(directory, network, None), find_tokenizer(directory), config, None)


def _read_adapter(directory: epath.Path, request: Conversion) -> _Model:
    if request.base is None:
        raise ConfigError(f"{directory} is an adapter. Give the model it stands on with --base.")
    place = pretrained.locate(request.base)
    base = pretrained.read_network(place, config=request.config)
    if has_head(base):
        raise CheckpointError(f"{place} scores sequences. Give the language model that the adapter was trained on.")
    adapter = peft.load_peft(directory, language_model_of(base).config)
    lm = language_model(dataclasses.replace(language_model_of(base).config, lora=adapter.lora))
    params = lora.join(pretrained.load(place, base, None), jax.tree.map(jnp.asarray, adapter.params))
    tokenizer = find_tokenizer(directory) or find_tokenizer(place)
    config = files.read_json(place / "config.json")
    if adapter.head is None:
        return _Model(lm, params, tokenizer, config, request.base)
    head = {"kernel": jnp.asarray(adapter.head, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    network = ScalarModel(lm, readout="last", attention="causal")
    return _Model(network, {"trunk": params, "head": head}, tokenizer, config, request.base)


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
    if not isinstance(network, EncoderDecoder | DecoderOnly):
        raise ConfigError("T5X has no models with a scalar head. Keep the reward model as a pit_jax checkpoint.")
    if network.config.lora is not None:
        raise ConfigError("T5X has no adapters. Convert to hf first, which merges them, and that to t5x.")
    t5x_save.save_t5x(output, network, model.params, step=request.step, layout=request.layout, scanned=request.scanned)


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
    family = hf_export_config.family_of(dataclasses.replace(config, lora=None)).name
    peft.save_peft(output, trunk, config, family=family, base_name=name, head=head)


def _write_pit(output: epath.Path, model: _Model, request: Conversion) -> None:
    """Write a directory that any `init_from`, `anchor` or `base` can name."""
    if language_model_of(model.network).config.lora is not None:
        raise ConfigError("A pit_jax checkpoint of adapters belongs to a run. Convert to hf, which merges them.")
    Checkpoints(output, keep=None, asynchronous=False).save(0, {"params": model.params}, {})
    if model.tokenizer is not None:
        model.tokenizer.save(output / "tokenizer")
    manifest = {
        "verb": "convert",
        "role": "",
        "stage": {"source": request.source},
        "network": serialize.to_json(model.network),
        "base": None,
        "inputs": {},
        "snapshots": {},
    }
    files.write_json(output / RESULT, {})
    files.write_json(output / MANIFEST, manifest)


_WRITERS = {"hf": _write_hf, "t5x": _write_t5x, "peft": _write_peft, "pit": _write_pit}


def _special(tokenizer: Tokenizer | None) -> hf_save.Special | None:
    if tokenizer is None:
        return None
    return hf_save.Special(pad=tokenizer.pad_id, bos=tokenizer.bos_id, eos=tokenizer.eos_ids)
