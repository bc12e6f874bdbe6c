"""Memory of the five models of PIT's RL: each whole, against five adapters on one frozen base.

    python benchmarks/adapter_memory.py [--preset llama-3.2-1b] [--rank 16] [--measure small]

The five are the policy, the improver, the improver's SFT anchor, R_P and R_PIT; the improver is trained with AdamW
(two moments a parameter). First the sum over the arrays' shapes for a preset, then (`--measure`) the bytes of the
buffers that really exist on the devices for a preset small enough to be built here.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax

from pit_jax.core.tree import size_in_bytes
from pit_jax.models.config import ModelConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.models.lora import Lora, join, split
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.models.trained import divide
from pit_jax.train import state
from pit_jax.train.optim import Optimizer, build

TRANSFORM = build(Optimizer(learning_rate=1e-4), 100)
MODELS = 5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["llama-3.2-1b", "gemma-2b", "t5-xl", "llama-3-8b"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--measure", default="small")
    options = parser.parse_args()
    print(f"parameters bfloat16 for the frozen base, float32 for what is trained; rank {options.rank}; GB (10^9 bytes)")
    print(f"{'preset':16} {'one model':>10} {'five whole':>11} {'base + 5':>9} {'ratio':>6} {'to one model':>13}")
    for name in options.preset:
        whole, adapted = planned(name, options.rank)
        one = size_in_bytes(language_model(preset(name, param_dtype="bfloat16")).abstract())
        row(name, one, whole, adapted)
    name = options.measure
    whole, adapted = (measured(preset(name, lora=rank)) for rank in (None, Lora(rank=options.rank, alpha=32.0)))
    one = size_in_bytes(language_model(preset(name)).abstract())
    print(f"\nmeasured on {jax.devices()[0].platform} (float32 throughout):")
    row(name, one, whole, adapted)


def row(name: str, one: int, whole: int, adapted: int) -> None:
    """Print a line of the table."""
    numbers = f"{one / 1e9:>10.3f} {whole / 1e9:>11.3f} {adapted / 1e9:>9.3f} {whole / adapted:>6.1f}"
    print(f"{name:16} {numbers} {adapted / one:>13.2f}")


def planned(name: str, rank: int) -> tuple[int, int]:
    """Return bytes of five whole models and of five adapters on one base, the moments of the trained one included."""
    frozen = language_model(preset(name, param_dtype="bfloat16"))
    trained = language_model(preset(name))
    whole = (MODELS - 1) * size_in_bytes(frozen.abstract()) + size_in_bytes(
        state.abstract(trained.abstract(), TRANSFORM)
    )
    lm = language_model(dataclasses.replace(frozen.config, lora=Lora(rank=rank, alpha=2.0 * rank)))
    base, adapters = split(lm.abstract())
    moments = size_in_bytes(state.abstract(adapters, TRANSFORM)) - size_in_bytes(adapters)
    return whole, size_in_bytes(base) + MODELS * size_in_bytes(adapters) + moments


def measured(config: ModelConfig) -> int:
    """Return bytes of the distinct buffers of five models, built as a run builds them."""
    lm = language_model(config)
    reward = ScalarModel(lm)
    key = jax.random.key(0)
    first = jax.jit(lm.init)(key)
    base, _ = divide(lm, first)

    def another(number: int) -> Any:
        params = jax.jit(lm.init)(jax.random.fold_in(key, number))
        return params if base is None else join(base, split(params)[1])

    trees = [first, *(another(number) for number in (1, 2))]
    trees += [reward.with_trunk(another(number), key) for number in (3, 4)]
    _, trained = divide(lm, trees[1])
    moments = jax.jit(TRANSFORM.init)(trained)
    buffers = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves((trees, moments))}
    return sum(buffers.values())


if __name__ == "__main__":
    main()
