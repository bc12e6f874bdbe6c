"""Versions of what a run stands on, and the pairs of them that do not work together."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import pit_jax
from pit_jax.doctor.report import Check, ok, problem, warning

NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "array-record", "tensorstore")
"""Distributions that every run needs."""

OPTIONAL: Mapping[str, str] = {
    "gin-config": "recipes (--gin_file)",
    "seqio": "live SeqIO tasks",
    "tensorflow": "live SeqIO tasks",
    "tensorflow-datasets": "TensorFlow Datasets",
    "libtpu": "TPUs, and planning for them",
    "jax-cuda12-plugin": "NVIDIA GPUs",
    "jax-cuda13-plugin": "NVIDIA GPUs",
}
"""Distributions that some runs need, and what for."""

EXTRAS: Mapping[str, str] = {"libtpu": "tpu", "jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}
"""Extra of jax whose requirements hold where this distribution is installed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadPair:
    """Two version ranges that do not work together although the packages' own requirements allow them."""

    first: str
    second: str
    why: str
    fix: str


BAD_PAIRS = (
    BadPair(
        first="jax>=0.11.1",
        second="flax<=0.12.8",
        why="flax up to 0.12.8 cannot be imported with jax 0.11.1 or newer",
        fix="pip install 'flax>=0.12.9' (needs Python 3.12), or 'jax<0.11'.",
    ),
    BadPair(
        first="jax-cuda12-plugin>=0",
        second="jax-cuda13-plugin>=0",
        why="two CUDA plugins of jax claim the same GPUs",
        fix="pip uninstall the one that does not fit the driver (nvidia-smi shows its CUDA version).",
    ),
)


def installed() -> dict[str, str]:
    """Return the versions of those distributions that are installed here, by name."""
    found = {"python": platform.python_version(), "pit_jax": pit_jax.__version__}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def requirements(versions: Mapping[str, str]) -> Iterator[tuple[str, Requirement]]:
    """Yield (who, what it requires) for every installed distribution of the tables, of those of the tables."""
    names = {canonicalize_name(name) for name in (*NEEDED, *OPTIONAL)}
    for who in ("pit_jax", *NEEDED, *OPTIONAL):
        if who not in versions:
            continue
        try:
            lines = metadata.requires(who) or []
        except metadata.PackageNotFoundError:  # pit_jax on the path, not installed
            continue
        extras = ["", *(extra for plugin, extra in EXTRAS.items() if who == "jax" and plugin in versions)]
        for line in lines:
            requirement = Requirement(line)
            holds = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
            if holds and canonicalize_name(requirement.name) in names:
                yield who, requirement


def check_versions(versions: Mapping[str, str]) -> list[Check]:
    """Return what there is, what is missing, and which versions do not fit together."""
    names = " ".join(f"{name} {version}" for name, version in versions.items())
    checks = [ok("versions", names)]
    missing = [name for name in NEEDED if name not in versions]
    if missing:
        fix = "Install what pit_jax needs: pip install pit_jax, or pip install -r requirements/core.txt."
        checks.append(problem("packages", f"missing: {', '.join(missing)}", fix))
    absent = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in versions]
    if absent:
        checks.append(ok("optional packages", f"not installed: {', '.join(absent)}"))
    checks += _unmet(versions)
    checks += [
        problem("versions", f"{pair.why} ({names_of(pair, versions)})", pair.fix)
        for pair in BAD_PAIRS
        if _applies(pair.first, versions) and _applies(pair.second, versions)
    ]
    return checks


def _unmet(versions: Mapping[str, str]) -> Iterator[Check]:
    """Yield a problem for every requirement that a package states about another and that does not hold."""
    by_name = {canonicalize_name(name): version for name, version in versions.items()}
    for who, requirement in requirements(versions):
        version = by_name.get(canonicalize_name(requirement.name))
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found = f"{who} {versions[who]} needs {requirement.name}{requirement.specifier}, and {version} is installed"
            yield problem("versions", found, f"pip install '{requirement.name}{requirement.specifier}'")


def _applies(pattern: str, versions: Mapping[str, str]) -> bool:
    requirement = Requirement(pattern)
    version = versions.get(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def names_of(pair: BadPair, versions: Mapping[str, str]) -> str:
    """Return the two installed versions of a bad pair, for example "jax 0.11.2, flax 0.12.8"."""
    names = [Requirement(pattern).name for pattern in (pair.first, pair.second)]
    return ", ".join(f"{name} {versions[name]}" for name in names)


def check_python(version: str, supported: str) -> Check:
    """Compare Python's version with the range that pit_jax supports."""
    if SpecifierSet(supported).contains(version, prereleases=True):
        return ok("python", version)
    return warning(
        "python", f"{version} (pit_jax supports {supported})", "Make an environment with Python 3.11 or 3.12."
    )


def differing(hosts: Mapping[int, Mapping[str, str]]) -> list[Check]:
    """Compare the versions of all hosts with those of process 0, and name who differs in what."""
    first = hosts[0]
    found = []
    for host, versions in hosts.items():
        for name in sorted({*first, *versions}):
            mine, theirs = versions.get(name, "not installed"), first.get(name, "not installed")
            if mine != theirs:
                found.append(f"{name}: process {host} has {mine}, process 0 {theirs}")
    if found:
        return [problem("same versions", "; ".join(found), "Install the same environment on every host.")]
    return [ok("same versions", f"on all {len(hosts)} hosts")] if len(hosts) > 1 else []
