"""From arguments to a measurement of the product's own programs, printed and written."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.speed import ceilings, options, product, record
from benchmarks.speed.clock import Laps
from benchmarks.speed.record import Record
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work, rollout_floor
from pit_jax.stages.run import Run
from pit_jax.train.window import Compilation

Phases = Mapping[str, list[float]]


def main(kind: str, description: str | None) -> None:
    """Measure the work of a name in `work.WORKS` as the command line says; print a table and write JSON."""
    parser = options.parser(description)
    for name, what in (
        ("set", "the model's config"),
        ("stage", "the stage; of RlConfig (rl), of the sampler or of Sampling (rollout)"),
        ("training", "the stage's training, such as micro_batches=4"),
    ):
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="FIELD=VALUE", help=f"fields of {what}")
    parser.add_argument("--no_ceilings", action="store_true", help="do not measure what the machine can do")
    parser.add_argument("--devices", type=int, default=1, help="that share the rows (axis data); on a CPU fake ones")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    shape, work = options.asked(arguments, kind)
    found = measure(arguments, shape, work)
    if not arguments.no_ceilings and not work.mean_length:
        found = against_ceilings(found)
    record.save(
        arguments.output, f"{kind}-{shape.name}-pit_jax{arguments.variant and '-'}{arguments.variant}", found.to_json()
    )
    print(report(found))


def measure(arguments: argparse.Namespace, shape: Shape, work: Work) -> Record:
    """Run the steps of one work in this process."""
    config = product.model_config(shape, options.settings(arguments.set))
    laps = Laps(warmup=arguments.warmup)
    with Compilation() as compilation, product.made_up_run(config, work, arguments.devices) as run:
        if work.kind == "rollout":
            phases, extra = _rollouts(run, work, laps, arguments)
        else:
            changes = product.Changes(options.settings(arguments.stage), options.settings(arguments.training))
            make = product.reinforced if work.kind == "rl" else product.supervised
            step = product.Stepper(make(run, work, changes))
            phases, extra = _steps(step, laps, arguments.steps), {}
        return record.of_laps(
            laps,
            work=work,
            shape=shape,
            by="pit_jax",
            variant=arguments.variant,
            device=jax.devices()[0].device_kind,
            device_memory=product.device_memory(),
            phases={name: statistics.median(seconds[laps.warmup :]) for name, seconds in phases.items()},
            extra=extra | {"compiling": compilation.read(), "model": dataclasses.asdict(config)},
            versions=record.versions("jax", "jaxlib", "flax", "numpy"),
        )


def _steps(step: product.Stepper, laps: Laps, count: int) -> Phases:
    """Time steps of a program, and collect what each says its phases took."""
    phases: dict[str, list[float]] = {}

    def advance() -> None:
        for name, seconds in step().items():
            phases.setdefault(name, []).append(seconds)

    laps.repeat(advance, count)
    return phases


def _rollouts(run: Run, work: Work, laps: Laps, arguments: argparse.Namespace) -> tuple[Phases, dict[str, Any]]:
    """Time rollouts, and rollouts of one token: what is left of a rollout without it is decoding."""
    rollouts = product.Rollouts(run, work, options.settings(arguments.stage))
    lengths = []

    def one() -> None:
        lengths.append(int(rollouts().samples.mask.sum()))

    laps.repeat(one, arguments.steps)
    if not work.mean_length and set(lengths) != {work.tokens}:
        raise SystemExit(f"rollouts must have {work.tokens} tokens and have {sorted(set(lengths))}")
    rollouts.sampler = dataclasses.replace(rollouts.sampler, max_new=1)
    prefill = [_seconds(rollouts) for _ in laps.seconds]
    decode = [whole - statistics.median(prefill[laps.warmup :]) for whole in laps.seconds]
    return {"prefill": prefill, "decode": decode}, {"tokens": statistics.mean(lengths[laps.warmup :])}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def against_ceilings(found: Record) -> Record:
    """Return the record with the machine's ceilings and the shares of them that were reached.

    `mfu` is of the chip's stated peak where there is one, else of the measured products; `roofline` of a rollout is
    the floor of prefill and decoding (`work.rollout_floor`) over the time it took, `roofline_decode` of decoding alone.
    """
    limits = ceilings.measure(found.shape)
    assert found.flops is not None
    extra = {"ceilings": limits._asdict(), "mfu": found.flops / (limits.peak or limits.matmul)}
    if found.work.kind == "rollout":
        prefill, decode = rollout_floor(found.shape, found.work, matmul=limits.matmul, bandwidth=limits.copy)
        extra["roofline"] = (prefill + decode) / found.median
        extra["roofline_decode"] = decode / found.phases["decode"]
    return dataclasses.replace(found, extra={**found.extra, **extra})


def report(found: Record) -> str:
    """Return the table of one record, with its phases, shares, command and machine."""
    lines = [record.table(record.HEADS, [record.row(found)])]
    phases = dict(found.phases)
    if phases:
        spent = (f"{name} {value:.3f} s ({value / found.median:.0%})" for name, value in phases.items())
        lines.append("phases: " + ", ".join(spent))
    lines.append(f"first step {found.first_step:.1f} s; compiling took {found.extra['compiling']:.1f} s in all")
    shares = {name: found.extra[name] for name in ("mfu", "roofline", "roofline_decode") if name in found.extra}
    if shares:
        limits = found.extra["ceilings"]
        lines.append(
            f"ceilings: products {limits['matmul'] / 1e9:,.0f} GFLOP/s, copies {limits['copy'] / 1e9:,.1f} GB/s; "
            + ", ".join(f"{name} {value:.1%}" for name, value in shares.items())
        )
    lines += [f"command: {record.command()}", f"machine: {record.machine_line()}; {found.device}"]
    return "\n".join(lines)
