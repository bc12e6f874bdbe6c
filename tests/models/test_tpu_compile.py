"""Training with the TPU kernels compiles, sharded, for a TPU that is not there; skipped where libtpu is missing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use

from . import tiny

AXES = ("data", "fsdp", "tensor", "sequence")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return the four devices of a v5e 2x2."""
    pytest.importorskip("libtpu")
    # No question to a metadata server, and no lock that would end a second process.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)


def compiled(lm: ConditionalLM, mesh: Mesh, prompts: int, responses: int) -> jax.stages.Compiled:
    """Return the program of a loss and its gradient."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.eval_shape(lambda: tiny.batch([[]] * 4, prompts, responses))
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), x)
    params = jax.tree.map(
        lambda leaf, cut: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut),
        lm.abstract(),
        specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh),
    )
    step = jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(lm.logprobs(params, x).logp)))
    with use(mesh, DEFAULT_RULES):
        return step.lower(params, x).compile()


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_auto_compiles_to_kernels(devices: np.ndarray) -> None:
    mesh = Mesh(devices.reshape(1, 1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    lm = DecoderOnly(dataclasses.replace(tiny.WINDOWED, remat="full", dtype="bfloat16"))
    text = compiled(lm, mesh, 192, 64).as_text()
    # Forward, again for the backward pass, and its two kernels; each for layers with a window and for the others.
    assert text.count('custom_call_target="tpu_custom_call"') == 8
