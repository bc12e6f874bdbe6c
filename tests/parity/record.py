"""Record `tests/data/hf`: tiny random models of transformers, and what they compute (float32, eager, CPU).

    python tests/parity/record.py [FAMILY ...]

Every tensor is random, norms and biases too; sequences are longer than windows and than the lengths that rotary
scaling starts from. Greedy continuations in which two tokens come close are drawn anew with the next seed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

TARGET = Path(__file__).parent.parent / "data" / "hf"
VOCABULARY, NEW, MARGIN = 96, 64, 2e-3
LENGTHS = (20, 13, 7)
WRITERS = ("o_proj.weight", "down_proj.weight", ".o.weight", ".wo.weight")

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
_PLAIN = {"rope_type": "default", "rope_theta": 500.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
FAMILIES = {
    "llama": ("llama", _DECODER | {"rope_parameters": _PLAIN}),
    "llama_linear": ("llama", _DECODER | {"rope_parameters": _PLAIN | {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", _DECODER | {
        "rope_parameters": _LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 8},
        "attention_bias": True,
        "mlp_bias": True,
    }),
    "llama_yarn": ("llama", _DECODER | {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
        },
        "tie_word_embeddings": True,
    }),
    "mistral": ("mistral", _DECODER | {"sliding_window": 4}),
    "qwen2": ("qwen2", _DECODER | {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True,
    }),
    "qwen2_plain": ("qwen2", _DECODER),
    "qwen3": ("qwen3", _DECODER | {"attention_bias": True}),
    "qwen3_windows": ("qwen3", _DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma": ("gemma", _DECODER),
    "gemma2": ("gemma2", _DECODER | {
        "sliding_window": 4, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }),
    "gemma3_text": ("gemma3_text", _DECODER | {
        "num_hidden_layers": 3, "sliding_window": 4, "query_pre_attn_scalar": 20, "rope_parameters": _GEMMA3_ROPE,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    "t5": ("t5", _T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "t5_1_1": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "umt5": ("umt5", _T5 | {"feed_forward_proj": "gated-gelu"}),
}  # fmt: skip
RECORDED = [name for name in FAMILIES if name not in ("llama", "llama_linear", "qwen2_plain", "qwen3_windows")]
"""What tests compare with that have no transformers; the others are the same but for a detail."""
UNTIED = ("t5_1_1", "mt5")
"""T5s with an output matrix of their own, which transformers 5 only gives those that were saved so."""


def build(name: str, seed: int, *, classifier: bool = False) -> transformers.PreTrainedModel:
    """Return a model with random weights; a classifier has one label."""
    family, settings = FAMILIES[name]
    config = AutoConfig.for_model(family, **settings | ({"num_labels": 1} if classifier else {}))
    config.architectures = None
    make = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    make = AutoModelForSequenceClassification if classifier else make
    torch.manual_seed(seed)
    model = make.from_config(config, attn_implementation="eager").eval()
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCABULARY, config.d_model))
    source = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            scale = parameter.shape[-1] ** -0.5
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            elif parameter is embedding:
                parameter.copy_(noise * (0.4 if config.is_encoder_decoder else 0.4 * scale))
            elif "relative_attention_bias" in key:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * (2 * scale if key.endswith(WRITERS) else scale))
    return model


def reference(model: transformers.PreTrainedModel, seed: int) -> dict[str, np.ndarray] | None:
    """Return inputs and outputs, None where a greedy choice was close or nothing but repetition came out."""
    random = np.random.default_rng(seed)
    mask = np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]
    ids = np.where(mask, random.integers(3, VOCABULARY, mask.shape), 0).astype(np.int32)
    found = {"input_ids": ids, "attention_mask": mask}
    more = {}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = random.integers(3, VOCABULARY, (len(LENGTHS), 9)).astype(np.int32)
        found["decoder_input_ids"][:, 0] = 0
        more["decoder_input_ids"] = torch.from_numpy(found["decoder_input_ids"]).long()
    inputs = torch.from_numpy(ids).long()
    # None of the random tokens ends a text.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        found["logits"] = model(inputs, attention_mask=torch.from_numpy(mask).long(), **more).logits.numpy()
        found["greedy_prompt"] = ids[:1, :11]
        out = model.generate(
            inputs[:1, :11],
            attention_mask=torch.ones(1, 11, dtype=torch.long),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=NEW, pad_token_id=0, decoder_start_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            ),
        )  # fmt: skip
    found["greedy_ids"] = out.sequences[:, -NEW:].numpy().astype(np.int32)
    assert found["greedy_ids"].shape == (1, NEW)
    best = torch.stack(out.logits).topk(2, dim=-1).values
    close = (best[..., 0] - best[..., 1]).min().item() < MARGIN
    return None if close or len(np.unique(found["greedy_ids"])) < 6 else found


def record(name: str) -> None:
    """Write one folder."""
    for seed in range(100):
        model = build(name, seed)
        found = reference(model, seed)
        if found is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a clear greedy continuation")
    folder = TARGET / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.config.to_json_file(folder / "config.json", use_diff=True)
    tied = {} if name in UNTIED or not model.config.tie_word_embeddings else {"lm_head.weight"}
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *tied}
    state = {key: value.contiguous() for key, value in model.state_dict().items() if key not in copies}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "reference.npz", **found)
    print(name, "seed", seed, sum(path.stat().st_size for path in folder.iterdir()) // 1000, "kB")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or RECORDED:
        record(chosen)
