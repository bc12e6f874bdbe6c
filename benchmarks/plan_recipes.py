"""The tables of docs/scaling.md: the improver's RL of an 11B encoder-decoder and a 27B decoder, planned for TPU slices.

    python benchmarks/plan_recipes.py                 the verdicts: each recipe, whole and adapters, on three slices
    python benchmarks/plan_recipes.py --details       every program of the two layouts that the page describes
    python benchmarks/plan_recipes.py --output DIR    also keep the planner's JSON

Needs libtpu and no TPU. Plans that are in DIR already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = ("pit_t5_xxl", "pit_gemma3_27b")
SLICES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
DETAILS = (("pit_gemma3_27b", "v5p:4x8x8"), ("pit_t5_xxl", "v5e:16x16"))
GIB = 2**30


def plan(recipe: str, machine: str, form: str, output: pathlib.Path | None) -> dict[str, Any]:
    """Return the planner's JSON of the improver's RL; `form` is "whole" or "adapters"."""
    kept = None if output is None else output / f"{recipe}-{machine.replace(':', '-')}-{form}.json"
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())
    command = [
        sys.executable, "-m", "pit_jax", "plan", f"--gin_file=recipes/{recipe}.gin", f"--topology={machine}",
        "--stage=rl_improver", "--json", "--no-suggest",
    ]  # fmt: skip
    if form == "adapters":
        command += ["--gin_file=stages/lora.gin", "--gin.BASE='start/weights'"]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}.")
    made = json.loads(done.stdout) | {"wall_seconds": time.monotonic() - start}
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(made))
    return made


def verdict(recipe: str, machine: str, form: str, made: dict[str, Any]) -> str:
    """Return the line of one plan."""
    top = max(made["programs"], key=lambda program: program["memory_bytes_per_chip"] or 0)
    mesh = ", ".join(f"{axis} {size}" for axis, size in made["mesh"].items() if size > 1)
    # Programs that are the same were compiled once, and show the same time.
    busy = sum({p["compile_processor_seconds"] for p in made["programs"]})
    cells = (
        recipe, form, machine, mesh, "fits" if made["fits"] else "does not fit", top["name"],
        f"{top['memory_bytes_per_chip'] / GIB:.2f} of {top['available_bytes_per_chip'] / GIB:.2f}",
        f"{busy:.0f}", f"{made['wall_seconds']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def details(made: dict[str, Any]) -> str:
    """Return the table of one plan's programs."""
    lines = [
        "| program | memory, GiB | arguments | temporaries | other arrays | TFLOP | GB moved | GB sent | at least |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for program in made["programs"]:
        sent: dict[str, float] = {}
        for entry in program["collectives"]:
            name = f"{entry['kind']} {entry['axes']}"
            sent[name] = sent.get(name, 0.0) + entry["wire_bytes"] / 1e9
        shown = sorted(((size, name) for name, size in sent.items() if size >= sum(sent.values()) / 50), reverse=True)
        sizes = [program[f"{part}_bytes"] for part in ("arguments", "temporaries", "resident")]
        least = max(program["estimated_seconds_by"].items(), key=lambda item: item[1], default=("", 0.0))
        cells = (
            program["name"], f"{program['memory_bytes_per_chip'] / GIB:.2f}",
            *("?" if size is None else f"{size / GIB:.2f}" for size in sizes),
            f"{program['flops_per_chip'] / 1e12:.3g}", f"{(program['bytes_accessed_per_chip'] or 0) / 1e9:.3g}",
            ", ".join(f"{name} {size:.3g}" for size, name in shown), f"{least[1]:.3g} s ({least[0]})",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--details", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.details:
        for recipe, machine in DETAILS:
            print(f"\n{recipe} on {machine}\n\n{details(plan(recipe, machine, 'whole', args.output))}", flush=True)
        return
    print("| recipe | form | slice | mesh | verdict | largest program | GiB a chip | CPU s | wall s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe in RECIPES:
        for form in ("whole", "adapters"):
            for machine in SLICES:
                print(verdict(recipe, machine, form, plan(recipe, machine, form, args.output)), flush=True)


if __name__ == "__main__":
    main()
