"""What to change where a recipe does not fit, and the largest batch and cheapest rematerialisation that do.

Nothing is suggested that has not been compiled.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pit_jax.core.errors import ConfigError, PitError
from pit_jax.models.lora import Lora
from pit_jax.plan.compile import Job, Pool
from pit_jax.plan.report import Suggestion
from pit_jax.plan.topology import Target, larger, resize
from pit_jax.plan.verdict import Planned
from pit_jax.stages.evaluate import Evaluate
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.rl import Rl
from pit_jax.stages.run import Adapters

FROM_CHEAP_TO_SMALL = ("none", "dots", "dots_with_no_batch_dims", "full")
"""Rematerialisation policies: the first compute least, the last keep least."""
_MOST_GROWTH = 3  # a search tries batches up to 2**3 times those of the recipe
_MOST_CUTS = 10
_TENSOR = (2, 4)
_LOG = logging.getLogger(__name__)


def suggest(pool: Pool, recipe: Recipe, programs: Sequence[Planned]) -> tuple[Suggestion, ...]:
    """Return changes that were tried, the last of which fits if any does.

    First what changes nothing that is trained: as many micro-batches as there can be, full rematerialisation, the
    smallest batches of samples; then also a mesh with more tensor parallelism; then also adapters instead of whole
    models; then, as the recipe stands, a machine with twice and four times as many devices.

    Args:
      pool: of the machine.
      recipe: whose mesh is that of the machine.
      programs: all of its programs; those that are out of memory are compiled with each change.
    """
    failed = [program for program in programs if program.out_of_memory]
    tried: list[Suggestion] = []
    for changes, changed in _changes(recipe, {program.stage for program in failed}, pool.machine):
        found = _attempt(pool, changed, failed)
        if found is not None:
            tried.append(Suggestion(changes=changes, programs=found))
            if tried[-1].fits:
                return tuple(tried)
    for machine in (larger(pool.machine, 2), larger(pool.machine, 4)):
        if machine is None:
            continue
        experiment = dataclasses.replace(recipe.experiment, mesh=resize(recipe.experiment.mesh, machine))
        with Pool(machine) as more:
            found = _attempt(more, dataclasses.replace(recipe, experiment=experiment), failed)
        if found is not None:
            tried.append(Suggestion(changes=(f"--topology={machine}",), programs=found))
            if tried[-1].fits:
                break
    return tuple(tried)


def _attempt(pool: Pool, recipe: Recipe, failed: Sequence[Planned]) -> tuple[Planned, ...] | None:
    """Return what becomes of programs in a changed recipe, up to the first that does not fit; None if it is refused."""
    found = []
    try:
        for program in failed:
            if program.name not in pool.programs(recipe, program.stage).programs:
                continue
            found += pool.plan([Job(recipe=recipe, stage=program.stage, program=program.name)])
            if not found[-1].fits:
                break
    except PitError as error:
        _LOG.info("not possible: %s", error)
        return None
    return tuple(found) or None


def _changes(recipe: Recipe, stages: set[str], machine: Target) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    """Yield changed recipes, each with all changes before it, and the changes in words."""
    parts = recipe.experiment.mesh.sizes(machine.devices)
    smallest, words = _finest(recipe, stages, parts["data"] * parts["fsdp"])
    if recipe.experiment.model.remat != "full":
        words.append("remat = 'full'")
        smallest = _with_model(smallest, remat="full")
    if words:
        yield tuple(words), smallest
    for factor in _TENSOR:
        mesh = _more_tensor(recipe, machine, factor)
        if mesh is not None:
            sizes = {name: vars(mesh)[name] for name in ("data", "fsdp", "tensor", "sequence")}
            said = "--mesh=" + ",".join(f"{name}={size}" for name, size in sizes.items())
            changed, finer = _finest(recipe, stages, mesh.data * mesh.fsdp)
            changed = _with_model(_with_experiment(changed, mesh=mesh), remat="full")
            yield (said, *finer, "remat = 'full'"), changed
    base = _base_of(recipe)
    if recipe.experiment.adapters is None and base is not None:
        adapters = Adapters(base=base, lora=Lora(rank=16, alpha=32.0))
        yield (*words, f"--gin_file=stages/lora.gin --gin.BASE={base!r}"), _with_experiment(smallest, adapters=adapters)


def _finest(recipe: Recipe, names: set[str], parts: int) -> tuple[Recipe, list[str]]:
    """Return a recipe whose named stages have the smallest batches that the mesh allows, and the changes."""
    words, stages = [], []
    for stage in recipe.stages:
        if stage.name in names:
            new, said = _finest_stage(stage, parts)
            words += said
            stages.append(new)
        else:
            stages.append(stage)
    return dataclasses.replace(recipe, stages=tuple(stages)), words


def _finest_stage(stage: Any, parts: int) -> tuple[Any, list[str]]:
    if isinstance(stage, Evaluate):
        size = min(stage.batch_size, parts)
        said = [] if size == stage.batch_size else [f"{stage.name}: batch_size = {size}"]
        return dataclasses.replace(stage, batch_size=size), said
    words, finest = [], stage
    for cuts in range(1, _MOST_CUTS):
        cut = scaled(stage, cuts)
        if cut is None or _rows(cut) % parts or not _rows(cut):
            break
        finest = cut
    if finest is not stage:
        words.append(f"{stage.name}: {_batches(finest)}")
    if isinstance(finest, Rl) and finest.training.rollout_batch > parts:
        training = dataclasses.replace(finest.training, rollout_batch=parts)
        finest = dataclasses.replace(finest, training=training)
        words.append(f"{stage.name}: rollout_batch = {parts}")
    return finest, words


def _rows(stage: Any) -> int:
    """Return a number that the rows of a micro-batch are a multiple of."""
    training = stage.training
    if isinstance(stage, Rl):
        return training.contexts * stage.rl.samples_per_prompt // (training.micro_batches * stage.rl.minibatches)
    return training.batch_size // training.micro_batches if training.packing is None else training.packing.rows


def _batches(stage: Any) -> str:
    training = stage.training
    if isinstance(stage, Rl):
        return f"contexts = {training.contexts}, micro_batches = {training.micro_batches}"
    rows = "" if training.packing is None else f", Packing.rows = {training.packing.rows}"
    return f"batch_size = {training.batch_size}, micro_batches = {training.micro_batches}{rows}"


def scaled(stage: Any, cuts: int) -> Any | None:
    """Return a stage with micro-batches 2**cuts times smaller, None where they cannot be cut.

    Below 0 they grow: first there are fewer of them, then the batch grows too.
    """
    training = stage.training
    if cuts >= 0:
        factor = 2**cuts
        changes: dict[str, Any] = {"micro_batches": training.micro_batches * factor}
        if isinstance(stage, Rl):
            even = (training.contexts * stage.rl.samples_per_prompt) % (
                changes["micro_batches"] * stage.rl.minibatches
            ) == 0
        elif training.packing is None:
            even = training.batch_size % changes["micro_batches"] == 0
        else:
            even = training.packing.rows % factor == 0 and training.batch_size % changes["micro_batches"] == 0
            changes["packing"] = dataclasses.replace(training.packing, rows=max(training.packing.rows // factor, 1))
        return dataclasses.replace(stage, training=dataclasses.replace(training, **changes)) if even else None
    factor = 2**-cuts
    fewer = math.gcd(training.micro_batches, factor)
    more = factor // fewer
    changes = {"micro_batches": training.micro_batches // fewer}
    if isinstance(stage, Rl):
        changes["contexts"] = training.contexts * more
    else:
        changes["batch_size"] = training.batch_size * more
        if training.packing is not None:
            changes["packing"] = dataclasses.replace(training.packing, rows=training.packing.rows * factor)
    return dataclasses.replace(stage, training=dataclasses.replace(training, **changes))


def search(pool: Pool, recipe: Recipe, names: Sequence[str], compilations: int) -> tuple[Suggestion, ...]:
    """Return, for each training stage and policy of rematerialisation, the largest micro-batch whose step fits.

    By bisection over powers of two, from the policy that keeps least: what does not fit there fits nowhere. The best of
    a stage, by the estimated time of a record, comes first.

    Args:
      pool: of the machine.
      recipe: whose mesh is that of the machine.
      names: of the stages.
      compilations: most programs to be compiled for each stage.
    """
    found: list[Suggestion] = []
    for stage in recipe.stages:
        if stage.name in names and not isinstance(stage, Evaluate):
            found += _search_stage(pool, recipe, stage, compilations)
    return tuple(found)


def _search_stage(pool: Pool, recipe: Recipe, stage: Any, compilations: int) -> list[Suggestion]:
    end, finest = pool.compilations + compilations, 0
    while finest < _MOST_CUTS and _possible(pool, recipe, scaled(stage, finest + 1)):
        finest += 1
    largest = -_MOST_GROWTH
    ranked: list[tuple[float, Suggestion]] = []
    for policy in reversed(FROM_CHEAP_TO_SMALL):
        best = _bisect(lambda cuts, policy=policy: _step(pool, recipe, stage, cuts, policy), largest, finest, pool, end)
        if best is None:
            break  # what keeps more does not fit either
        cuts, planned = best
        largest = cuts
        changed = scaled(stage, cuts)
        assert changed is not None
        seconds = max(planned.seconds_estimate.values(), default=0.0)
        records = changed.training.contexts if isinstance(changed, Rl) else changed.training.batch_size
        said = (f"{stage.name}: {_batches(changed)}, remat = {policy!r}", f"{seconds / records * 1e3:.3g} ms a record")
        ranked.append((seconds / records, Suggestion(changes=said, programs=(planned,))))
    return [suggestion for _, suggestion in sorted(ranked, key=lambda item: item[0])]


def _possible(pool: Pool, recipe: Recipe, stage: Any | None) -> bool:
    if stage is None:
        return False
    try:
        pool.programs(_with_stage(recipe, stage), stage.name)
    except ConfigError:
        return False
    return True


def _step(pool: Pool, recipe: Recipe, stage: Any, cuts: int, policy: str) -> Planned | None:
    changed = scaled(stage, cuts)
    if changed is None:
        return None
    job = Job(recipe=_with_model(_with_stage(recipe, changed), remat=policy), stage=stage.name, program="step")
    (planned,) = pool.plan([job])
    return planned


def _bisect(
    attempt: Callable[[int], Planned | None], low: int, high: int, pool: Pool, end: int
) -> tuple[int, Planned] | None:
    """Return the least number of cuts in low..high that fits, with its program; None where none was found."""
    best = None
    while low <= high and pool.compilations < end:
        middle = (low + high) // 2
        planned = attempt(middle)
        if planned is not None and planned.fits:
            best, high = (middle, planned), middle - 1
        else:
            low = middle + 1
    return best


def _with_experiment(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, experiment=dataclasses.replace(recipe.experiment, **changes))


def _with_model(recipe: Recipe, **changes: Any) -> Recipe:
    return _with_experiment(recipe, model=dataclasses.replace(recipe.experiment.model, **changes))


def _with_stage(recipe: Recipe, stage: Any) -> Recipe:
    stages = tuple(stage if old.name == stage.name else old for old in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def _more_tensor(recipe: Recipe, machine: Target, factor: int) -> Any | None:
    """Return the mesh with `factor` times more tensor parallelism, taken from fsdp or data; None if it cannot be."""
    sizes = recipe.experiment.mesh.sizes(machine.devices)
    heads = recipe.experiment.model.heads
    for axis in ("fsdp", "data"):
        if sizes[axis] % factor == 0 and sizes["tensor"] * factor <= min(heads, machine.slice_devices):
            changed = {**sizes, axis: sizes[axis] // factor, "tensor": sizes["tensor"] * factor}
            if changed["data"] % machine.slices == 0:
                return dataclasses.replace(recipe.experiment.mesh, **changed)
    return None


def _base_of(recipe: Recipe) -> str | None:
    """Return what adapters could stand on: what the first language model starts from, or that stage itself."""
    for stage in recipe.stages:
        if stage.verb in ("lm", "sft"):
            references = stage.inputs()
            return references[0] if references else stage.name
    return None
