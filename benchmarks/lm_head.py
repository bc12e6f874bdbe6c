"""What the chunked LM head saves: memory and time of value and gradient, against a plain log-softmax.

    python benchmarks/lm_head.py [--tokens 2048] [--width 256] [--vocab 8192] [--chunks 1024 2048]

"blocks" go over the vocabulary and compute all logits twice (`token_scores`); "one pass" goes over the tokens and
computes them once (`token_loss`), in as many parts as there would be blocks, and in parts of 256 tokens.

Prints one row a form: temporary memory that XLA plans for the compiled program, and the best of several runs,
with the ratio to the plain form. All forms run in one process, one after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pit_jax.core.types import TokenScores
from pit_jax.ops.logprob import token_scores
from pit_jax.ops.token_loss import Passage, token_loss

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean loss by the textbook: all logits in float32 at once."""
    logits = (hidden @ head).astype(jnp.float32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1))


def chunked(chunk: int) -> Loss:
    """Return the mean loss by `ops.logprob.token_scores`."""

    def loss(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return -jnp.mean(token_scores(hidden, head, targets, chunk=chunk).logp)

    return loss


def one_pass(parts: int) -> Loss:
    """Return the mean loss by `ops.token_loss`."""

    def per_token(scores: TokenScores, _: None) -> jax.Array:
        return -scores.logp

    def loss(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        total, _ = token_loss(per_token, hidden[None], head, targets[None], None, Passage(chunks=parts))
        return total / targets.size

    return loss


def measure(loss: Loss, arguments: tuple[jax.Array, ...], runs: int) -> tuple[float, float]:
    """Return (temporary MiB, best milliseconds) of the loss with its gradient."""
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - begin)
    return memory, 1e3 * min(times)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (
        jax.random.normal(keys[0], (args.tokens, args.width)),
        jax.random.normal(keys[1], (args.width, args.vocab)) * args.width**-0.5,
        jax.random.randint(keys[2], (args.tokens,), 0, args.vocab),
    )
    forms: dict[str, Loss] = {"plain log-softmax": plain}
    forms |= {f"blocks of {chunk}": chunked(chunk) for chunk in args.chunks}
    parts = {-(-args.vocab // chunk) for chunk in args.chunks} | {-(-args.tokens // 256)}
    forms |= {f"one pass, {count} parts": one_pass(count) for count in sorted(parts)}
    device = jax.devices()[0]
    print(f"{args.tokens} tokens, width {args.width}, vocabulary {args.vocab}, float32, {device.device_kind}")
    print(f"{'form':20} {'temporary MiB':>14} {'ms':>8} {'memory':>8} {'time':>8}")
    base: tuple[float, float] | None = None
    for name, loss in forms.items():
        memory, milliseconds = measure(loss, arguments, args.runs)
        base = base or (memory, milliseconds)
        print(f"{name:20} {memory:14.1f} {milliseconds:8.1f} {memory / base[0]:7.2f}x {milliseconds / base[1]:7.2f}x")


if __name__ == "__main__":
    main()
