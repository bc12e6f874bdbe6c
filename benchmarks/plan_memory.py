"""The planner's memory against what a process really takes: programs of over 1 GB of three recipes, on this CPU.

    python benchmarks/plan_memory.py

For each case the program is compiled and then run once in a process of its own. Measured is the growth of that
process's resident memory from before its arguments exist to the peak of the run (VmHWM, reset before). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
MIB = 2**20


class Case(NamedTuple):
    """One program of a recipe, with settings that make it larger than 1 GB."""

    recipe: str
    stage: str
    program: str
    bindings: tuple[str, ...]


CASES = (
    Case("demo", "sft_improver", "step", ("sft_improver/supervised.Training.batch_size=16384",)),
    Case("demo_t5", "reward_gap", "step", ("reward_gap/supervised.Training.batch_size=2048",)),
    Case(
        "hh_small", "rl_improver", "step",
        ("rl.RlTraining.contexts=64", "rl.RlTraining.micro_batches=1", "HH_PATH='none'", "TEXT_PATH='none'",
         "TOKENIZER='bytes'"),
    ),
    Case("hh_small", "pretrain", "held-out loss", ("pretrain/supervised.Training.batch_size=512", "HH_PATH='none'",
                                                  "TEXT_PATH='none'", "TOKENIZER='bytes'")),
)  # fmt: skip


def recipe_of(case: Case) -> Any:
    """Return the recipe of a case."""
    from pit_jax.cli.gin_config import GinSource, build
    from pit_jax.cli.stages import ROOT as RECIPE

    return build(GinSource(files=(f"recipes/{case.recipe}.gin",), bindings=case.bindings), RECIPE).value


def predicted(case: Case) -> dict[str, Any]:
    """Return what the planner says of the case."""
    import dataclasses

    from pit_jax.plan.compile import Job, Pool
    from pit_jax.plan.topology import resize, target

    machine, recipe = target("cpu"), recipe_of(case)
    experiment = dataclasses.replace(recipe.experiment, mesh=resize(recipe.experiment.mesh, machine))
    recipe = dataclasses.replace(recipe, experiment=experiment)
    with Pool(machine) as pool:
        (planned,) = pool.plan([Job(recipe=recipe, stage=case.stage, program=case.program)])
    return planned.to_json()


def measure(case: Case) -> int:
    """Return the bytes by which this process grows when it runs the case's program."""
    import jax
    import jax.numpy as jnp

    from pit_jax.sharding.mesh import MeshConfig, make_mesh
    from pit_jax.stages.programs import stage_programs

    recipe, mesh = recipe_of(case), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    stage = next(stage for stage in recipe.stages if stage.name == case.stage)
    programs, _ = stage_programs(recipe, stage, mesh)
    program = next(program for program in programs if program.name == case.program)
    compiled = program.lower(mesh, recipe.experiment.mesh.rules).compile()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM is now what is resident at this moment
    before = status("VmRSS")

    def make(leaf: Any) -> Any:
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = jax.random.key(0) if key else jnp.zeros(leaf.shape, leaf.dtype)
        return value if leaf.sharding is None else jax.device_put(value, leaf.sharding)

    result = compiled(*jax.tree.map(make, program.arguments))
    jax.block_until_ready(result)
    return status("VmHWM") - before


def status(field: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This needs Linux's /proc.")


def main() -> None:
    """Print a line for every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.run is not None:
        print(json.dumps(measure(CASES[args.run])))
        return
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    print("| recipe | stage / program | predicted, MiB | measured, MiB | predicted / measured |\n|---|---|---|---|---|")
    for number, case in enumerate(CASES):
        plan = predicted(case)["memory_bytes_per_chip"]
        done = subprocess.run(
            [sys.executable, __file__, f"--run={number}"], env=environment, check=True, capture_output=True, text=True
        )
        grown = int(done.stdout)
        name = f"{case.stage} / {case.program}"
        print(f"| {case.recipe} | {name} | {plan / MIB:.0f} | {grown / MIB:.0f} | {plan / grown:.2f} |", flush=True)


if __name__ == "__main__":
    main()
