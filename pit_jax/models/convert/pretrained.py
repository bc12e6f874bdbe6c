"""Checkpoints of other projects, whatever their kind: found, recognised, read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, ConfigError, invalid, nearest
from pit_jax.core.hub import is_hub_name, locate
from pit_jax.core.types import Params
from pit_jax.io import files, t5x
from pit_jax.models.config import HOW_IT_RUNS, ModelConfig
from pit_jax.models.convert import hf_load, t5x_load
from pit_jax.models.trained import Network, language_model_of, reconfigured

_GENERATION = "generation_config.json"
_MAKES_IT = (".safetensors", ".json", ".model", ".jinja")


def is_checkpoint(place: str) -> bool:
    """Return whether a path or name could be a checkpoint of another project; what is wrong with it shows later."""
    path = epath.Path(place)
    if not path.exists():
        return is_hub_name(place)
    return _kind(path) is not None


def read_network(
    directory: epath.PathLike,
    *,
    config: epath.PathLike | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    like: ModelConfig | None = None,
) -> Network:
    """Return the network of a checkpoint; its weights are opened, not read.

    Args:
      directory: of a Hugging Face or T5X checkpoint.
      config: JSON file or mapping that describes a T5X network.
      dtype: of parameters and activations; None: as the files have it.
      like: a config whose `HOW_IT_RUNS` takes the place of the files' own; it also describes a T5X network for
        which there is no `config`.
    Raises:
      CheckpointError, ConfigError, DataError: it is no checkpoint, or not one that can be read.
    """
    path = epath.Path(directory)
    if _kind(path) == "t5x":
        network: Network = t5x_load.read_network(path, like if config is None else config, dtype=dtype)
    elif config is not None:
        raise ConfigError(f"config = {config!r} is for T5X checkpoints only; {path} brings its own config.json.")
    else:
        network = hf_load.read_network(path, dtype=dtype)
    if like is None:
        return network
    return reconfigured(network, **{name: vars(like)[name] for name in HOW_IT_RUNS})


def load(directory: epath.PathLike, network: Network, mesh: Mesh | None) -> Params:
    """Return the parameters of a network of `read_network`, streamed onto a mesh (None: the default device).

    Raises:
      CheckpointError: they are not whole, or of another network; nothing is allocated then.
    """
    path = epath.Path(directory)
    return (t5x_load if _kind(path) == "t5x" else hf_load).load_params(path, network, mesh)


def model_config(path: str, **overrides: Any) -> ModelConfig:
    """Return the config of a checkpoint, with any of its fields replaced; for gin.

    Args:
      path: directory or hub name of a Hugging Face checkpoint.
      overrides: such as `dtype`, `param_dtype`, `remat`, `dropout`. Parameters are float32 unless `param_dtype` says
        otherwise: they are going to be trained.
    Raises:
      ConfigError: there is no such field.
    """
    config = language_model_of(read_network(locate(path))).config
    known = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in known:
            rule = f"be a field of {type(config).__name__}: {', '.join(known)}"
            raise invalid("model_config field", name, rule, f"Correct the name.{nearest(name, known)}")
    return dataclasses.replace(config, **{"param_dtype": "float32"} | overrides)


def file_sizes(directory: epath.PathLike) -> dict[str, int]:
    """Return the size in bytes of every file that makes a checkpoint: a cheap sign that it is still the same."""
    path = epath.Path(directory)
    if _kind(path) == "t5x":
        # Of a model with several steps, the one that is read.
        path = t5x.step_directory(path)
        entries = sorted([*path.glob("*"), *path.glob("*/*")])
    else:
        entries = [entry for entry in sorted(path.iterdir()) if entry.name.endswith(_MAKES_IT)]
    return {str(entry.relative_to(path)): entry.stat().length for entry in entries if not entry.is_dir()}


def eos_ids(directory: epath.PathLike) -> tuple[int, ...]:
    """Return the ids that end an answer by a checkpoint's generation or model config; none where they say nothing."""
    for name in (_GENERATION, hf_load.CONFIG):
        path = epath.Path(directory) / name
        value = files.read_json(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return ()


def _kind(path: epath.Path) -> Literal["hf", "t5x"] | None:
    """Return what a directory looks like, None for nothing that is known.

    A `config.json` alone says little: it may describe the network of the T5X checkpoint beside it.
    """
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if any(name.endswith(hf_load.WEIGHT_FILES) for name in names):
        return "hf"
    try:
        t5x.step_directory(path)
    except CheckpointError:
        return "hf" if hf_load.CONFIG in names else None
    return "t5x"
