"""From a checkpoint of T5X to a network and its parameters."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.core.types import Params
from pit_jax.io.t5x import StoredParameters, open_t5x
from pit_jax.models import trained
from pit_jax.models.config import DTYPES, ModelConfig
from pit_jax.models.convert import stream, t5x_layout
from pit_jax.models.convert.layout import Tensor
from pit_jax.models.convert.t5x_config import NETWORKS, Spec, config_from_t5x, spec_from_config
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from pit_jax.models.trained import abstract_params

DESCRIPTION = "t5x_network.json"
"""File that our exports put into a checkpoint: the description of the network."""

Network = EncoderDecoder | DecoderOnly


def load_t5x(
    directory: str | os.PathLike[str],
    config: ModelConfig | Spec | str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Network, Params]:
    """Return the network of a T5X checkpoint and its parameters; the optimiser's state is left where it is.

    Args:
      directory: of a step, or of a model, of which the newest step is taken; of either layout.
      config: see `read_network`.
      dtype: see `read_network`.
      mesh: where the parameters go; None: the default device.

    Raises:
      ConfigError: there is no config, or it has a setting that is not known.
      CheckpointError: it is no T5X checkpoint, is damaged, or holds parameters of another network; all names and
        shapes are compared before a byte of device memory is taken.
    """
    stored = open_t5x(directory)
    network = _network(stored, config, dtype)
    return network, _params(stored, network, mesh)


def read_network(
    directory: str | os.PathLike[str],
    config: ModelConfig | Spec | str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
) -> Network:
    """Return the network of a T5X checkpoint, of which no parameter is read.

    Args:
      directory: as for `load_t5x`.
      config: ours, or T5X's settings as `config_from_t5x` takes them. None: those that our own export has put
        beside the parameters; T5X writes none.
      dtype: of parameters and activations; None: parameters as stored (or as our config says), activations as the
        config says.

    Raises:
      ConfigError, CheckpointError: as `load_t5x`.
    """
    return _network(open_t5x(directory), config, dtype)


def load_params(directory: str | os.PathLike[str], network: trained.Network, mesh: Mesh | None) -> Params:
    """Return the parameters of a network, streamed onto a mesh (None: the default device).

    Raises:
      CheckpointError: as `load_t5x`, or the network is more than a language model.
    """
    if not isinstance(network, DecoderOnly | EncoderDecoder):
        raise CheckpointError(f"{directory} holds a language model, and a {type(network).__name__} is asked for.")
    return _params(open_t5x(directory), network, mesh)


def _network(
    stored: StoredParameters, given: ModelConfig | Spec | str | os.PathLike[str] | None, dtype: str | None
) -> Network:
    config = _config(stored, given)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    network = DecoderOnly(config) if isinstance(config, DecoderOnlyConfig) else EncoderDecoder(config)
    _tensors(stored, network)
    return network


def _params(stored: StoredParameters, network: Network, mesh: Mesh | None) -> Params:
    tensors = _tensors(stored, network)
    return stream.load(tensors, lambda tensor: stored.rows(tensor.name), abstract_params(network, mesh))


def _tensors(stored: StoredParameters, network: Network) -> list[Tensor]:
    """Return the tensors of a network as the checkpoint lays them out, all of which it has."""
    shapes = {name: array.shape for name, array in stored.arrays.items()}
    tensors = t5x_layout.tensors(network.config, t5x_layout.variant_of(network.config, shapes))
    _check_same(stored, {tensor.name: tensor.shape for tensor in tensors}, shapes)
    return tensors


def _config(
    stored: StoredParameters, given: ModelConfig | Spec | str | os.PathLike[str] | None
) -> EncoderDecoderConfig | DecoderOnlyConfig:
    """Return our config of a checkpoint, from whatever describes it."""
    param_dtype = _stored_dtype(stored)
    if given is None:
        given = stored.directory / DESCRIPTION
        if not given.exists():
            raise ConfigError(_no_config(stored))
    if isinstance(given, ModelConfig):
        config = dataclasses.replace(given, lora=None)
        spec_from_config(config, scanned=False)  # T5X must know the network, or these would be another one's parameters
    else:
        config = config_from_t5x(given, param_dtype=param_dtype)
    assert isinstance(config, EncoderDecoderConfig | DecoderOnlyConfig)
    return config


def _stored_dtype(stored: StoredParameters) -> str:
    """Return the dtype in which all parameters can be kept without loss.

    Raises:
      CheckpointError: a parameter is of a type that parameters are not.
    """
    names = {array.dtype.name for array in stored.arrays.values()}
    for name, array in stored.arrays.items():
        if array.dtype.name not in (*DTYPES, "float16"):
            raise CheckpointError(
                f"{stored.directory}: {name} has dtype {array.dtype.name}, which must be one of {', '.join(DTYPES)}. "
                "Save the checkpoint with T5X in one of these."
            )
    return "bfloat16" if names == {"bfloat16"} else "float32"


def _check_same(
    stored: StoredParameters, want: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise for the first differences between the parameters of a network and those of a checkpoint."""
    missing = [f"{name} {shape}" for name, shape in want.items() if name not in have]
    unused = [f"{name} {shape}" for name, shape in have.items() if name not in want]
    other = [
        f"{name} is {have[name]}, expected {shape}"
        for name, shape in want.items()
        if name in have and have[name] != shape
    ]
    found = {"missing": missing, "not of this network": unused, "of another shape": other}
    parts = [f"{len(names)} {what}: {_some(names)}" for what, names in found.items() if names]
    if parts:
        raise CheckpointError(
            f"{stored.directory} holds the parameters of another network. {'; '.join(parts)}. Correct the config."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _no_config(stored: StoredParameters) -> str:
    """Return what to do without a description of the network: most of one, read off the shapes."""
    return (
        f"{stored.directory}: T5X keeps no configuration in its checkpoints, and shapes do not tell all of it. Give "
        "`config`, a JSON file such as this one, which is what the shapes tell; "
        f"the activation, the model and the dtype are the usual ones and yours to check: "
        f"{json.dumps(_description(stored))}"
    )


def _description(stored: StoredParameters) -> dict[str, Any]:
    """Return the description of a network that the names and shapes suggest."""
    shapes = {name: array.shape for name, array in stored.arrays.items()}
    encoder = any(name.startswith("encoder/") for name in shapes)
    vocab, width = (*_ending(shapes, "token_embedder/embedding"), 0, 0)[:2]
    scale = shapes.get("decoder/decoder/pre_mlp_layer_norm/scale", ())
    axis = None if len(scale) != 2 else 0 if scale[0] != width else 1
    per_layer = axis is not None or "decoder/layers_0/relpos_bias/rel_embedding" in shapes
    kind = ("scalable_t5" if per_layer else "t5") if encoder else "decoder_only"

    def one(ending: str) -> tuple[int, ...]:
        """Return the shape in one layer."""
        whole = _ending(shapes, ending)
        return whole if axis is None else whole[:axis] + whole[axis + 1 :]

    def layers(stack: str) -> int:
        stacked = shapes.get(f"{stack}/{stack}/pre_mlp_layer_norm/scale")
        if axis is not None and stacked is not None:
            return stacked[axis]
        return len({name.split("/")[1] for name in shapes if name.startswith(f"{stack}/layers_")})

    heads, query = one("rel_embedding")[:1], one("query/kernel")
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "emb_dim": width,
        "num_heads": math.prod(heads),
        "head_dim": math.prod(query[1:]) // max(math.prod(heads), 1),
        "mlp_dim": math.prod(one("mlp/wo/kernel")[:1]),
        "mlp_activations": ["gelu", "linear"] if _ending(shapes, "mlp/wi_0/kernel") else ["relu"],
        "dtype": _stored_dtype(stored),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in shapes,
    }
    if encoder:
        settings |= {"num_encoder_layers": layers("encoder"), "num_decoder_layers": layers("decoder")}
    else:
        settings["num_layers"] = layers("decoder")
    model = "EncoderDecoderModel" if encoder else "DecoderOnlyModel"
    return {"network": NETWORKS[kind], "model": model, "config": settings}


def _ending(shapes: Mapping[str, tuple[int, ...]], ending: str) -> tuple[int, ...]:
    """Return the shape of the first parameter whose name ends so; () where there is none."""
    return next((shape for name, shape in shapes.items() if name.endswith(ending)), ())
