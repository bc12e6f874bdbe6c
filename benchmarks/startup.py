"""What a start costs: imports, help, the first step without and with a compilation cache, compiling of each program.

    python benchmarks/startup.py [--gin_file recipes/demo.gin] [--stage sft_policy] [--compiled rl_policy] [--runs 3]

The first table: `import pit_jax` and `pit-jax --help`, best of several processes. The second: a stage of the recipe by
the command line, twice in directories of its own, first with an empty compilation cache, then with what that left;
seconds from the start of the process to the end of the first step, to its own end, and compiling. The third: every
program of a stage (`--compiled`), compiled one after the other and by a pool of threads, in processes of their own
without cache: whether threads pay here. `--json FILE` writes the figures.
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


def start(gin_file: str, stage: str, directory: Path, cache: Path) -> dict[str, float]:
    """Run a stage and return seconds to the first step, to the end, and of compiling."""
    begin, first = time.perf_counter(), float("nan")
    command = [
        sys.executable, "-m", "pit_jax", "pipeline", f"--gin_file={gin_file}", f"--gin.MODEL_DIR='{directory}'",
        f"--gin.pipeline.Recipe.stages=[@{stage}/sft.Sft()]", f"--gin.{stage}/Loop.steps=60",
        f"--compilation_cache={cache}", "--gin.synthetic.SyntheticConfig.num_records=3000",
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


def starts_table(gin_file: str, stage: str) -> dict[str, dict[str, float]]:
    """Measure and print a first and a second start."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        for number, name in enumerate(("empty cache", "filled cache")):
            found[name] = start(gin_file, stage, Path(directory) / str(number), cache)
        files = [path for path in cache.rglob("*-cache")]
        kept = f"{len(files)} programs, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"
    print(f"\n{stage} of {gin_file}, 60 steps; cached: {kept}")
    print(f"{'start':14} {'first step s':>12} {'end s':>8} {'compiling s':>12}")
    for name, row in found.items():
        print(f"{name:14} {row['first step']:12.1f} {row['end']:8.1f} {row['compiling']:12.1f}")
    return found


def compile_all(gin_file: str, stage: str, threads: int) -> dict[str, float]:
    """Compile every program of a stage in this process; seconds by program, and altogether."""
    from pit_jax.cli.gin_config import GinSource, build
    from pit_jax.sharding.mesh import make_mesh
    from pit_jax.stages.programs import Program, stage_programs

    source = GinSource(files=(gin_file,), bindings=(), search_paths=(), defaults=())
    recipe = build(source, "pit_jax.stages.pipeline:Recipe").value
    mesh, table = make_mesh(recipe.experiment.mesh), recipe.experiment.mesh.rules
    chosen = next(one for one in recipe.stages if one.name == stage)
    programs, _ = stage_programs(recipe, chosen, mesh)
    found: dict[str, float] = {}

    def compiled(program: Program) -> None:
        begin = time.perf_counter()
        program.lower(mesh, table).compile()
        found[program.name] = time.perf_counter() - begin

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compiled, programs))
    return found | {"altogether": time.perf_counter() - begin}


def compile_table(gin_file: str, stage: str) -> dict[str, dict[str, float]]:
    """Measure and print compiling, one after the other and in threads."""
    found = {}
    for threads in (1, os.cpu_count() or 1):
        command = [sys.executable, __file__, f"--gin_file={gin_file}", f"--compiled={stage}", f"--threads={threads}"]
        switched_off = environment(JAX_ENABLE_COMPILATION_CACHE="false")
        done = subprocess.run(command, env=switched_off, check=True, capture_output=True, text=True)
        found[f"{threads} threads"] = json.loads(done.stdout.splitlines()[-1])
    one, many = found.values()
    print(f"\ncompiling {stage} of {gin_file}\n{'program':34} " + " ".join(f"{name:>12}" for name in found))
    for name in one:
        print(f"{name:34} {one[name]:10.1f} s {many[name]:10.1f} s")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", default="recipes/demo.gin", help="a recipe on the synthetic set")
    parser.add_argument("--stage", default="sft_policy", help="an SFT stage of the recipe")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tables", nargs="+", default=["imports", "starts", "compile"])
    parser.add_argument("--compiled", default="rl_policy", help="a stage of the recipe")
    parser.add_argument("--threads", type=int, help="only compile, with so many threads, and print JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        print(json.dumps(compile_all(args.gin_file, args.compiled, args.threads)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    tables = {
        "imports": lambda: imports_table(args.runs),
        "starts": lambda: starts_table(args.gin_file, args.stage),
        "compile": lambda: compile_table(args.gin_file, args.compiled),
    }
    figures = {name: tables[name]() for name in args.tables}
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
