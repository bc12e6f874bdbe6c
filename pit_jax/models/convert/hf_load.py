"""A Hugging Face directory as a network and its parameters, checked before any device memory is taken."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, DataError
from pit_jax.core.hub import locate
from pit_jax.core.types import Params
from pit_jax.io import files, safetensors
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert import hf_layout, stream
from pit_jax.models.convert.hf_config import HEAD, SCORE, config_from_hf, family_of
from pit_jax.models.convert.hf_t5gemma import PICTURES as T5GEMMA_PICTURES
from pit_jax.models.convert.layout import Tensor
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.models.presets.catalog import language_model
from pit_jax.models.trained import Network, abstract_params, has_head, language_model_of

CONFIG = "config.json"

WEIGHT_FILES = (".safetensors", ".safetensors.index.json", *safetensors.PICKLED)
"""How names of files end that hold weights, or would if they could be read."""

_STEMS = ("model.", "", "language_model.model.", "model.language_model.")
_SAME_EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_SILENT = re.compile(
    r"(.*\.rotary_emb\.inv_freq|(en|de)coder\.embed_tokens\.weight|shared\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight)"
)
"""Tensors that hold nothing of their own: constants, second copies, and a table T5 never reads."""
_PICTURES = re.compile(rf"(model\.)?(vision_tower|multi_modal_projector)\..*|{T5GEMMA_PICTURES.pattern}")

_log = logging.getLogger(__name__)


def load_hf(
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    config: ModelConfig | None = None,
) -> tuple[Network, Params]:
    """Return network and parameters of a Hugging Face model (a `ScalarModel` where it scores sequences).

    Args:
      directory: its own, or a name on the hub.
      dtype: of parameters and activations, "float32" or "bfloat16"; None: the file's own (float32 for float16).
      mesh: what the parameters are laid out over; None: the default device.
      config: takes the place of the one in `config.json`, to run the same shapes otherwise.
    Raises:
      ConfigError: `config.json` describes something that is not implemented.
      CheckpointError: the weights are not whole, not those the config describes, or not readable.
      DataError: a JSON file is broken.
    """
    place = locate(directory)
    network = read_network(place, dtype=dtype, config=config)
    return network, load_params(place, network, mesh)


def read_network(directory: epath.PathLike, *, dtype: str | None = None, config: ModelConfig | None = None) -> Network:
    """Return the network of a directory; weights are opened, not read.

    Args:
      directory: a local one.
      dtype: see `load_hf`.
      config: see `load_hf`.
    Raises:
      ConfigError, CheckpointError, DataError: as `load_hf`.
    """
    stored = safetensors.open_directory(directory)
    content, where = _read_config(directory)
    if config is None:
        config = config_from_hf(content, stored.keys(), where=where, dtype=dtype)
        config = _untied_after_all(config, stored, where)
    lm = language_model(config)
    if SCORE not in stored:
        return lm
    labels = stored[SCORE].shape[0]
    if labels != 1:
        raise CheckpointError(f"{where}: its head has {labels} labels, and a reward has one. Use another checkpoint.")
    return ScalarModel(lm, readout="last", attention="causal")


def load_params(directory: epath.PathLike, network: Network, mesh: Mesh | None) -> Params:
    """Return the parameters of a network that `read_network` returned, streamed onto the mesh.

    Raises:
      CheckpointError: tensors are missing, or of another shape or dtype; nothing is allocated then.
    """
    stored = safetensors.open_directory(directory)
    content, where = _read_config(directory)
    tensors = layout_of(network, family_of(content, where=where), stored)
    check(tensors, stored, where=str(directory))
    abstract = abstract_params(network, mesh)
    bias = abstract["head"].pop("bias") if has_head(network) else None
    params = stream.load(tensors, lambda tensor: stored[tensor.name], abstract)
    if bias is not None:
        # Their heads have no bias.
        params["head"]["bias"] = jnp.zeros(bias.shape, bias.dtype, device=bias.sharding)
    return params


def layout_of(network: Network, family: str, stored: safetensors.Tensors) -> list[Tensor]:
    """Return the tensors of a network under the names that a checkpoint uses."""
    config = language_model_of(network).config
    make = hf_layout.classifier_tensors if has_head(network) else hf_layout.tensors
    if isinstance(config, DecoderOnlyConfig):
        return make(config, family, _stem(stored))
    return [_stored_embedding(tensor, stored) for tensor in make(config, family)]


def _untied_after_all(config: ModelConfig, stored: safetensors.Tensors, where: str) -> ModelConfig:
    """Return the config, untied if the file's output matrix is not the embedding (as transformers does)."""
    stem, head = _stem(stored), next((name for name in stored if name.endswith(HEAD)), None)
    embedding = stored.get(f"{stem}embed_tokens.weight")
    if not isinstance(config, DecoderOnlyConfig) or not config.tied or head is None or embedding is None:
        return config
    step = max(stream.PIECE // (4 * max(config.width, 1)), 1)
    rows = range(0, embedding.shape[0], step)
    if SCORE in stored or all(np.array_equal(stored[head][n : n + step], embedding[n : n + step]) for n in rows):
        return config
    _log.warning("%s calls the model tied, but its output matrix is not the embedding: it is read as untied.", where)
    return dataclasses.replace(config, tied=False)


def _stem(stored: safetensors.Tensors) -> str:
    """Return what the names of a decoder-only model's tensors start with."""
    return next((stem for stem in _STEMS if f"{stem}embed_tokens.weight" in stored), hf_layout.STEM)


def _stored_embedding(tensor: Tensor, stored: safetensors.Tensors) -> Tensor:
    """Return T5's embedding under whichever of its three names was written; another tensor as it is."""
    if tensor.name not in _SAME_EMBEDDING:
        return tensor
    return dataclasses.replace(tensor, name=next((name for name in _SAME_EMBEDDING if name in stored), tensor.name))


def _read_config(directory: epath.PathLike) -> tuple[dict[str, Any], str]:
    """Return the content of `config.json` and the file's name."""
    path = epath.Path(directory) / CONFIG
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a table of settings. Copy the file anew.")
    return content, str(path)


def check(tensors: Sequence[Tensor], stored: safetensors.Tensors, *, where: str) -> None:
    """Compare names, shapes and dtypes of a checkpoint with what a network needs; report what is left over.

    Raises:
      CheckpointError: a tensor is missing, or has another shape, or a dtype that cannot be read.
    """
    missing = [tensor.name for tensor in tensors if tensor.name not in stored]
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(tensors)} tensors: {safetensors.listed(missing)}. "
            f"{CONFIG} describes another model, or the checkpoint is not whole."
        )
    for tensor in tensors:
        found = stored[tensor.name]
        _ = found.dtype  # Raises where it cannot be read: packed numbers have another shape, too.
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{where}: tensor {tensor.name} has shape {list(found.shape)}, and {CONFIG} implies "
                f"{list(tensor.shape)}. They belong to different models, or a field of {CONFIG} is wrong."
            )
    used = {tensor.name for tensor in tensors}
    unused = [name for name in stored if name not in used and not _SILENT.fullmatch(name)]
    pictures = [name for name in unused if _PICTURES.fullmatch(name)]
    rest = [name for name in unused if not _PICTURES.fullmatch(name) and not name.endswith(HEAD)]
    if pictures:
        _log.info("%s: left out %d tensors that see pictures.", where, len(pictures))
    if rest:
        _log.warning("%s: %d tensors are not used: %s.", where, len(rest), safetensors.listed(rest))
