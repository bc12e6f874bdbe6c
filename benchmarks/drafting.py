"""What drafted tokens save: sampling with and without them, at several shares of right drafts.

    python -m benchmarks.drafting [--shape nano] [--rows 4] [--prompt 128] [--response 64] [--drafts 3 7]
                                  [--right 0.0 0.5 0.8 0.95 1.0] [--draws inverse] [--repeats 5]
                                  [--set cache_dtype=int8] [--output DIR]

Every answer is dictated (`pit_jax/testing/dictated.py`), so that the same is said with any parameters; the passes of
the model are computed all the same. The reference, the end of the prompt, is the answer with a share of its tokens
exchanged for others, one here and one there: `--right` is the share that stays. All forms are compiled first and then
timed in turn; a ratio is the median over turns of plain time / drafted time in the same turn.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import record
from benchmarks.speed.options import settings
from benchmarks.speed.product import model_config
from benchmarks.speed.shapes import SHAPES
from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import DRAWS, Sampling
from pit_jax.models.presets.catalog import language_model
from pit_jax.testing.dictated import Dictated

HEADS = ("right", "drafted", "ms: median (min-max)", "tokens/s", "passes", "tokens a pass", "plain / drafted")


class Case(NamedTuple):
    """One form of sampling: share of right drafts, drafted tokens, and what samples."""

    right: float
    drafted: int
    run: Callable[[], Samples]


def main() -> None:
    """Measure all forms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="nano")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens, at least twice those of an answer")
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--right", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.95, 1.0])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--draws", choices=DRAWS, default="gumbel", help="of the sampler")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the model's config")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    found = measured(cases(options), options)
    print(
        f"{record.machine_line()}; {options.shape}, {options.rows} rows of {options.prompt} + {options.response} tokens"
    )
    print(record.table(HEADS, [row(one, options) for one in found]), f"command: {record.command()}", sep="\n\n")
    facts = {"command": record.command(), "machine": record.machine(), "results": found}
    record.save(options.output, f"drafting-{options.shape}-{options.rows}", facts)


def cases(options: argparse.Namespace) -> list[Case]:
    """Return all forms, for each share the plain one first."""
    lm = language_model(model_config(SHAPES[options.shape], settings(options.set)))
    params = {"network": jax.jit(lm.init)(jax.random.key(0))}
    made = []
    for right in options.right:
        prompts, answers = texts(options, lm.config.vocab_size, right)
        for drafted in (0, *options.drafts):
            sample = functools.partial(sampled, Dictated(lm), params | {"answers": answers}, prompts, drafted, options)
            made.append(Case(right, drafted, sample))
    return made


def texts(options: argparse.Namespace, vocabulary: int, right: float) -> tuple[Prompts, jax.Array]:
    """Return prompts that end with references, and the answers that these are like; the last token stands for EOS."""
    draw, shape = np.random.default_rng(0), (options.rows, options.response)
    answers = draw.integers(0, vocabulary - 1, shape).astype(np.int32)
    other = draw.integers(0, vocabulary - 1, shape)
    reference = np.where(draw.random(shape) < right, answers, other)
    before = draw.integers(0, vocabulary - 1, (options.rows, options.prompt - options.response))
    tokens = np.concatenate([before, reference], axis=1).astype(np.int32)
    marked = np.broadcast_to(np.arange(options.prompt)[None, :] >= options.prompt - options.response, tokens.shape)
    prompts = Prompts(tokens=tokens, mask=np.ones(tokens.shape, bool), reference=marked)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(jnp.asarray, prompts), jnp.asarray(answers)


def sampled(lm: Dictated, params: Params, prompts: Prompts, drafted: int, options: argparse.Namespace) -> Samples:
    """Sample every answer to its last token."""
    last = lm.lm.config.vocab_size - 1
    return jax.block_until_ready(
        generate(
            lm,  # pyright: ignore[reportArgumentType]
            params,
            prompts,
            jax.random.split(jax.random.key(1), options.rows),
            Sampling(temperature=options.temperature, draws=options.draws, draft_tokens=drafted),
            max_new=options.response,
            eos_ids=(last,),
            pad_id=0,
        )
    )


def measured(forms: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each form takes, timed in turn."""
    samples, times = [form.run() for form in forms], [[] for _ in forms]
    for _ in range(options.repeats):
        for form, taken in zip(forms, times, strict=True):
            begin = time.perf_counter()
            form.run()
            taken.append(time.perf_counter() - begin)
    found, plain = [], 0
    for number, (form, drawn) in enumerate(zip(forms, samples, strict=True)):
        plain = plain if form.drafted else number
        np.testing.assert_array_equal(drawn.tokens, samples[plain].tokens)
        later = np.full(options.rows, options.response - 1)
        passes = later if drawn.passes is None else np.asarray(drawn.passes)
        found.append(
            {
                "right": form.right,
                "drafted": form.drafted,
                "seconds": times[number],
                "passes": int(passes.max()),
                "tokens_per_pass": float(later.sum() / passes.sum()),
                "ratio": statistics.median(a / b for a, b in zip(times[plain], times[number], strict=True)),
            }
        )
    return found


def row(found: dict[str, Any], options: argparse.Namespace) -> tuple[str, ...]:
    """Return the cells of one form under `HEADS`."""
    seconds = found["seconds"]
    median = statistics.median(seconds)
    return (
        f"{found['right']:.2f}",
        str(found["drafted"]),
        f"{1e3 * median:.1f} ({1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f})",
        f"{options.rows * options.response / median:,.0f}",
        str(found["passes"]),
        f"{found['tokens_per_pass']:.2f}",
        f"{found['ratio']:.2f} x",
    )


if __name__ == "__main__":
    main()
