"""Which form of attention runs where, and how each is shared out over the devices of a mesh.

"xla" is plain products and a softmax, cut by the compiler, or where rows are long the same in blocks of queries that
skip what the order hides (`ops/blocks.py`); "splash" is JAX's Pallas flash attention for TPUs, "cudnn"
that of NVIDIA's library. Kernels are opaque to the compiler, so each device is given its part explicitly: rows over
data and fsdp, heads over tensor, queries over sequence, every query with all of the row's keys (context parallelism as
in Llama 3, arXiv 2407.21783).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pit_jax.models.config import ModelConfig
from pit_jax.ops import attention, blocks, cached, cudnn, sight, splash
from pit_jax.ops.cached import Turned
from pit_jax.ops.sight import Order, Tokens
from pit_jax.sharding import rules
from pit_jax.sharding.rules import constrain

Form = Literal["xla", "splash", "cudnn"]

_LONG_ON_CPU, _LONG = 128, 1024
"""Keys from which on blocks pay: on CPUs as measured (benchmarks/attention.py), elsewhere for the memory of scores."""
_SMALLEST, _SMALLEST_ELSEWHERE, _LARGEST, _MOST_BLOCKS = 64, 512, 1024, 8
"""Queries of a block, and about how many blocks there should be."""
_CACHED = 2**21
"""Bytes of the scores of a block that stay in a CPU's cache."""

QUERIES = ("batch", "length", "heads", None)
KNOWN = ("batch", "length", "kv_heads", None)
GATHERED = ("batch", None, "kv_heads", None)
CACHE = ("layers", "batch", "kv_heads", "cache", "head_dim")
"""Axes of a cache of keys or values of all layers, `[N, B, Kh, C, E]`."""
TURNED = (*CACHE[:-2], "head_dim", "cache")
"""Axes of keys that are turned, `[N, B, Kh, E, C]`."""


class KeysValues(NamedTuple):
    """Keys and values of one layer, `[B, K, Kh, E]` each, or of all."""

    keys: Float[Array, "*N B K Kh E"]
    values: Float[Array, "*N B K Kh E"]


Pieces = tuple[KeysValues | Turned, ...]
"""Keys and values of a cache, one piece after the other (`ops.cached`)."""


class Masks(NamedTuple):
    """What queries see, as masks: `near` is that of layers with a window, None where it is `seen` as well.

    form: what computes it, where keys and values are of whole rows. order: shows by columns at least all that the masks
    show, None where no such order is known.
    """

    seen: Bool[Array, "#B 1 Q K"]
    near: Bool[Array, "#B 1 Q K"] | None = None
    form: Form = "xla"
    order: Order | None = None


class Orders(NamedTuple):
    """What queries see, as segments and static orders, of which `near` is that of layers with a window.

    shown: which queries see any key.
    """

    queries: Int[Array, "B Q"]
    keys: Int[Array, "B K"]
    shown: Bool[Array, "B Q"]
    seen: Order
    near: Order | None = None


Scene = Masks | Orders


class Scores(NamedTuple):
    """What is done to products of queries and keys: factor, bound, and bias `[#B, H, Q, K]`."""

    scale: float
    softcap: float | None
    bias: Float[Array, "#B H Q K"] | None


