"""The verb `plan`: does a recipe fit on a machine, and what does it cost there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from pit_jax.cli.stages import build_recipe
from pit_jax.core.errors import ConfigError, nearest
from pit_jax.plan import advice
from pit_jax.plan.compile import CompilerError, Job, Pool
from pit_jax.plan.report import Plan, Suggestion, show
from pit_jax.plan.topology import Target, check_devices, parse_mesh, resize, target
from pit_jax.stages.pipeline import Recipe

DOES_NOT_FIT = 3
_DEFAULTS = tuple(
    f"{name}='planned/{name.lower()}'"
    for name in ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TOKENIZER", "TEXT_PATH", "DATA_PATH", "HH_PATH", "BASE")
) + ("MIXTURE_OR_TASK_NAME='planned'", "MIXTURE_OR_TASK_MODULE='planned'")


def plan(args: argparse.Namespace) -> None:
    """`pit-jax plan`: compile every program of a recipe for a machine that need not be there.

    Ends with status 3 where something does not fit.
    """
    recipe, text = build_recipe(args, defaults=_DEFAULTS)
    if args.print_config:
        print(text)
        return
    machine = target(args.topology, args.slices)
    recipe, remarks = _on(recipe, machine, args.mesh)
    names = _stages(recipe, args.stage)
    with Pool(machine) as pool:
        jobs = []
        for name in names:
            listed = pool.programs(recipe, name)
            remarks += listed.remarks
            jobs += [Job(recipe=recipe, stage=name, program=program) for program in listed.programs]
        programs = tuple(pool.plan(jobs))
        suggestions: tuple[Suggestion, ...] = ()
        if args.search:
            suggestions = advice.search(pool, recipe, names, args.compilations)
        elif args.suggest and any(program.out_of_memory for program in programs):
            suggestions = advice.suggest(pool, recipe, programs)
    result = Plan(
        machine=machine,
        mesh=check_devices(recipe.experiment.mesh, machine),
        programs=programs,
        remarks=tuple(dict.fromkeys(remarks)),
        suggestions=suggestions,
    )
    if args.json:
        json.dump(result.to_json(), sys.stdout, indent=1)
        print()
    else:
        show(result)
    sys.stdout.flush()
    broken = [program for program in programs if not program.fits and not program.out_of_memory]
    if broken:
        raise CompilerError(f"Not compiled: {broken[0].stage} / {broken[0].name}: {broken[0].problem}")
    if not result.fits:
        raise SystemExit(DOES_NOT_FIT)


def _on(recipe: Recipe, machine: Target, mesh: str | None) -> tuple[Recipe, list[str]]:
    """Return a recipe with its mesh resized to a machine, or as `--mesh` says, and remarks on its settings."""
    experiment, remarks = recipe.experiment, []
    sizes = resize(experiment.mesh, machine) if mesh is None else parse_mesh(mesh, experiment.mesh)
    check_devices(sizes, machine)
    if not experiment.model.scan_layers:
        remarks.append("scan_layers is off: every layer is compiled, which takes long for a deep model.")
    return dataclasses.replace(recipe, experiment=dataclasses.replace(experiment, mesh=sizes)), remarks


def _stages(recipe: Recipe, names: list[str]) -> list[str]:
    known = [stage.name for stage in recipe.stages]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"There is no stage {name!r} in the recipe, which has {', '.join(known)}.{nearest(name, known)}"
            )
    return [name for name in known if not names or name in names]
