"""Adapters in the format of PEFT, in and out: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps, for a linear map W of shape [out, in], `lora_A.weight` [r, in] and `lora_B.weight` [out, r], and adds
s B A to W. In the layout of our kernels these are the transposes of `lora_a` and `lora_b`, so the table of a family's
tensors says where each matrix goes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.core.tree import named_leaves
from pit_jax.core.types import Params
from pit_jax.io import files, safetensors, safetensors_writer
from pit_jax.io.safetensors import Stored, listed
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert import hf_layout, stream
from pit_jax.models.convert.hf_config import HEAD
from pit_jax.models.convert.hf_export_config import Json
from pit_jax.models.convert.layout import Tensor
from pit_jax.models.lora import TARGETS, A, B, Lora
from pit_jax.models.seq2seq import Seq2SeqConfig
from pit_jax.models.t5gemma import T5GemmaConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_SCORE = "score.weight"
_ONE_FILE = 2**63
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", None)

# Read by `load_peft`, or without a meaning for a finished adapter.
_READ = frozenset({"r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "task_type"})
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        # How the matrices were drawn at the start.
        "corda_config",
        "eva_config",
        "lora_ga_config",
    }
)
_FIXED = {"peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,)}
# The others change the base's weights too, so that the adapter does not fit the published ones.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """What an adapter's directory holds.

    lora: for `ModelConfig.lora`. params: its matrices on the host, under our names (`lora.join` adds them to a base).
    head: kernel `[D]` of a scalar head that reads the last token (SEQ_CLS), or None.
    """

    lora: Lora
    params: Params
    head: Float[np.ndarray, " D"] | None


def adapter_pairs(config: ModelConfig, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by the name of each of `tensors` that has an adapter in `config.lora`, its A and its B."""
    lora = config.lora
    if lora is None:
        return {}
    return {t.name: _pair(t, lora.rank) for t in tensors if (target := target_of(t)) and config.adapts(target)}


def target_of(tensor: Tensor) -> str | None:
    """Return which of `lora.TARGETS` a tensor is the kernel of, if any."""
    if tensor.name.endswith(HEAD):
        return "head"
    *_, name, leaf = ("", *tensor.path.split("/"))
    return name if leaf == "kernel" and name in TARGETS else None


def save_peft(
    directory: epath.PathLike,
    params: Params,
    config: ModelConfig,
    *,
    family: str,
    base_name: str,
    head: Float[Array, " D"] | None = None,
) -> None:
    """Write an adapter's directory.

    Args:
      directory: must not exist, or be empty.
      params: of the language model, from any mesh; only its adapters are read.
      config: with `lora`.
      family: the base's `model_type`.
      base_name: directory or hub name of the base, for those who load the adapter.
      head: kernel of a scalar head that reads the last token (its bias has no place in the format).
    Raises:
      ConfigError: `config` has no adapters.
      CheckpointError: there is something at `directory`, or too little room.
    """
    if config.lora is None:
        raise ConfigError(f"{type(config).__name__}.lora = None: there is no adapter to save. Set lora.")
    kernels = [tensor for tensor in hf_layout.tensors(config, family) if config.adapts(target_of(tensor) or "")]
    if head is not None:
        # A classifier has no output matrix.
        kernels = [kernel for kernel in kernels if target_of(kernel) != "head"]
    table = [part for pair in adapter_pairs(config, kernels).values() for part in pair]
    tree = params
    if head is not None:
        table.append(_score(config.width))
        tree = params | {"score": head}
    by_name = {tensor.name: tensor for tensor in table}
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in named_leaves(tree)}
    entries = (safetensors_writer.Entry(name=t.name, shape=t.shape, dtype=dtypes[t.path]) for t in table)
    plan = safetensors_writer.plan(entries, max_shard_size=_ONE_FILE, stem="adapter_model")
    modules = sorted({kernel.name.split(".")[-2] for kernel in kernels})
    with safetensors_writer.new_directory(directory) as place:
        arrays = stream.unload(tree, [by_name[entry.name] for entry in plan.entries])
        safetensors_writer.write(place, plan, (array for _, array in arrays))
        if jax.process_index() == 0:
            files.write_json(place / CONFIG, _config_json(config, modules, base_name, scalar=head is not None))


