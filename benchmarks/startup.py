"""What a start costs: imports, help, the first step without and with a compilation cache, compiling of each program.

    python benchmarks/startup.py [--recipe recipes/demo.gin [BINDING ...]] [--stage sft_policy] [--compiled rl_policy]
                                 [--tables imports starts compile ahead] [--threads 4] [--runs 3] [--json FILE]

imports: `import pit_jax` and `pit-jax --help`, best of several processes. starts: a stage of the recipe by the command
line, twice in directories of its own, first with an empty compilation cache, then with what that left; seconds from the
start of the process to the end of the first step, to its own end, and compiling. compile: every program of a stage
(`--compiled`), lowered, and compiled by one thread and by a pool of threads, in processes of their own without cache.
ahead: what that means for the first step of three stages, whose programs are compiled by their first calls (0 threads)
or ahead of them (`Experiment.compile_threads`). A binding is `NAME=VALUE`, as of `--gin.NAME=VALUE`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIRST = "first step done after"


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that uses this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | changes


def best_seconds(command: Sequence[str], runs: int) -> float:
    """Return the least wall time of a command."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return min(times)


def imports_table(runs: int) -> dict[str, float]:
    """Measure and print what an import and help cost."""
    bare = best_seconds([sys.executable, "-c", "pass"], runs)
    found = {
        "python alone": bare,
        "import pit_jax": best_seconds([sys.executable, "-c", "import pit_jax"], runs) - bare,
        "pit-jax --help": best_seconds([sys.executable, "-m", "pit_jax", "--help"], runs),
    }
    print(f"\n{'process':20} {'seconds':>8}")
    for name, seconds in found.items():
        print(f"{name:20} {seconds:8.2f}")
    return found


def start(source: Sequence[str], stage: str, directory: Path, cache: Path) -> dict[str, float]:
    """Run a stage and return seconds to the first step, to the end, and of compiling."""
    begin, first = time.perf_counter(), float("nan")
    gin_file, *bindings = source
    command = [
        sys.executable, "-m", "pit_jax", "pipeline", f"--gin_file={gin_file}", f"--gin.MODEL_DIR='{directory}'",
        f"--gin.pipeline.Recipe.stages=[@{stage}/sft.Sft()]", f"--gin.{stage}/Loop.steps=60",
        f"--compilation_cache={cache}", "--gin.synthetic.SyntheticConfig.num_records=3000",
        *(f"--gin.{binding}" for binding in bindings),
    ]  # fmt: skip
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if FIRST in line:
                first = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit("".join(said[-20:]))
    lines = (directory / stage / "metrics.jsonl").read_text().splitlines()
    compiled = sum(json.loads(line).get("timing/compile_seconds", 0.0) for line in lines)
    return {"first step": first, "end": time.perf_counter() - begin, "compiling": compiled}


