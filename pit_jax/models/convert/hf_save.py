"""Our models as Hugging Face directories, written tensor by tensor from any mesh."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pit_jax.core.errors import ConfigError, invalid
from pit_jax.core.tree import named_leaves
from pit_jax.core.types import Params
from pit_jax.io import files, safetensors_writer
from pit_jax.io.safetensors_writer import MAX_SHARD_SIZE, Entry
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert import hf_layout, stream
from pit_jax.models.convert.hf_config import config_from_hf
from pit_jax.models.convert.hf_export_config import (
    FAMILIES,
    RUNTIME,
    Family,
    Json,
    Special,
    export_config,
    finish_config,
    generation_config,
    plain,
)
from pit_jax.models.convert.layout import Tensor
from pit_jax.models.convert.peft import adapter_pairs
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.trained import Network, language_model_of

# T5Gemma's stacks have their norm before their layers, decoder-only models after them.
_STACK_NORM = "stack_norm"
# Names of modules in the order in which transformers registers them, wherever they stand.
_ORDER = (
    *("shared", "model", "encoder", "decoder", "lm_head", "score"),
    *("embed_tokens", _STACK_NORM, "layers", "norm", "block", "layer", "final_layer_norm"),
    *("self_attn", "pre_self_attn_layernorm", "post_self_attn_layernorm"),
    *("mlp", "input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("cross_attn", "pre_cross_attn_layernorm", "post_cross_attn_layernorm", "out_proj"),
    *("SelfAttention", "EncDecAttention", "DenseReluDense", "layer_norm"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "gate_proj", "up_proj", "down_proj"),
    *("q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo", "weight", "bias"),
)

GENERATION_CONFIG = "generation_config.json"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
_ONLY = "Only reward models with readout = 'last' and attention = 'causal' over a decoder-only trunk can leave."


@dataclasses.dataclass(frozen=True)
class _Source:
    """Foreign tensors by name, where each comes from, and the matrices of its adapter, if it has one."""

    params: Params
    tensors: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    dtypes: dict[str, np.dtype]

    def arrays(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield tensors, one at a time, with adapters merged: W + s B A in float32."""
        wanted = [part for name in names for part in (self.tensors[name], *self.pairs.get(name, ()))]
        found = (array for _, array in stream.unload(self.params, wanted))
        for name in names:
            array = next(found)
            if name in self.pairs:
                a, b = (next(found).astype(np.float32) for _ in range(2))
                array = array.astype(np.float32) + np.float32(self.scale) * (b @ a)
            yield _cast(name, array, self.dtypes[name])


def save_hf(
    directory: epath.PathLike,
    network: Network,
    params: Params,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    source_config: Json | None = None,
    special: Special | None = None,
) -> None:
    """Write a directory that transformers and vLLM load: weights, configs and tokenizer.

    Every process has to call it; the first one writes. Adapters are merged into the weights. A reward model that reads
    the last token, with causal attention, is written as a `...ForSequenceClassification` with one label.

    Args:
      directory: must not exist, or be empty; it appears when all is written.
      network: whose parameters these are.
      params: from any mesh.
      tokenizer: a tokenizer's files by name (`text.tokenizer.tokenizer_files`), written as they are; settings of a
        generation_config.json among them are kept beside ours.
      dtype: of the tensors: float32, bfloat16, float16, or None for that of each parameter.
      max_shard_size: bytes of a file's tensors.
      source_config: `config.json` of the checkpoint that the model was read from, kept where it still says what the
        model is.
      special: ids of special tokens; by default those of `source_config`.
    Raises:
      ConfigError: no Hugging Face family can express the model, or float16 its numbers.
      CheckpointError: there is something at `directory`, or too little room.
    """
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise invalid("dtype", dtype, f"be one of {', '.join(EXPORT_DTYPES)}", "Use one of them.")
    scalar = isinstance(network, ScalarModel)
    config = language_model_of(network).config
    if config.quantised is not None:
        raise ConfigError("A quantised base cannot leave as it is. Read the run with `Artifact(..., in_floats=True)`.")
    if isinstance(network, ValueModel):
        raise ConfigError(f"A ValueModel scores every token, which no Hugging Face class does. {_ONLY}")
    if isinstance(network, ScalarModel):
        check_scalar(network, params)
    family, data = _config(config, source_config, special or Special(), dtype or config.param_dtype, scalar=scalar)
    source = _source(config, family, params, dtype, scalar=scalar)
    entries = (Entry(name=name, shape=t.shape, dtype=source.dtypes[name]) for name, t in source.tensors.items())
    plan = safetensors_writer.plan(entries, max_shard_size=max_shard_size)
    with safetensors_writer.new_directory(directory) as place:
        safetensors_writer.write(place, plan, source.arrays([entry.name for entry in plan.entries]))
        if jax.process_index() == 0:
            files.write_json(place / "config.json", data)
            kept = dict(tokenizer or {})
            generation = json.loads(kept.pop(GENERATION_CONFIG, b"{}"))
            if not scalar:
                # What somebody has chosen does not follow from the model's config.
                made = generation_config(data) | ({"_from_model_config": False} if generation else {})
                files.write_json(place / GENERATION_CONFIG, made | generation)
            for name, content in kept.items():
                (place / name).write_bytes(content)


