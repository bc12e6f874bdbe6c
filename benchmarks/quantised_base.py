"""What an int8 base costs and saves under adapters: bytes, time of a training step, error of the logits.

    python benchmarks/quantised_base.py [--preset llama-3.2-1b llama-3-8b] [--measure small] [--rank 16]

First the sum over the arrays' shapes of the frozen base, in float32, bfloat16 and with int8 kernels (embeddings, norms
and the output matrix stay bfloat16). Then, for a preset small enough for this machine with random weights: the best of
several gradients with respect to the adapters, the memory that XLA plans for its intermediate values, and the
relative error of the logits. Random weights have no outliers, so a trained model's error is somewhat larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.core.tree import size_in_bytes
from pit_jax.core.types import Conditional, Params
from pit_jax.models.api import ConditionalLM
from pit_jax.models.config import ModelConfig
from pit_jax.models.lora import Lora, join, split
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.models.quantised import quantise

RUNS = 5


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="*", default=["llama-3.2-1b", "gemma-2b", "t5-xl", "llama-3-8b"])
    parser.add_argument("--measure", default="small")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    adapters = Lora(rank=options.rank, alpha=2.0 * options.rank)
    print(f"{'frozen base':16} {'float32':>9} {'bfloat16':>9} {'int8':>9}   GB (10^9 bytes)")
    for name in options.preset:
        sizes = (base_bytes(preset(name, lora=adapters, **how)) for how in STORED)
        print(f"{name:16} " + " ".join(f"{size / 1e9:9.3f}" for size in sizes))
    measure(preset(options.measure, lora=adapters), options.rows, options.length)


STORED = ({}, {"param_dtype": "bfloat16"}, {"param_dtype": "bfloat16", "quantised": "int8"})


def base_bytes(config: ModelConfig) -> int:
    """Return the bytes of what is frozen."""
    return size_in_bytes(split(language_model(config).abstract())[0])


def measure(config: ModelConfig, rows: int, length: int) -> None:
    """Print time and planned memory of a gradient for float32 and int8 kernels, and how far the logits are apart."""
    plain, lm = language_model(config), language_model(dataclasses.replace(config, quantised="int8"))
    params = jax.jit(plain.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 1, config.vocab_size, jnp.int32)
    ones = jnp.ones_like(tokens)
    x = Conditional(
        prompt=tokens,
        prompt_segments=ones,
        prompt_reference=jnp.zeros_like(tokens, bool),
        response=tokens,
        response_segments=ones,
    )
    print(f"\n{rows} x {2 * length} tokens on {jax.devices()[0].platform}, computed in {config.dtype}")
    print(f"{'kernels':8} {'base MB':>8} {'gradient ms':>12} {'planned MB':>11}")
    states = []
    for name, model, tree in (("float32", plain, params), ("int8", lm, quantise(params, lm, donate=False))):
        base, adapters = split(tree)
        seconds, planned = gradient(model, base, adapters, x)
        print(f"{name:8} {size_in_bytes(base) / 1e6:8.1f} {1e3 * seconds:12.1f} {planned / 1e6:11.1f}")
        states.append(np.asarray(jax.jit(model.predictors)(tree, x), np.float64))
    # The output matrix is the same, so states stand for logits, of which there are too many to keep.
    exact, found = states
    print(f"relative error of the last states: {np.linalg.norm(found - exact) / np.linalg.norm(exact):.4f}")


def gradient(lm: ConditionalLM, base: Params, adapters: Params, x: Conditional) -> tuple[float, int]:
    """Return the best time of a gradient with respect to the adapters, and the bytes planned for what lies between."""

    def loss(adapters: Params, base: Params, x: Conditional) -> jax.Array:
        return -jnp.mean(lm.logprobs(join(base, adapters), x).logp)

    program = jax.jit(jax.grad(loss)).lower(adapters, base, x).compile()
    jax.block_until_ready(program(adapters, base, x))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(program(adapters, base, x))
        times.append(time.perf_counter() - start)
    return min(times), program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
