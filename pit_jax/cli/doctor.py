"""`pit-jax doctor`: look at everything a run needs before it costs anything, and say what to do."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from pit_jax.cli import environment
from pit_jax.core.errors import PitError
from pit_jax.doctor import machine, probe, report, versions
from pit_jax.doctor.report import Check, problem

if TYPE_CHECKING:
    from pit_jax.sharding.mesh import MeshConfig

SUPPORTED_PYTHON = ">=3.11,<3.13"


class ProblemsFound(PitError):
    """The doctor found problems; the report has said which."""


def doctor(args: argparse.Namespace) -> None:
    """`pit-jax doctor`: print the report; on several hosts, process 0 prints for all.

    Raises:
      ProblemsFound: there are problems on this host, or between the hosts.
      ConfigError: a flag is wrong, or what is said of the other hosts.
    """
    cluster = environment.cluster(args)
    mesh, directory, checks = _recipe(args)
    here = versions.installed()
    local = [*checks, *look(here)]
    storage = probe.Findings(checks=())
    if directory is not None:
        storage = probe.run({"kind": "storage", "directory": directory}, args.timeout)
    written = all(check.status != "problem" for check in storage.checks)
    request = {
        "kind": "devices",
        "cluster": None if cluster is None else dataclasses.asdict(cluster),
        "mesh": None if mesh is None else dataclasses.asdict(mesh),
        "storage": directory if written else None,
        "accelerators": dataclasses.asdict(machine.find_accelerators()),
        "versions": here,
        "checks": [dataclasses.asdict(check) for check in (*local, *storage.checks)],
        "timeout": args.timeout,
    }
    # The hosts wait for each other for `timeout`; who is missing is to be said before the probe is given up.
    devices = probe.run(request, args.timeout * 1.5 + 30)
    found = (*local, *storage.checks, *devices.checks)
    if devices.process == 0:
        _print(found, args.json)
    problems = report.count(found, "problem")
    if problems:
        raise ProblemsFound(f"{problems} problem{'s' * (problems > 1)} found; the report says what to do.")


def look(here: dict[str, str]) -> list[Check]:
    """Return what can be found on this host without jax."""
    there = machine.find_accelerators()
    return [
        versions.check_python(here["python"], SUPPORTED_PYTHON),
        *versions.check_versions(here),
        *machine.check_platform(there, here, os.environ),
        *machine.check_tensorflow(there, here, os.environ),
        *machine.check_limits(there),
        *machine.check_memory(there),
        *machine.check_folders(os.environ.get("JAX_COMPILATION_CACHE_DIR")),
        machine.check_encoding(),
    ]


def _recipe(args: argparse.Namespace) -> tuple[MeshConfig | None, str | None, list[Check]]:
    """Return mesh and storage to be looked at, from the flags or else the recipe, and what kept it from being read."""
    from pit_jax.plan.topology import parse_mesh
    from pit_jax.sharding.mesh import MeshConfig

    mesh = None if args.mesh is None else parse_mesh(args.mesh, MeshConfig())
    if not args.gin_file and not args.gin_bindings:
        return mesh, args.model_dir, []
    try:
        from pit_jax.cli.stages import build_recipe

        recipe, _ = build_recipe(args)
    except PitError as error:
        fix = "Mend the recipe or the flags; everything else was looked at."
        return mesh, args.model_dir, [problem("recipe", str(error), fix)]
    return mesh or recipe.experiment.mesh, args.model_dir or recipe.model_dir, []


def _print(checks: tuple[Check, ...], as_json: bool) -> None:
    if as_json:
        print(report.as_json(checks))
        return
    report.print_table(checks, Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False))
