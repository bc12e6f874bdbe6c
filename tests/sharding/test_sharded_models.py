"""One device and four devices compute the same loss and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Comparisons, Conditional, Params, Prompts
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import batch_shardings, init_sharded, put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs

SHAPE = dict(vocab_size=32, width=16, heads=2, head_dim=8, mlp=24)
MODELS = {
    "decoder_only": DecoderOnly(DecoderOnlyConfig(**SHAPE, layers=2, kv_heads=1)),
    "encoder_decoder": EncoderDecoder(EncoderDecoderConfig(**SHAPE, encoder_layers=1, decoder_layers=2)),
}
MESHES = {"data": MeshConfig(), "fsdp x tensor": MeshConfig(data=1, fsdp=2, tensor=2)}


def batch(rows: int) -> Conditional:
    random = np.random.default_rng(0)
    prompt, response = random.integers(1, 32, (rows, 6)), random.integers(1, 32, (rows, 4))
    prompt_segments = (np.arange(6)[None] < random.integers(2, 7, (rows, 1))).astype(np.int32)
    response_segments = (np.arange(4)[None] < random.integers(1, 5, (rows, 1))).astype(np.int32)
    return Conditional(
        prompt=prompt.astype(np.int32),
        prompt_segments=prompt_segments,
        prompt_reference=np.zeros((rows, 6), bool),
        response=response.astype(np.int32),
        response_segments=response_segments,
    )


def parameters(lm: ConditionalLM) -> Params:
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), lm.abstract())


def mesh_of(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[:4])


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_four_devices_equal_one(name: str, mesh_name: str) -> None:
    lm, mesh, x = MODELS[name], mesh_of(MESHES[mesh_name]), batch(8)

    def loss(params: dict, x: Conditional) -> jax.Array:
        return -jnp.sum(lm.logprobs(params, x).logp) / jnp.sum(x.response_segments)

    step = jax.jit(jax.value_and_grad(loss))
    params = parameters(lm)
    expected, expected_grads = jax.block_until_ready(step(params, x))
    sharded = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
    with jax.set_mesh(mesh):
        value, grads = jax.block_until_ready(step(sharded, put_batch(x, mesh, row_axis=0)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=path)


def test_parameters_are_made_in_parts() -> None:
    lm, mesh = MODELS["decoder_only"], mesh_of(MESHES["fsdp x tensor"])
    shardings = specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh)
    params = jax.block_until_ready(init_sharded(lm.init, jax.random.key(0), shardings))
    for path, leaf in tree.named_leaves(params):
        share = np.prod(leaf.addressable_shards[0].data.shape) / leaf.size
        if "kernel" in path and "/key/" not in path and "/value/" not in path:
            assert share == 1 / 4, path
    plain = jax.jit(lm.init)(jax.random.key(0))
    for (path, one), (_, other) in zip(tree.named_leaves(params), tree.named_leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=path)


def test_decoding_over_four_devices_equals_one() -> None:
    lm, mesh, x = MODELS["decoder_only"], mesh_of(MeshConfig(data=2, fsdp=1, tensor=2)), batch(4)
    params = parameters(lm)
    logits = decode(lm, params, x)
    shardings = specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh)
    with jax.set_mesh(mesh):
        sharded = decode(lm, jax.device_put(params, shardings), put_batch(x, mesh, row_axis=0))
    np.testing.assert_allclose(sharded, logits, atol=1e-5)


def decode(lm: ConditionalLM, params: dict, x: Conditional) -> np.ndarray:
    prompts = Prompts(tokens=x.prompt, mask=x.prompt_segments > 0, reference=x.prompt_reference)

    @jax.jit
    def two_steps(params: dict, prompts: Prompts, token: jax.Array) -> jax.Array:
        first, cache = lm.prefill(params, prompts, 2)
        return jnp.stack([first, lm.step(params, cache, token)[0]])

    return np.asarray(jax.block_until_ready(two_steps(params, prompts, x.response[:, 0])))


def test_batches_are_shared_out_by_rows() -> None:
    mesh, x = mesh_of(MeshConfig(data=2, fsdp=2)), batch(8)
    placed = put_batch(x, mesh, row_axis=0)
    assert {shard.data.shape for shard in placed.prompt.addressable_shards} == {(2, 6)}
    np.testing.assert_array_equal(placed.prompt, x.prompt)
    micro = jax.tree.map(lambda leaf: leaf[None], x)
    comparisons = Comparisons(
        inputs=micro,
        index=np.zeros((1, 4, 3), np.int32),
        weight=np.ones((1, 3), np.float32),
        length=np.ones((1, 4, 3), np.int32),
    )
    shardings = batch_shardings(comparisons, mesh, row_axis=1)
    assert shardings.inputs.prompt.spec == PartitionSpec(None, ("data", "fsdp"))
    assert shardings.index.spec == shardings.weight.spec == PartitionSpec()
    placed = put_batch(comparisons, mesh, row_axis=1)
    assert {shard.data.shape for shard in placed.inputs.response.addressable_shards} == {(1, 2, 4)}
    assert placed.weight.is_fully_replicated


def test_rows_that_do_not_divide_are_refused() -> None:
    mesh = mesh_of(MeshConfig())
    with pytest.raises(ConfigError, match="batch size = 6 must be divisible by data x fsdp = 4"):
        put_batch(batch(6), mesh, row_axis=0)
