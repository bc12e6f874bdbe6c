"""Record a tiny T5Gemma and T5Gemma 2, and what transformers computes with them, as `record.py` does for others.

    python -m tests.parity.record_t5gemma

Every parameter is random, norms too; prompts and responses are longer than the windows. The token after the decoder's
first is drawn from ids that stand for no picture.
"""

from __future__ import annotations

import shutil

import numpy as np
import torch
import transformers

from .record import LENGTHS, MARGIN, NEW, TARGET

VOCABULARY, WINDOW, START, RESPONSES = 61, 4, 2, 11
FOLDER = TARGET.parent / "hf_t5gemma"
TEXT = VOCABULARY - 3
"""Ids from here on stand for pictures."""

DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_hidden_layers=2,
    sliding_window=WINDOW,
    query_pre_attn_scalar=10,
    max_position_embeddings=64,
)
ENCODER = DECODER | dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8, num_hidden_layers=3)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0)
ROPE = dict(
    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=500.0),
    sliding_attention=dict(rope_type="default", rope_theta=20.0),
)
GEMMA3 = dict(layer_types=["sliding_attention", "full_attention"], rope_parameters=ROPE)
VISION = dict(
    hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
)


def t5gemma() -> transformers.PreTrainedModel:
    """Return one whose encoder has another shape than its decoder."""
    config = transformers.T5GemmaConfig(encoder=ENCODER | CAPS, decoder=DECODER | CAPS, vocab_size=VOCABULARY)
    return transformers.T5GemmaForConditionalGeneration(config)


def t5gemma2() -> transformers.PreTrainedModel:
    """Return one with a vision tower, as all have."""
    encoder = dict(
        text_config=DECODER | GEMMA3,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )
    config = transformers.T5Gemma2Config(
        encoder=encoder, decoder=DECODER | GEMMA3, image_token_index=VOCABULARY - 1, vocab_size=VOCABULARY
    )
    return transformers.T5Gemma2ForConditionalGeneration(config)


def build(name: str, seed: int) -> transformers.PreTrainedModel:
    """Return a model with random weights."""
    model = {"t5gemma": t5gemma, "t5gemma2": t5gemma2}[name]().eval()
    model.set_attn_implementation("eager")
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = random.normal(0, 0.3, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    return model


def reference(model: transformers.PreTrainedModel, seed: int) -> dict[str, np.ndarray] | None:
    """Return inputs and outputs, None where a greedy choice was close, a picture, or nothing but repetition."""
    random = np.random.default_rng(seed)
    mask = np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]
    ids = np.where(mask, random.integers(3, TEXT, mask.shape), 0)
    response = random.integers(3, TEXT, (len(LENGTHS), RESPONSES))
    response[:, 0] = START
    with torch.no_grad():
        logits = model(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask).long(),
            decoder_input_ids=torch.from_numpy(response),
            decoder_attention_mask=torch.ones(response.shape, dtype=torch.long),
        ).logits
        out = model.generate(
            torch.from_numpy(ids[:1, :11]),
            attention_mask=torch.ones(1, 11, dtype=torch.long),
            decoder_input_ids=torch.full((1, 1), START),
            do_sample=False,
            max_new_tokens=NEW,
            output_logits=True,
            return_dict_in_generate=True,
        )
    greedy = out.sequences[:, -NEW:].numpy()
    assert out.sequences.shape == (1, NEW + 1)
    best = torch.stack(out.logits).topk(2, dim=-1).values
    if (best[..., 0] - best[..., 1]).min().item() < MARGIN or greedy.max() >= TEXT or len(np.unique(greedy)) < 6:
        return None
    found = {"input_ids": ids, "decoder_input_ids": response, "greedy_prompt": ids[:1, :11], "greedy_ids": greedy}
    found = {name: array.astype(np.int32) for name, array in found.items()}
    return found | {"attention_mask": mask, "logits": logits.numpy()}


def record(name: str) -> None:
    """Write one folder."""
    for seed in range(300):
        model = build(name, seed)
        # None of the random tokens ends a text.
        model.generation_config.eos_token_id = None
        found = reference(model, seed)
        if found is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a clear greedy continuation")
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "reference.npz", **found)
    print(name, "seed", seed, sum(path.stat().st_size for path in folder.iterdir()) // 1000, "kB")


if __name__ == "__main__":
    record("t5gemma")
    record("t5gemma2")
