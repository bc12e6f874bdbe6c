"""FLOPs, bytes and collectives counted in XLA's programs, against what is known of them."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pit_jax.core.types import Conditional
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.plan.cost import Cost, count

TPU = pathlib.Path(__file__).parent / "tpu_loop.hlo"
ONE = {"data": 1}


def _count(function, *arguments, sizes=ONE, trips: int = 1) -> Cost:
    return count(jax.jit(function).lower(*arguments).compile().as_text(), sizes, trips)


def _shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_products_are_counted_exactly() -> None:
    a, b = _shape(48, 80), _shape(80, 112)
    assert _count(jnp.matmul, a, b).flops == 2 * 48 * 80 * 112
    q, k = _shape(3, 20, 4, 16), _shape(3, 24, 4, 16)
    assert _count(lambda q, k: jnp.einsum("bqhe,bkhe->bhqk", q, k), q, k).flops == 2 * 3 * 4 * 20 * 24 * 16


def test_a_convolution_is_counted_as_what_it_touches() -> None:
    x, w = _shape(2, 10, 3), _shape(5, 3, 7)

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    touched = sum(1 for place in range(10) for tap in range(5) if 0 <= place + tap - 2 < 10)
    assert _count(convolve, x, w).flops == 2 * 2 * 3 * 7 * touched


def _layers(x: jax.Array, kernels: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_loops_count_once_for_every_trip() -> None:
    x = _shape(16, 32)
    few, many = (_count(_layers, x, _shape(layers, 32, 32)) for layers in (2, 32))
    assert few.flops == 2 * 2 * 16 * 32 * 32
    assert many.flops == 16 * few.flops
    assert many.bytes == pytest.approx(16 * few.bytes, rel=0.3)


def test_the_gradient_of_layers_has_three_times_their_flops() -> None:
    x, kernels = _shape(16, 32), _shape(8, 32, 32)
    forward = _count(_layers, x, kernels)
    both = _count(jax.grad(lambda k, x: jnp.sum(_layers(x, k)), argnums=(0, 1)), kernels, x)
    assert both.flops == 3 * forward.flops


def test_loops_in_loops_multiply() -> None:
    def outer(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, x: _layers(x, kernels), x)

    x, kernels = _shape(16, 32), _shape(3, 32, 32)
    assert _count(outer, x, kernels).flops == 5 * 3 * 2 * 16 * 32 * 32


def test_a_loop_of_unknown_length_takes_the_trips_it_is_given() -> None:
    def until(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ kernel, x)

    arguments = (_shape(16, 32), _shape(32, 32))
    assert _count(until, *arguments, trips=7).flops == 7 * 2 * 16 * 32 * 32
    assert _count(until, *arguments).uncounted == ("loop of unknown length",)


def test_a_slice_of_stacked_layers_moves_the_slice_alone() -> None:
    x, kernels = _shape(8, 64), _shape(32, 64, 64)
    cost = _count(_layers, x, kernels)
    stack = 32 * 64 * 64 * 4
    assert stack < cost.bytes < 6 * stack  # the whole stack read in every trip would be 32 times


def _conditional(rows: int, prompt: int, response: int) -> Conditional:
    p, r = np.ones((rows, prompt), np.int32), np.ones((rows, response), np.int32)
    return Conditional(prompt=p, prompt_segments=p, prompt_reference=p.astype(bool), response=r, response_segments=r)


@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder_has_the_flops_of_its_matrices(scan: bool) -> None:
    config = preset("nano", scan_layers=scan, logprob_chunk=1 << 20, attention="xla")
    lm = language_model(config)
    rows, prompt, response = 2, 24, 8
    length = prompt + response
    batch = jax.tree.map(jnp.asarray, _conditional(rows, prompt, response))
    cost = _count(functools.partial(lm.logprobs), lm.abstract(), batch)
    d, f, heads = config.width, config.mlp, config.heads * config.head_dim
    weights = config.layers * (4 * d * heads + 3 * d * f)
    attention = config.layers * 2 * length * heads
    head = rows * response * d * config.vocab_size
    assert cost.flops == 2 * (rows * length * (weights + attention) + head)


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("cut", "axes", "devices"), [(("fsdp", "tensor"), "tensor", 2), ((None, ("fsdp", "tensor")), "fsdp+tensor", 4)]
)
def test_collectives_are_named_by_the_axes_they_cross(cut: tuple, axes: str, devices: int) -> None:
    mesh = _mesh()
    left = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*cut)))
    right = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(cut[1])))
    out = NamedSharding(mesh, PartitionSpec(cut[0]))
    text = jax.jit(jnp.matmul, out_shardings=out).lower(left, right).compile().as_text()
    (entry,) = count(text, dict(mesh.shape)).collectives
    assert (entry.kind, entry.axes, entry.devices, entry.count) == ("all-reduce", axes, devices, 1)
    assert entry.bytes == 16 * 32 * 4 / (2 if cut[0] else 1)
    assert entry.wire_bytes == 2 * (devices - 1) / devices * entry.bytes


def test_a_collective_in_a_loop_counts_for_every_trip() -> None:
    mesh = _mesh()
    whole = NamedSharding(mesh, PartitionSpec())

    def gather(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, k: (x @ jax.lax.with_sharding_constraint(k, whole), None), x, kernels)[0]

    kernels = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=whole)
    text = jax.jit(gather, out_shardings=whole).lower(x, kernels).compile().as_text()
    moved = [entry for entry in count(text, dict(mesh.shape)).collectives if entry.kind == "all-gather"]
    assert sum(entry.bytes for entry in moved) == 6 * 32 * 32 * 4
    assert {entry.axes for entry in moved} == {"fsdp"}


@pytest.mark.parametrize(
    ("kernel", "outputs", "products"),
    [("fwd_segmented_residuals", 2, 2), ("dq_segmented", 1, 3), ("dkv_segmented", 2, 4), ("dkv_segmented", 3, 5)],
)
def test_flash_kernels_have_the_flops_of_their_products(kernel: str, outputs: int, products: int) -> None:
    result = ", ".join(["bf16[2,4,64,128]{3,2,1,0}"] * outputs)
    text = f"""HloModule m

ENTRY %main (p0: s32[8], p1: bf16[2,4,64,128], p2: bf16[2,2,96,128]) -> bf16[2,4,64,128] {{
  %p0 = s32[8]{{0}} parameter(0)
  %p1 = bf16[2,4,64,128]{{3,2,1,0}} parameter(1)
  %p2 = bf16[2,2,96,128]{{3,2,1,0}} parameter(2)
  ROOT %splash_mha_{kernel}.1 = ({result}) custom-call(%p0, %p1, %p2, %p2), custom_call_target="tpu_custom_call"
}}
"""
    cost = count(text, ONE)
    assert cost.flops == 2 * products * 2 * 4 * 64 * 96 * 128
    assert cost.uncounted == ()


def test_a_recorded_tpu_program() -> None:
    """Products as convolutions, loops without a noted length, collectives that overlap with what is computed."""
    cost = count(TPU.read_text(), {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1})
    assert cost.flops == 3 * 2 * 2 * 16 * 4 * 8 * 64
    gathered, scattered, shifted = cost.collectives
    assert (gathered.kind, gathered.axes, gathered.count, gathered.bytes) == (
        "all-gather",
        "fsdp",
        3,
        3 * 64 * 4 * 8 * 2,
    )
    assert (shifted.kind, shifted.axes, shifted.count) == ("reduce-scatter", "fsdp", 1)
    assert (scattered.kind, scattered.axes, scattered.bytes) == ("collective-permute", "fsdp", 64 * 4)
