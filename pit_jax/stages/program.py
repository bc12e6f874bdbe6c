"""A compiled program as shapes: what is needed to compile it without data, weights or devices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pit_jax.core.errors import invalid
from pit_jax.core.types import Conditional, Params, Prompts
from pit_jax.decode import loop, refill
from pit_jax.decode.batches import Sampler, Scorer, batch_scores
from pit_jax.models.api import ConditionalLM
from pit_jax.models.trained import language_model_of, reconfigured
from pit_jax.sharding import rules
from pit_jax.sharding.place import batch_shardings, replicated, row_parts
from pit_jax.train.compiling import When


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One compiled program of a stage.

    name: unique in its stage.
    function: jitted; `function.lower(*arguments)` compiles it. arguments: trees of shapes with their places, of small
      arrays, and of what is static.
    trips: of a loop whose length shows only when it runs (sampling ends with the longest answer): the most there are.
    residents: further arrays that are on the devices while it runs. What is also among the arguments, the very same
      leaf, counts once.
    ahead: whether a run can compile it before it is called (`train.compiling`), because it calls this function with
      these arguments to the last place: for the first step, or for what comes later. None: it cannot.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    trips: int = 1
    residents: tuple[Any, ...] = ()
    ahead: When | None = None

    def lower(self, mesh: Mesh, table: rules.Rules) -> Any:
        """Return the program lowered for a mesh, whose devices need not be there, by rules of sharding."""
        with on_paper(mesh, table):
            return self.function.lower(*self.arguments)

    @property
    def others(self) -> list[Any]:
        """The arrays on the devices that are not the program's own, each once."""
        own = _distinct(self.arguments)
        return [leaf for key, leaf in _distinct(self.residents).items() if key not in own]

    @property
    def argument_bytes(self) -> int:
        """Bytes of a device that are taken by the arguments, without padding."""
        return sum(_device_bytes(leaf) for leaf in _distinct(self.arguments).values())


@contextlib.contextmanager
def on_paper(mesh: Mesh, table: rules.Rules) -> Iterator[None]:
    """Trace for a mesh, which nothing can be computed on: constants are made where this process runs."""
    with rules.use(mesh, table), jax.set_mesh(None), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def sampling(
    name: str,
    sampler: Sampler,
    params: Params,
    prompts: int,
    *,
    samples: int = 1,
    residents: tuple[Any, ...] = (),
    ahead: When | None = None,
) -> list[Program]:
    """Return what answers `prompts` prompts, each `samples` times: one program, or two where rows are replaced.

    The mesh is the sampler's.
    """
    # The first token comes with the prompt's pass; the loop draws the others.
    trips = max(sampler.max_new - 1, 1)
    each = samples if sampler.prompts_at_once(samples) else 1
    count = prompts * samples // each
    portion = sampler.portion(count, each)
    batch, streams = _prompts(sampler, portion or sampler.prompts_at_once(each), each)
    if portion:
        calls = refill.calls(params, batch, streams, sampler.sampling.temperature, sampler.refilling)
        (admit, read), (advance, drawn) = calls["prompts"], calls["tokens"]
        beside = (*residents, _ready(sampler.lm, params))
        return [
            Program(name=f"{name}, prompts", function=admit, arguments=read, residents=beside),
            Program(name=f"{name}, tokens", function=advance, arguments=drawn, trips=trips, residents=residents),
        ]
    function, arguments = loop.call(
        sampler.lm, params, batch, streams, sampler.sampling,
        max_new=sampler.max_new, eos_ids=sampler.eos_ids, pad_id=sampler.pad_id,
    )  # fmt: skip
    program = Program(name=name, function=function, arguments=arguments, trips=trips, residents=residents, ahead=ahead)
    return [program]


def _prompts(sampler: Sampler, count: int, samples: int) -> tuple[Prompts, Any]:
    """Return the shapes of prompts and of a key for each of their samples, on the sampler's mesh."""
    assert sampler.mesh is not None
    return placed((prompt_arrays(count, sampler.width), key_shapes(count * samples)), sampler.mesh, row_axis=0)


def _ready(lm: ConditionalLM, params: Params) -> Params:
    """Return the parameters that a loop over tokens reads; those that it reads as they are, are the same leaves."""
    scans = lm.config.scan_layers
    scanning = language_model_of(reconfigured(lm, scan_layers=True))  # cut into layers they take as many bytes
    shapes = jax.eval_shape(scanning.ready, params)

    def own(leaf: Any, shape: jax.ShapeDtypeStruct) -> Any:
        same = scans and shape.dtype == leaf.dtype
        return leaf if same else jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=leaf.sharding)

    return jax.tree.map(own, params, shapes)


def scoring(
    name: str, scorer: Scorer, params: Params, residents: tuple[Any, ...] = (), ahead: When | None = None
) -> Program:
    """Return the program that scores one batch of answers; the mesh is the scorer's."""
    assert scorer.mesh is not None
    prompts = scorer.batch_size
    rows = conditional(prompts, scorer.width, prompts * scorer.samples, scorer.length)
    arguments = (params, placed(rows, scorer.mesh, row_axis=0), scorer.model)
    return Program(name=name, function=batch_scores, arguments=arguments, residents=residents, ahead=ahead)


def with_places(tree: Any, places: Any) -> Any:
    """Return a tree as shapes with places."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


def placed(batch: Any, mesh: Mesh, *, row_axis: int) -> Any:
    """Return the shapes of a batch with their places, as `sharding.place.put_batch` puts it.

    Raises:
      ConfigError: its rows cannot be shared out evenly.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        if sharding.spec and leaf.shape[row_axis] % row_parts(mesh):
            rule = f"be divisible by data x fsdp = {row_parts(mesh)} of the mesh"
            fix = "Change the batch size, the packing, or the mesh."
            raise invalid("batch size", leaf.shape[row_axis], rule, fix)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, batch, batch_shardings(batch, mesh, row_axis=row_axis))


def conditional(prompts: int, width: int, responses: int, length: int) -> Conditional:
    """Return arrays of so many prompts and responses, of the types that batches have."""
    prompt, response = np.zeros((prompts, width), np.int32), np.zeros((responses, length), np.int32)
    return Conditional(
        prompt=prompt,  # pyright: ignore[reportArgumentType]
        prompt_segments=prompt,  # pyright: ignore[reportArgumentType]
        prompt_reference=prompt.astype(bool),  # pyright: ignore[reportArgumentType]
        response=response,  # pyright: ignore[reportArgumentType]
        response_segments=response,  # pyright: ignore[reportArgumentType]
    )


def prompt_arrays(count: int, width: int) -> Prompts:
    """Return arrays of so many prompts, of the types that batches have."""
    tokens, flags = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    return Prompts(tokens=tokens, mask=flags, reference=flags)  # pyright: ignore[reportArgumentType]


def key_shapes(count: int) -> Any:
    """Return the shape of so many random keys."""
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))


def key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape of a random key, of which every device has a copy."""
    shape = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated(mesh))


def _distinct(trees: Any) -> dict[int, Any]:
    """Return every array once, by identity: trees that stand on one base share its leaves."""
    arrays = (leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array))
    return {id(leaf): leaf for leaf in arrays}


def _device_bytes(leaf: Any) -> int:
    """Return the bytes of an array on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = np.dtype("uint32").itemsize * 2 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(shape) * size
