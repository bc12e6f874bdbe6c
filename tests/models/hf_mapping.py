"""Hugging Face names and layouts -> our parameter trees, written anew: what `models/convert` is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pit_jax.core.types import Params
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig

Weights = dict[str, np.ndarray]
ACTIVATIONS = {"gelu_new": "gelu_tanh", "relu": "relu"}


def load(directory: Path) -> tuple[dict[str, Any], Weights, dict[str, np.ndarray]]:
    """Return (config, weights, reference values) of a checkpoint in `tests/data/weights`."""
    config = json.loads((directory / "config.json").read_text())
    return config, dict(np.load(directory / "weights.npz")), dict(np.load(directory / "reference.npz"))


def decoder_only_params(config: DecoderOnlyConfig, weights: Weights) -> Params:
    """Return the parameters of a Llama, Mistral, Qwen 2, Gemma or Gemma 2 checkpoint."""

    def stack(name: str) -> jnp.ndarray:
        return jnp.stack([weights[f"model.layers.{n}.{name}"] for n in range(config.layers)])

    def heads(name: str) -> Params:
        kernel = jnp.swapaxes(stack(f"self_attn.{name}.weight"), 1, 2)
        out = {"kernel": kernel.reshape(config.layers, config.width, -1, config.head_dim)}
        if config.qkv_bias:
            out["bias"] = stack(f"self_attn.{name}.bias").reshape(config.layers, -1, config.head_dim)
        return out

    def norms(before: str, after: str) -> Params:
        out = {"before": {"scale": stack(f"{before}.weight")}}
        return out | {"after": {"scale": stack(f"{after}.weight")}} if config.post_norms else out

    def dense(name: str) -> Params:
        return {"kernel": jnp.swapaxes(stack(f"mlp.{name}.weight"), 1, 2)}

    out = jnp.swapaxes(stack("self_attn.o_proj.weight"), 1, 2)
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    params: Params = {
        "embedding": {"token": jnp.asarray(weights["model.embed_tokens.weight"])},
        "layers": {
            "attention_norms": norms("input_layernorm", "post_attention_layernorm"),
            "attention": {
                "query": heads("q_proj"),
                "key": heads("k_proj"),
                "value": heads("v_proj"),
                "out": {"kernel": out.reshape(config.layers, config.heads, config.head_dim, config.width)},
            },
            "mlp_norms": norms(before_mlp, "post_feedforward_layernorm"),
            "mlp": {"gate": dense("gate_proj"), "up": dense("up_proj"), "down": dense("down_proj")},
        },
        "final_norm": {"scale": jnp.asarray(weights["model.norm.weight"])},
    }
    return params if config.tied else params | {"head": jnp.asarray(weights["lm_head.weight"].T)}


def encoder_decoder_config(hf: dict[str, Any]) -> EncoderDecoderConfig:
    """Return the config of a T5 1.0 or 1.1 checkpoint."""
    return EncoderDecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        mlp=hf["d_ff"],
        encoder_layers=hf["num_layers"],
        decoder_layers=hf["num_decoder_layers"],
        activation=ACTIVATIONS[hf["dense_act_fn"]],
        gated=hf["is_gated_act"],
        norm_eps=hf["layer_norm_epsilon"],
        # transformers 5 calls every T5 tied; whether it is shows in whether it scales the logits.
        tied=hf.get("scale_decoder_outputs", hf["tie_word_embeddings"]),
        relative_buckets=hf["relative_attention_num_buckets"],
        relative_max_distance=hf["relative_attention_max_distance"],
        start_id=hf["decoder_start_token_id"],
    )


def encoder_decoder_params(config: EncoderDecoderConfig, weights: Weights) -> Params:
    """Return the parameters of a T5 1.0 or 1.1 checkpoint."""

    def stack_of(side: str, count: int) -> Params:
        def stack(name: str) -> jnp.ndarray:
            return jnp.stack([weights[f"{side}.block.{n}.layer.{name}.weight"] for n in range(count)])

        def attention(name: str) -> Params:
            kernels = {ours: jnp.swapaxes(stack(f"{name}.{theirs}"), 1, 2) for ours, theirs in projections}
            split = (count, config.width, config.heads, config.head_dim)
            out = kernels.pop("out").reshape(count, config.heads, config.head_dim, config.width)
            return {ours: {"kernel": kernel.reshape(split)} for ours, kernel in kernels.items()} | {
                "out": {"kernel": out}
            }

        projections = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
        mlp = 2 if side == "decoder" else 1
        inputs = (("gate", "wi_0"), ("up", "wi_1")) if config.gated else (("up", "wi"),)
        dense = (*inputs, ("down", "wo"))
        layers: Params = {
            "attention_norms": {"before": {"scale": stack("0.layer_norm")}},
            "attention": attention("0.SelfAttention"),
            "mlp_norms": {"before": {"scale": stack(f"{mlp}.layer_norm")}},
            "mlp": {
                ours: {"kernel": jnp.swapaxes(stack(f"{mlp}.DenseReluDense.{theirs}"), 1, 2)} for ours, theirs in dense
            },
        }
        if side == "decoder":
            layers["cross_norms"] = {"before": {"scale": stack("1.layer_norm")}}
            layers["cross"] = attention("1.EncDecAttention")
        bias = weights[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return {
            "layers": layers,
            "relative_bias": {"table": jnp.asarray(bias)},
            "final_norm": {"scale": jnp.asarray(weights[f"{side}.final_layer_norm.weight"])},
        }

    params: Params = {
        "embedding": {"token": jnp.asarray(weights["shared.weight"])},
        "encoder": stack_of("encoder", config.encoder_layers),
        "decoder": stack_of("decoder", config.decoder_layers),
    }
    return params if config.tied else params | {"head": jnp.asarray(weights["lm_head.weight"].T)}
