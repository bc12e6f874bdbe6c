"""Parameters made ready for a loop of decoding steps: the same logits, and nothing left to be cut in the loop."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.lora import Lora

from . import tiny

ADAPTED = dataclasses.replace(
    tiny.QWEN3,
    dtype="bfloat16",
    scan_layers=False,
    lora=Lora(rank=2, alpha=4.0, targets=("query", "down")),
    quantised="int8",
)
MODELS = {
    "learned": tiny.MODELS["learned"],
    "umt5": tiny.MODELS["umt5"],
    "bfloat16": DecoderOnly(dataclasses.replace(tiny.LEARNED, dtype="bfloat16")),
    "scanned": DecoderOnly(dataclasses.replace(tiny.ROTARY, dtype="bfloat16")),
    "adapted": DecoderOnly(ADAPTED),
}
PROMPTS = tiny.prompts_of(tiny.batch([[([1, 2, 3], [4])], [([5], [6])]], 3, 1))


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "learned", "scanned"))
def test_ready_parameters_give_the_same_logits(name: str) -> None:
    lm = MODELS[name]
    params = lm.init(jax.random.key(0)) if name == "adapted" else tiny.params(lm)
    _, cache = lm.prefill(params, PROMPTS, 2)
    step, token = jax.jit(lm.step), jnp.asarray([7, 8])
    np.testing.assert_allclose(
        step(lm.ready(params), cache, token)[0], step(params, cache, token)[0], atol=1e-6, rtol=1e-6
    )


def test_the_loop_neither_cuts_weights_nor_copies_caches() -> None:
    # Sizes that nothing else has.
    lm = DecoderOnly(dataclasses.replace(tiny.LEARNED, heads=4, kv_heads=2, mlp=56, max_positions=64))
    keys = jax.random.split(jax.random.key(0), 4)
    run = functools.partial(generate, sampling=Sampling(), max_new=37, eos_ids=(1,), pad_id=0)
    text = jax.jit(lambda params: run(lm, params, PROMPTS, keys)).lower(tiny.params(lm)).compile().as_text()
    bodies = [_computation(text, name) for name in set(re.findall(r"body=%?([\w.\-]+)", text))]
    (body,) = [body for body in bodies if "f32[4,2,37,8]" in body]
    # Folding the position into a key unstacks too, integers that are no weights.
    cut = [line for line in body.splitlines() if "unstack" in line and "= u32" not in line]
    moved = [line for line in cut if " bitcast(" not in line]
    assert "dot_general" in body and not moved
    assert not re.search(r"= f32\[4,2,37,8\]\S* copy\(", body)


def _computation(text: str, name: str) -> str:
    start = text.index(f"\n%{name} (")
    return text[start : text.index("\n}", start)]