def load_peft(directory: epath.PathLike, config: ModelConfig) -> Adapter:
    """Return an adapter as ours.

    Args:
      directory: as PEFT writes it.
      config: of the base, without adapters.
    Raises:
      DataError: a file is missing or broken.
      CheckpointError: the adapter is of another kind or for another base, or its weights are pickled.
    """
    place = epath.Path(directory)
    settings = files.read_json(place / CONFIG)
    _check_settings(place, settings)
    if not (place / WEIGHTS).exists() and (place / "adapter_model.bin").exists():
        raise CheckpointError(f"{place}: adapter_model.bin is pickled, which can run code. Save it as {WEIGHTS}.")
    family = kind_of(config)
    kernels = [tensor for tensor in hf_layout.tensors(config, family) if target_of(tensor)]
    stored = dict(safetensors.open_file(place / WEIGHTS))
    # PEFT adds the output matrix itself, frozen, where that has an adapter.
    _drop_copies(place, kernels, stored)
    score = _score(config.width)
    matrices = {name: tensor for name, tensor in stored.items() if name != score.name}
    lora = Lora(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=_targets(place, settings, kernels, matrices),
        rslora=settings.get("use_rslora", False),
    )
    pairs = adapter_pairs(dataclasses.replace(config, lora=lora), kernels)
    table = [part for pair in pairs.values() for part in pair]
    has_score = score.name in stored
    for tensor in [*table, score] if has_score else table:
        _check_shape(place, tensor, stored[tensor.name])
    head = stored[score.name].read().reshape(config.width) if has_score else None
    return Adapter(lora, _tree((tensor, stored[tensor.name].read()) for tensor in table), head)


def kind_of(config: ModelConfig) -> str:
    """Return a family that calls its linear maps what that of `config` does."""
    if isinstance(config, T5GemmaConfig):
        return "t5gemma2" if config.merged_attention else "t5gemma"
    return "t5" if isinstance(config, Seq2SeqConfig) else "llama"