def check_scalar(network: ScalarModel, params: Params) -> None:
    """Refuse scalar models whose scores `...ForSequenceClassification` would not give."""
    for field, value, want in (("readout", network.readout, "last"), ("attention", network.attention, "causal")):
        if value != want:
            raise invalid(f"ScalarModel.{field}", value, f"be {want!r} to leave as a Hugging Face model", _ONLY)
    bias = float(params["head"]["bias"])
    if bias != 0:
        rule = "be 0 to leave as a Hugging Face model, whose scalar head has none"
        raise invalid("ScalarModel head/bias", bias, rule, "Subtract it from every score; comparisons do not change.")


def _config(
    config: ModelConfig, source_config: Json | None, special: Special, dtype: str, *, scalar: bool
) -> tuple[Family, Json]:
    """Return the family and its `config.json`: the checkpoint's own where that still describes the model."""
    out = {"special": special, "dtype": dtype, "scalar": scalar}
    family = _source_family(config, source_config, scalar=scalar)
    if family is None or source_config is None:
        family, data = export_config(config, **out)
    else:
        data = finish_config(family, source_config, vocab_size=config.vocab_size, **out)
    if scalar and family.scalar is None:
        raise ConfigError(f"The family {family.name} has no scalar head that reads the last token. {_ONLY}")
    return family, data


def _source_family(config: ModelConfig, source_config: Json | None, *, scalar: bool) -> Family | None:
    """Return the family of the checkpoint's own config, if that still describes the model."""
    family = FAMILIES.get((source_config or {}).get("model_type", ""))
    if family is None or source_config is None or not isinstance(config, family.config):
        return None
    names = [tensor.name for tensor in hf_layout.tensors(config, family.name)]
    read = config_from_hf(source_config, names, where="source_config")
    # Whether the output matrix is tied means nothing in a model that has none.
    same = {name: vars(config)[name] for name in RUNTIME | {"vocab_size"} | ({"tied"} if scalar else set())}
    return family if plain(dataclasses.replace(read, **same)) == plain(config) else None


def _source(config: ModelConfig, family: Family, params: Params, dtype: str | None, *, scalar: bool) -> _Source:
    """Return what is to be written, in the order in which tensors are put into shards."""
    table = hf_layout.classifier_tensors if scalar else hf_layout.tensors
    tensors = sorted(table(config, family.name), key=lambda tensor: _place(tensor.name))
    pairs = adapter_pairs(config, tensors)
    leaves = {path: np.dtype(leaf.dtype) for path, leaf in named_leaves(params)}
    fixed = None if dtype is None else np.dtype(jnp.dtype(dtype))
    return _Source(
        params=params,
        tensors={tensor.name: tensor for tensor in tensors},
        pairs=pairs,
        scale=config.lora.scale if config.lora else 0.0,
        dtypes={tensor.name: fixed or leaves[tensor.path] for tensor in tensors},
    )


def _place(name: str) -> tuple[int, ...]:
    """Return where a tensor stands among those of its model in transformers, by which it is put into a shard."""
    parts = name.replace("coder.norm.", f"coder.{_STACK_NORM}.").split(".")
    return tuple(int(part) if part.isdecimal() else _ORDER.index(part) for part in parts)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a tensor in another dtype; float16 has the smallest range, beyond which numbers would become infinite."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise invalid("dtype", "float16", f"hold every number of {name}", "Use bfloat16 or float32.")
    return cast