def starts_table(source: Sequence[str], stage: str) -> dict[str, dict[str, float]]:
    """Measure and print a first and a second start."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        for number, name in enumerate(("empty cache", "filled cache")):
            found[name] = start(source, stage, Path(directory) / str(number), cache)
        files = [path for path in cache.rglob("*-cache")]
        kept = f"{len(files)} programs, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"
    print(f"\n{stage} of {' '.join(source)}, 60 steps; cached: {kept}")
    print(f"{'start':14} {'first step s':>12} {'end s':>8} {'compiling s':>12}")
    for name, row in found.items():
        print(f"{name:14} {row['first step']:12.1f} {row['end']:8.1f} {row['compiling']:12.1f}")
    return found


def compile_all(source: Sequence[str], stage: str, threads: int) -> dict[str, dict[str, float]]:
    """Lower and compile every program of a stage in this process; seconds by program, and altogether.

    As a stage does it: lowered one after the other, each compiled by a thread as soon as it is lowered.
    """
    from pit_jax.cli.gin_config import GinSource, build
    from pit_jax.sharding.mesh import make_mesh
    from pit_jax.stages.programs import stage_programs

    gin_file, *bindings = source
    configured = GinSource(files=(gin_file,), bindings=tuple(bindings), search_paths=(), defaults=())
    recipe = build(configured, "pit_jax.stages.pipeline:Recipe").value
    mesh, table = make_mesh(recipe.experiment.mesh), recipe.experiment.mesh.rules
    chosen = next(one for one in recipe.stages if one.name == stage)
    programs, _ = stage_programs(recipe, chosen, mesh)
    lowering: dict[str, float] = {}
    compiling: dict[str, float] = {}

    def compiled(name: str, lowered: Any) -> None:
        begin = time.perf_counter()
        lowered.compile()
        compiling[name] = time.perf_counter() - begin

    begin, busy = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        futures = []
        for program in programs:
            before = time.perf_counter()
            lowered = program.lower(mesh, table)
            lowering[program.name] = time.perf_counter() - before
            futures.append(pool.submit(compiled, program.name, lowered))
        for future in futures:
            future.result()
    whole = {"altogether": time.perf_counter() - begin, "processors": time.process_time() - busy}
    return {"lowering": lowering, "compiling": compiling, "whole": whole}


def compile_table(source: Sequence[str], stage: str, threads: Sequence[int]) -> dict[str, Any]:
    """Measure and print compiling, one after the other and in threads."""
    found: dict[str, Any] = {}
    for count in threads:
        command = [sys.executable, __file__, f"--compiled={stage}", f"--only_compile={count}", "--recipe", *source]
        switched_off = environment(JAX_ENABLE_COMPILATION_CACHE="false")
        done = subprocess.run(command, env=switched_off, check=True, stdout=subprocess.PIPE, text=True)
        found[f"{count} thread{'s' * (count > 1)}"] = json.loads(done.stdout.splitlines()[-1])
    print(f"\ncompiling {stage} of {' '.join(source)}; seconds")
    print(f"{'program':34} {'lowering':>10} " + " ".join(f"{name:>10}" for name in found))
    lowering = next(iter(found.values()))["lowering"]
    for name, seconds in lowering.items():
        each = " ".join(f"{one['compiling'][name]:10.1f}" for one in found.values())
        print(f"{name:34} {seconds:10.1f} {each}")
    for name in ("altogether", "processors"):  # seconds of processors show what a machine that is busy hides
        each = " ".join(f"{one['whole'][name]:10.1f}" for one in found.values())
        print(f"{name:34} {sum(lowering.values()):10.1f} {each}")
    return found


AHEAD = ("sft_policy", "reward_bt", "rl_policy")
"""Stages of the recipe that are trained for two steps each."""


def ahead_table(source: Sequence[str], threads: Sequence[int], runs: int) -> dict[str, list[dict[str, float]]]:
    """Measure and print seconds to the first step of each stage, programs compiled by their calls and ahead."""
    found: dict[str, list[dict[str, float]]] = {str(count): [] for count in (0, *threads)}
    for _ in range(runs):
        for count in found:
            with tempfile.TemporaryDirectory() as directory:
                found[count].append(first_steps(source, Path(directory), int(count)))
    print(f"\nseconds to the first step, {' '.join(source)}, empty cache; least of {runs}")
    print(f"{'stage':14} " + " ".join(f"{f'{count} threads':>10}" for count in found))
    for stage in AHEAD:
        print(f"{stage:14} " + " ".join(f"{min(one[stage] for one in rows):10.1f}" for rows in found.values()))
    return found


def first_steps(source: Sequence[str], directory: Path, threads: int) -> dict[str, float]:
    """Train two steps of each stage in a process of its own and return when the first of each was done."""
    gin_file, *bindings = source
    kinds = {"sft_policy": "sft.Sft", "reward_bt": "reward.Reward", "rl_policy": "rl.Rl"}
    stages = ", ".join(f"@{stage}/{kinds[stage]}()" for stage in AHEAD)
    small = [
        "optim.Optimizer.warmup_steps=0", "rl_policy/optim.Optimizer.warmup_steps=0", "loop.Loop.steps=2",
        "sft_policy/loop.Loop.steps=2", "reward_bt/loop.Loop.steps=2", "rlhf/curriculum.Round.steps=2",
        "rl_policy/rl.Rl.snapshots=()", "rl.RlTraining.judge_every=0", "supervised.Training.evaluation_records=64",
        "reward.Reward.report_records=64", "synthetic.SyntheticConfig.num_records=3000",
    ]  # fmt: skip
    settings = [f"pipeline.Recipe.stages=[{stages}]", f"run.Experiment.compile_threads={threads}", *small, *bindings]
    command = [sys.executable, "-m", "pit_jax", "pipeline", f"--gin_file={gin_file}", "--compilation_cache=off"]
    command += [f"--gin.MODEL_DIR='{directory / 'run'}'", *(f"--gin.{setting}" for setting in settings)]
    done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    seconds = {}
    for stage in AHEAD:
        first = json.loads((directory / "run" / stage / "metrics.jsonl").read_text().splitlines()[0])
        seconds[stage] = first["timing/first_step_seconds"]
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["recipes/demo.gin"], help="on the synthetic set, and bindings")
    parser.add_argument("--stage", default="sft_policy", help="an SFT stage of the recipe")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tables", nargs="+", default=["imports", "starts", "compile", "ahead"])
    parser.add_argument("--compiled", default="rl_policy", help="a stage of the recipe")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1], help="that compile")
    parser.add_argument("--only_compile", type=int, help="only compile, with so many threads, and print JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.only_compile:
        print(json.dumps(compile_all(args.recipe, args.compiled, args.only_compile)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    tables = {
        "imports": lambda: imports_table(args.runs),
        "starts": lambda: starts_table(args.recipe, args.stage),
        "compile": lambda: compile_table(args.recipe, args.compiled, sorted({1, *args.threads})),
        "ahead": lambda: ahead_table(args.recipe, args.threads, args.runs),
    }
    figures = {name: tables[name]() for name in args.tables}
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