def _pair(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a kernel's adapter; our kernels have their inputs' axes first, foreign ones last."""
    inputs = kernel.order.index(0)
    outputs = len(kernel.split) - inputs
    out_axes, in_axes = kernel.split[:outputs], kernel.split[outputs:]
    module, path = kernel.name.removesuffix(".weight"), kernel.path.removesuffix("/kernel")
    a = Tensor(
        name=f"{_PREFIX}{module}.lora_A.weight",
        path=f"{path}/{A}",
        layer=kernel.layer,
        shape=(rank, kernel.shape[1]),
        split=(rank, *in_axes),
        order=(*range(1, inputs + 1), 0),
    )
    b = Tensor(
        name=f"{_PREFIX}{module}.lora_B.weight",
        path=f"{path}/{B}",
        layer=kernel.layer,
        shape=(kernel.shape[0], rank),
        split=(*out_axes, rank),
        order=(outputs, *range(outputs)),
    )
    return a, b


def _score(width: int) -> Tensor:
    return Tensor(name=_PREFIX + _SCORE, path="score", shape=(1, width), split=(width,), order=(0,))


def _config_json(config: ModelConfig, modules: list[str], base_name: str, *, scalar: bool) -> Json:
    lora = config.lora
    assert lora is not None
    task = "SEQ_2_SEQ_LM" if isinstance(config, Seq2SeqConfig) else "CAUSAL_LM"
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        # PEFT names both, because different families call their scalar head by one or the other.
        "modules_to_save": ["classifier", "score"] if scalar else None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": modules,
        "task_type": "SEQ_CLS" if scalar else task,
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def _check_settings(place: epath.Path, settings: Json) -> None:
    """Refuse every setting that means something we would not do."""
    if not isinstance(settings, dict):
        raise CheckpointError(f"{place / CONFIG} is not a table of settings. It must be the file that PEFT wrote.")
    for name, value in settings.items():
        allowed = _FIXED.get(name)
        if name in _READ | _HARMLESS:
            continue
        if name == "init_lora_weights":
            allowed = _STARTS
        # PEFT writes every field it knows, and marks those that are not in use in one of these ways.
        if value not in (allowed or (None, False, [], {})):
            want = f"be {' or '.join(map(repr, allowed))}" if allowed else "not be set"
            raise CheckpointError(f"{place / CONFIG}: {name} = {value!r} must {want}. Only plain LoRA can be read.")
    for name in ("peft_type", "r", "lora_alpha", "target_modules"):
        if settings.get(name) is None:
            raise CheckpointError(f"{place / CONFIG} has no {name}. It must be the file that PEFT wrote.")
    if not isinstance(settings["r"], int) or not isinstance(settings["lora_alpha"], int | float):
        raise CheckpointError(
            f"{place / CONFIG}: r and lora_alpha must be numbers. It must be the file that PEFT wrote."
        )
    if settings.get("task_type") not in _TASKS:
        known = ", ".join(map(str, _TASKS))
        raise CheckpointError(f"{place / CONFIG}: task_type = {settings['task_type']!r} must be one of {known}.")
    other = sorted(set(settings.get("modules_to_save") or ()) - {"classifier", "score"})
    if other:
        raise CheckpointError(
            f"{place / CONFIG}: modules_to_save names {other}; only a scalar head (score) can be read beside adapters."
        )


def _targets(
    place: epath.Path, settings: Json, kernels: Sequence[Tensor], stored: Mapping[str, Stored]
) -> tuple[str, ...]:
    """Return which linear maps have an adapter, in all layers or in none.

    What is in the file decides, and what the settings ask for must be the same.
    """
    modules = {tensor.name.removesuffix(".weight"): tensor for tensor in kernels}
    have = {name.removeprefix(_PREFIX).removesuffix(_SUFFIXES[0]) for name in stored if name.endswith(_SUFFIXES[0])}
    known = {f"{_PREFIX}{module}{suffix}" for module in modules for suffix in _SUFFIXES}
    foreign = sorted(stored.keys() - known)
    if foreign:
        raise CheckpointError(
            f"{place} is an adapter for another base, or of another kind: {listed(foreign)} belong to no linear map of "
            f"this one ({listed(modules)}). Name the base it was trained on."
        )
    lacking = sorted({f"{_PREFIX}{module}{suffix}" for module in have for suffix in _SUFFIXES} - stored.keys())
    if lacking or not have:
        raise CheckpointError(f"{place / WEIGHTS} lacks {listed(lacking) or 'every lora_A'}. Copy the file anew.")
    asked = {module for module in modules if _is_target(module, settings["target_modules"])}
    targets = tuple(name for name in TARGETS if any(target_of(modules[module]) == name for module in have))
    whole = {module for module, tensor in modules.items() if target_of(tensor) in targets}
    for rest, what in ((whole - have, "has none for"), (asked ^ have, "and its target_modules differ in")):
        if rest:
            raise CheckpointError(
                f"{place} adapts {listed(sorted(have))}, but {what} {listed(sorted(rest))}. Here an adapter "
                "covers a kind of linear map in every layer or in none."
            )
    return targets


def _is_target(module: str, wanted: str | Sequence[str]) -> bool:
    """Return whether PEFT would give a module an adapter: by the end of its name, or by a regular expression."""
    if wanted == "all-linear":
        return module != "lm_head"
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _drop_copies(place: epath.Path, kernels: Sequence[Tensor], stored: dict[str, Stored]) -> None:
    """Remove copies of the base's own matrices."""
    for kernel in kernels:
        module = kernel.name.removesuffix(".weight")
        copy = stored.pop(f"{_PREFIX}{module}.base_layer.weight", None)
        if copy is not None:
            _check_shape(place, kernel, copy)


def _check_shape(place: epath.Path, tensor: Tensor, stored: Stored) -> None:
    if stored.shape != tensor.shape:
        raise CheckpointError(
            f"{place} is an adapter for another base: {tensor.name} has shape {list(stored.shape)}, and this base and "
            f"the rank in {CONFIG} need {list(tensor.shape)}. Name the base it was trained on."
        )


def _tree(tensors: Iterable[tuple[Tensor, np.ndarray]]) -> Params:
    """Return our tree of foreign tensors, layers stacked."""
    leaves: dict[str, dict[int | None, np.ndarray]] = {}
    for tensor, array in tensors:
        leaves.setdefault(tensor.path, {})[tensor.layer] = tensor.ours(array)
    tree: Params = {}
    for path, layers in leaves.items():
        *parents, leaf = path.split("/")
        branch = tree
        for name in parents:
            branch = branch.setdefault(name, {})
        branch[leaf] = layers[None] if None in layers else np.stack([layers[n] for n in range(len(layers))])
    return tree