def platform() -> str:
    """Return what is computed on: the platform of the mesh in force, which need not be here, or jax's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def form(config: ModelConfig, keys: int, *, softcap: float | None, bias: bool) -> Form:
    """Return the form of an attention over so many keys: what `ModelConfig.attention` wants where it can do it.

    No kernel takes a relative position bias. cuDNN's takes no soft-cap, no float32 and no odd widths of heads. "auto"
    leaves fewer keys than one block to XLA.

    Raises:
      ConfigError: the config names the kernel of another accelerator.
    """
    here, wanted = platform(), config.attention
    if wanted == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(here, "xla")
        wanted = kernel if keys >= splash.BLOCK else "xla"
    elif here not in {"splash": ("tpu", "cpu"), "cudnn": ("gpu", "cuda", "cpu")}.get(wanted, (here,)):
        raise config.bad("attention", f"be 'auto' or 'xla' on a {here}", "That kernel is for another accelerator.")
    if wanted == "splash" and not bias:
        return "splash"
    if wanted == "cudnn" and not bias and softcap is None and cudnn.takes(config.dtype, config.head_dim):
        return "cudnn"
    return "xla"


def scene(form: Form, queries: Tokens, keys: Tokens, seen: Order, near: Order | None = None) -> Scene:
    """Return what queries see of whole rows of keys, as the form wants it described.

    Segments must be runs of columns where a kernel has a window (`layers.compact` makes them so).
    """
    if form != "splash":
        narrow = None if near is None else _mask(near, queries, keys)
        return Masks(_mask(seen, queries, keys), narrow, form, order=seen)
    own = queries is keys or bool(seen.memory)
    shown = queries.segments > 0 if own else sight.sighted(queries.segments, keys.segments)
    return Orders(queries.segments, keys.segments, shown, seen, near)


def _mask(order: Order, queries: Tokens, keys: Tokens) -> Bool[Array, "B 1 Q K"]:
    return constrain(sight.dense(order, queries, keys), ("batch", None, "length", None))


def cut(known: KeysValues) -> KeysValues:
    """Return keys and values cut as the states they are made of: along the length, over `sequence`."""
    return KeysValues(*(constrain(part, KNOWN) for part in known))


def attend(
    queries: Float[Array, "B Q H E"],
    known: KeysValues | Pieces,
    scene: Scene,
    windowed: Bool[Array, ""] | None,
    scores: Scores,
) -> Float[Array, "B Q H E"]:
    """Return what the queries of one layer find; `windowed` says whether the layer has the window, if any has.

    Keys and values of whole rows are gathered over the mesh axis `sequence`, queries and results stay cut. Those of a
    cache stay where they lie. Successive rows of queries may share a row of keys and values: the scene is then of the
    queries as one row.
    """
    if isinstance(known, KeysValues) and known.keys.shape[0] != queries.shape[0]:
        joined = queries.reshape(known.keys.shape[0], -1, *queries.shape[2:])
        return attend(joined, known, scene, windowed, scores).reshape(queries.shape)
    if isinstance(scene, Orders):
        assert isinstance(known, KeysValues)
        return _splash(queries, known, scene, windowed, scores)
    mask = scene.seen
    if scene.near is not None and windowed is not None:
        mask = jnp.where(windowed, scene.near, scene.seen)
    if not isinstance(known, KeysValues):
        return cached.attend(queries, known, mask=mask, bias=scores.bias, scale=scores.scale, softcap=scores.softcap)
    if scene.form == "cudnn":
        return _cudnn(queries, known, mask, scores)
    known = KeysValues(*(constrain(part, GATHERED) for part in known))
    plan = None if scene.order is None else _plan(scene.order, queries, known.keys, scores)
    if plan is not None:
        return _blocked(queries, known, mask, plan)
    return attention.attend(queries, *known, mask=mask, bias=scores.bias, scale=scores.scale, softcap=scores.softcap)


def _plan(order: Order, queries: Array, keys: Array, scores: Scores) -> blocks.Plan | None:
    """Return in which blocks the queries are taken, None where plain attention is faster or the only one.

    A bias would have to be cut as well. Queries cut over `sequence` stand in columns that each device knows alone: they
    are taken in blocks, and each with all keys.
    """
    on_cpu, share = platform() == "cpu", _Share.of(queries)
    count, heads = queries.shape[1] // share.lengths, queries.shape[2]
    if keys.shape[1] < (_LONG_ON_CPU if on_cpu else _LONG) or scores.bias is not None:
        return None
    if share.lengths > 1:
        order = Order(causal=False)
    size = min(max(-(-count // _MOST_BLOCKS), _SMALLEST if on_cpu else _SMALLEST_ELSEWHERE), _LARGEST)
    parts = blocks.blocks(order, count, keys.shape[1], size)
    bytes_a_row = 4 * heads // share.heads * size * keys.shape[1]
    at_once = max(_CACHED // bytes_a_row, 1) if on_cpu else None
    return blocks.Plan(parts, at_once, scores.scale, scores.softcap)


def _blocked(queries: Array, known: KeysValues, mask: Bool[Array, "#B 1 Q K"], plan: blocks.Plan) -> Array:
    share = _Share.of(queries)
    if share.mesh is None:
        return blocks.attend(queries, *known, mask=mask, plan=plan)
    mask = jnp.broadcast_to(mask, (queries.shape[0], *mask.shape[1:]))

    def run(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
        return blocks.attend(queries, keys, values, mask=mask, plan=plan)

    specs = (*share.specs[:3], PartitionSpec(share.batch, None, share.length, None))
    return share.run(run, specs)(*share.repeated(queries, *known, mask))


def _splash(
    queries: Array, known: KeysValues, scene: Orders, windowed: Bool[Array, ""] | None, scores: Scores
) -> Array:
    def layer(order: Order) -> Callable[..., Array]:
        def run(*arrays: Array) -> Array:
            return _splash_once(order, arrays, scores)

        return run

    arrays = (queries, *known, scene.queries, scene.keys, scene.shown)
    if scene.near is None or windowed is None:
        return layer(scene.seen)(*arrays)
    return jax.lax.cond(windowed, layer(scene.near), layer(scene.seen), *arrays)


def _splash_once(order: Order, arrays: tuple[Array, ...], scores: Scores) -> Array:
    queries, keys = arrays[0], arrays[1]
    share = _Share.of(queries)
    made = splash.kernel(
        splash.Shape(
            queries=queries.shape[1],
            keys=keys.shape[1],
            heads=queries.shape[2] // share.heads,
            shards=share.lengths,
            order=order,
            softcap=scores.softcap,
            interpret=platform() == "cpu",
        )
    )
    run = functools.partial(splash.attend, scale=scores.scale)
    if share.mesh is None:
        return run(made, *arrays)
    specs = (splash.kernel_specs(made, share.mesh, share.length), *share.specs)
    return share.run(run, specs)(made, *share.repeated(*arrays))


def _cudnn(queries: Array, known: KeysValues, mask: Bool[Array, "#B 1 Q K"], scores: Scores) -> Array:
    share = _Share.of(queries)
    mask = jnp.broadcast_to(mask, (queries.shape[0], *mask.shape[1:]))
    run = functools.partial(cudnn.attend, scale=scores.scale, on_gpu=platform() != "cpu")
    if share.mesh is None:
        return run(queries, *known, mask)
    masked = PartitionSpec(share.batch, None, share.length, None)
    return share.run(run, (*share.specs[:3], masked))(*share.repeated(queries, *known, mask))


class _Share(NamedTuple):
    """How one attention is shared out: the mesh, None where there is one device, and the axes that cut the queries."""

    mesh: Any
    batch: Any
    length: Any
    head: Any

    @classmethod
    def of(cls, queries: Float[Array, "B Q H E"]) -> _Share:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return cls(None, None, None, None)
        spec = rules.spec(QUERIES, queries.shape, mesh.shape, rules.in_force())
        return cls(mesh, *(tuple(spec) + (None,) * 3)[:3])

    def _parts(self, axes: Any) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def heads(self) -> int:
        """Devices that the heads are cut over."""
        return self._parts(self.head)

    @property
    def lengths(self) -> int:
        """Devices that the queries of one row are cut over."""
        return self._parts(self.length)

    @property
    def specs(self) -> tuple[PartitionSpec, ...]:
        """How queries, keys, values, segments of queries and of keys, and a flag a query are cut."""
        known = PartitionSpec(self.batch, None, self.head, None)
        rows, keys = PartitionSpec(self.batch, self.length), PartitionSpec(self.batch, None)
        return (PartitionSpec(self.batch, self.length, self.head, None), known, known, rows, keys, rows)

    def repeated(self, queries: Array, keys: Array, values: Array, *rest: Array) -> tuple[Array, ...]:
        """Return the arrays with each key head there once for every device that has queries of it."""
        times = math.lcm(keys.shape[2], self.heads) // keys.shape[2]
        if times > 1:
            keys, values = (jnp.repeat(part, times, axis=2) for part in (keys, values))
        return (queries, keys, values, *rest)

    def run(self, function: Callable[..., Array], specs: tuple[Any, ...]) -> Callable[..., Array]:
        """Return the function of whole arrays that calls `function` on each device's part."""
        out = PartitionSpec(self.batch, self.length, self.head, None)
        # The checks of what varies over which axis do not know Pallas kernels.
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)


def slots(wanted: int) -> int:
    """Return so many slots of a cache or more, that the rule of the axis "cache" can cut them evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    targets = next((target for name, target in rules.in_force() if name == "cache"), ())
    names = (targets,) if isinstance(targets, str) else targets
    parts = 1 if mesh.empty else math.prod(mesh.shape.get(name, 1) for name in names)
    return -(-wanted // parts) * parts
