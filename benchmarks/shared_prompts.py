"""What it saves to compute shared prompts once: the gap-reward step and the RL update, shared against plain.

    python benchmarks/shared_prompts.py --prompt 1024 --answer 128 --width 256 --layers 4

Both forms are run in turn in one process, on the same records and parameters; times are medians. FLOPs are those of
the compiled programs. `gap` is a training step on gap records (loss, gradients, no optimiser) by a reward model with
causal attention; `rl` the gradients of the policy loss on the samples of prompts as long.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.core.types import Conditional, Params
from pit_jax.data.collate import collator_for
from pit_jax.data.shared import with_shared_prompts
from pit_jax.losses.preference import COMPARISONS
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.ops.shared import share
from pit_jax.stages.reward import comparison_objective
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer


def network(options: argparse.Namespace) -> DecoderOnly:
    """Return a Llama of the wanted size."""
    heads = max(options.width // 64, 1)
    return DecoderOnly(
        DecoderOnlyConfig(
            vocab_size=512,
            width=options.width,
            heads=heads,
            kv_heads=heads,
            head_dim=options.width // heads,
            mlp=3 * options.width,
            layers=options.layers,
            dtype=options.dtype,
            scan_layers=False,
        )
    )


def gap_step(options: argparse.Namespace) -> tuple[Callable[[Params, Any], Any], Params, dict[str, Any]]:
    """Return the gap step's loss and gradients, parameters, and the same records in both forms."""
    lengths = Lengths(inputs=options.prompt, targets=options.answer)
    codec = Codec(ByteTokenizer(), Templates(policy="{prompt}", gap="{prompt}R{reference}C"), lengths)
    draw, records = np.random.default_rng(0), []
    for _ in range(options.records):
        prompt, chosen, rejected = (
            draw.integers(10, 200, size).astype(np.int32)
            for size in (codec.prompt_room, options.answer - 1, options.answer - 1)
        )
        end = np.array([codec.eos_ids[0]], np.int32)
        records.append({"prompt": prompt, "chosen": np.append(chosen, end), "rejected": np.append(rejected, end)})
    plain: Any = collator_for("reward_gap", codec, batch_size=len(records), micro_batches=None, packing=None)
    model = ScalarModel(network(options), "mean_difference", "causal")
    objective: Any = comparison_objective(model, "gap", COMPARISONS, 1)
    forms = {"plain": plain.leading(records)[0], "shared": with_shared_prompts(plain, 1).leading(records)[0]}

    def loss(params: Params, batch: Any) -> jax.Array:
        return objective(params, batch, None)[0].value()

    return jax.value_and_grad(loss), model.init(jax.random.key(0)), forms


def rl_update(options: argparse.Namespace) -> tuple[Callable[[Params, Any], Any], Params, dict[str, Any]]:
    """Return loss and gradients of the samples' weighted log-probabilities, parameters, and both forms of samples."""
    draw, samples, rows = np.random.default_rng(0), options.samples, options.records * options.samples
    prompt = np.repeat(draw.integers(10, 200, (options.records, options.prompt)), samples, axis=0).astype(np.int32)
    response = draw.integers(10, 200, (rows, options.answer)).astype(np.int32)
    plain = Conditional(
        prompt=jnp.asarray(prompt),
        prompt_segments=jnp.ones_like(prompt),
        prompt_reference=jnp.zeros_like(prompt, bool),
        response=jnp.asarray(response),
        response_segments=jnp.ones_like(response),
    )
    lm, weights = network(options), jnp.asarray(draw.normal(size=(rows, 1)), jnp.float32)

    def loss(params: Params, batch: Conditional) -> jax.Array:
        return jnp.mean(weights * lm.logprobs(params, batch).logp)

    return jax.value_and_grad(loss), lm.init(jax.random.key(0)), {"plain": plain, "shared": share(plain, samples)}


def measure(step: Callable[..., Any], params: Params, forms: dict[str, Any], repeats: int) -> dict[str, float]:
    """Return times in seconds, FLOPs, temporary memory, their ratios, and the largest relative error of a gradient."""
    compiled = {name: jax.jit(step).lower(params, batch).compile() for name, batch in forms.items()}
    results = {name: jax.block_until_ready(run(params, forms[name])) for name, run in compiled.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, forms[name]))
            times[name].append(time.perf_counter() - start)
    found: dict[str, float] = {}
    for name, run in compiled.items():
        found[f"{name} s"] = statistics.median(times[name])
        found[f"{name} GFLOP"] = (run.cost_analysis() or {})["flops"] / 1e9
        memory = run.memory_analysis()
        found[f"{name} MB"] = 0.0 if memory is None else memory.temp_size_in_bytes / 2**20
    for unit in ("s", "GFLOP", "MB"):
        found[f"ratio {unit}"] = found[f"plain {unit}"] / found[f"shared {unit}"]
    pairs = zip(jax.tree.leaves(results["plain"][1]), jax.tree.leaves(results["shared"][1]), strict=True)
    found["gradient error"] = max(float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(a)) + 1e-12)) for a, b in pairs)
    return found


def main() -> None:
    """Print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("gap", "rl"), nargs="+", default=["gap", "rl"])
    for name, default in (("prompt", 1024), ("answer", 128), ("width", 256), ("layers", 4), ("records", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=4, help="samples of a prompt (rl)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {platform.machine()}"
    print(f"{machine}\npython benchmarks/shared_prompts.py {' '.join(sys.argv[1:])}\n")
    makers = {"gap": gap_step, "rl": rl_update}
    table = {work: measure(*makers[work](options), options.repeats) for work in options.work}
    names = list(next(iter(table.values())))
    print("| work | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for work, row in table.items():
        print(f"| {work} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    print(json.dumps({"machine": machine, "options": vars(options), "results": table}))


if __name__ == "__main__":
    main()
