"""Meshes and the rules that lay arrays out over them."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from pit_jax.core.errors import ConfigError
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.rules import DEFAULT_RULES, constrain, in_force, spec, specs, use

SIZES = {"data": 2, "fsdp": 4, "tensor": 2, "sequence": 1}


def test_mesh_sizes() -> None:
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert MeshConfig(data=2, fsdp=-1, tensor=2).sizes(16) == {"data": 2, "fsdp": 4, "tensor": 2, "sequence": 1}
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"data": 3}, 4, "multiply to the 4 devices"),
        ({"fsdp": 8}, 4, "multiply to the 4 devices"),
        ({"data": 2, "fsdp": 1}, 4, "multiply to the 4 devices"),
        ({"data": -1, "fsdp": -1}, 4, "at most one -1"),
        ({"tensor": 0}, 4, "MeshConfig.tensor = 0 must be positive or -1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes: dict[str, int], devices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**sizes).sizes(devices)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 6), PartitionSpec("fsdp", "tensor")),
        (("layers", "embed", "kv_heads", "head_dim"), (3, 8, 1, 4), PartitionSpec(None, "fsdp")),
        (("vocab", "embed"), (7, 8), PartitionSpec(None, "fsdp")),
        (("vocab", "embed"), (8, 6), PartitionSpec("tensor")),
        (("batch", "length", None), (16, 8, 8), PartitionSpec(("data", "fsdp"))),
        (("batch", None), (6, 8), PartitionSpec("data")),
        (("batch", None), (7, 8), PartitionSpec()),
        (("mlp", "mlp"), (4, 4), PartitionSpec("tensor")),
        (("norm",), (8,), PartitionSpec()),
        ((), (), PartitionSpec()),
    ],
)
def test_the_first_rule_that_fits_wins(axes: tuple, shape: tuple, expected: PartitionSpec) -> None:
    assert spec(axes, shape, SIZES, DEFAULT_RULES) == expected


def test_rules_are_tried_in_their_order() -> None:
    rules = (("mlp", "fsdp"), ("embed", "fsdp"), ("embed", "tensor"))
    assert spec(("embed", "mlp"), (8, 8), SIZES, rules) == PartitionSpec("tensor", "fsdp")
    assert spec(("embed", "mlp"), (8, 6), SIZES, rules) == PartitionSpec("fsdp")
    assert spec(("embed",), (8,), {"data": 4}, rules) == PartitionSpec()


def test_trees_and_constraints() -> None:
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    shapes = {"a": jax.ShapeDtypeStruct((4, 8), "float32"), "b": {"c": jax.ShapeDtypeStruct((), "float32")}}
    shardings = specs({"a": ("embed", "mlp"), "b": {"c": ()}}, shapes, DEFAULT_RULES, mesh)
    assert shardings["a"].spec == PartitionSpec(None, "tensor")
    assert shardings["b"]["c"].spec == PartitionSpec()
    x = jax.numpy.ones((4, 3))
    assert constrain(x, ("batch", None)) is x
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: constrain(x, ("batch", None)))(x).sharding.spec == PartitionSpec("data")


def test_width_is_cut_over_the_sequence_axis_as_well() -> None:
    sizes = {"data": 1, "fsdp": 2, "tensor": 1, "sequence": 4}
    assert spec(("embed", "mlp"), (16, 8), sizes, DEFAULT_RULES) == PartitionSpec(("fsdp", "sequence"))
    assert spec(("embed", "mlp"), (12, 8), sizes, DEFAULT_RULES) == PartitionSpec("fsdp")
    assert spec(("batch", "length", "embed"), (2, 8, 12), sizes, DEFAULT_RULES) == PartitionSpec("fsdp", "sequence")


def test_other_rules_cut_otherwise_and_trace_anew() -> None:
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    rules = (("batch", "tensor"),)
    cut = jax.jit(lambda x: constrain(x, ("batch", None)))
    x = jax.numpy.ones((4, 3))
    with use(mesh, DEFAULT_RULES):
        assert cut(x).sharding.spec == PartitionSpec("data")
    with use(mesh, rules):
        assert in_force() == rules
        assert cut(x).sharding.spec == PartitionSpec("tensor")
    assert in_force() == DEFAULT_RULES


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["embd", "fsdp"]], r"rules = 'embd' must be one of .*Did you mean 'embed'"),
        ([("embed", ("fsdp", "tensr"))], "'tensr' must be one of data, fsdp.*Did you mean 'tensor'"),
        ([("embed",)], "be pairs"),
    ],
)
def test_rules_that_name_nothing_are_refused(rules: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshConfig(rules=rules)
