"""What blocks of queries save where no attention kernel runs: value and gradient, against the plain form.

    python benchmarks/attention.py [--lengths 64 128 256 512 1024] [--tokens 4096] [--heads 8] [--kv_heads 4]

Prints one row a length: temporary memory that XLA plans, the best processor time of several runs (which other work on
the machine disturbs less than the time on the clock) and the best time on the clock, of both forms, and the ratio of
processor times. Forms take turns in one process. Causal rows, float32, as many of them as make up the tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pit_jax.models import attending
from pit_jax.models.attending import KeysValues, Masks, Scores
from pit_jax.ops.sight import Order

Run = Callable[[], object]


def compiled(order: Order | None, arrays: tuple[jax.Array, ...]) -> tuple[float, Run]:
    """Return the planned temporary MiB and a run of value and gradient: in blocks with an order, else plain."""
    length = arrays[0].shape[1]
    scene = Masks(jnp.tril(jnp.ones((length, length), bool))[None, None], order=order)
    scores = Scores(arrays[0].shape[3] ** -0.5, None, None)

    def loss(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attending.attend(queries, KeysValues(keys, values), scene, None, scores)))

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).compile()
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    return memory, lambda: jax.block_until_ready(program(*arrays))


def best(runs: tuple[Run, ...], times: int) -> list[tuple[float, float]]:
    """Return the best milliseconds (processor, clock) of each, run in turns."""
    found = [(float("inf"), float("inf"))] * len(runs)
    for _ in range(times):
        for index, run in enumerate(runs):
            processor, clock = time.process_time(), time.perf_counter()
            run()
            took = 1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - clock)
            found[index] = min(found[index][0], took[0]), min(found[index][1], took[1])
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    print(f"{args.tokens} tokens, {args.heads} heads of {args.head_dim}, {args.kv_heads} of keys, float32, "
          f"{jax.devices()[0].device_kind}")  # fmt: skip
    print(
        f"{'length':>6} {'plain MiB':>10} {'cpu ms':>8} {'ms':>8} {'blocks MiB':>11} {'cpu ms':>8} {'ms':>8} {'x':>6}"
    )
    for length in args.lengths:
        rows, keys = max(args.tokens // length, 1), jax.random.split(jax.random.key(0), 3)
        heads = (args.heads, args.kv_heads, args.kv_heads)
        arrays = tuple(
            jax.random.normal(key, (rows, length, count, args.head_dim)) for key, count in zip(keys, heads, strict=True)
        )
        memory, runs = zip(*(compiled(order, arrays) for order in (None, Order(causal=True))), strict=True)
        best(runs, 1)
        (plain, plain_clock), (blocked, blocked_clock) = best(runs, args.runs)
        print(
            f"{length:6} {memory[0]:10.1f} {plain:8.1f} {plain_clock:8.1f} {memory[1]:11.1f} {blocked:8.1f} "
            f"{blocked_clock:8.1f} {plain / blocked:5.2f}x"
        )


if __name__ == "__main__":
    main()
