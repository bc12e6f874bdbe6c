"""Adapters inside the layers: nothing at the start, W + s A B whatever the matrices, gradients of their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Params
from pit_jax.models import lora
from pit_jax.models.api import ConditionalLM
from pit_jax.models.lora import Lora
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.rules import DEFAULT_RULES, specs

from . import tiny

ALL = Lora(rank=3, alpha=6.0, targets=lora.TARGETS)
BASES = {"rotary": tiny.ROTARY, "learned": tiny.LEARNED, "t5": tiny.T5}


def adapted(name: str, adapters: Lora = ALL) -> ConditionalLM:
    return type(tiny.MODELS[name])(dataclasses.replace(BASES[name], lora=adapters))


def merged(params: Params, scale: float) -> Params:
    """Return plain parameters with every adapter multiplied out, in float64."""
    if "lora_a" not in params:
        return {name: merged(value, scale) if isinstance(value, dict) else value for name, value in params.items()}
    kernel, a, b = (np.asarray(params[name], np.float64) for name in ("kernel", "lora_a", "lora_b"))
    batch = "n" if a.ndim + b.ndim > kernel.ndim + 2 else ""
    ins, outs = "abc"[: a.ndim - 1 - len(batch)], "xyz"[: b.ndim - 1 - len(batch)]
    update = np.einsum(f"{batch}{ins}r,{batch}r{outs}->{batch}{ins}{outs}", a, b)
    kept = {"kernel": jnp.asarray(kernel + scale * update, jnp.float32)}
    return kept | ({"bias": params["bias"]} if "bias" in params else {})


def plain(params: Params, scale: float) -> Params:
    """Return parameters for the model without adapters, whose head is a bare matrix."""
    out = merged(params, scale)
    return out | {"head": out["head"]["kernel"]}


@pytest.mark.parametrize("name", tiny.slow_but(["rotary", "t5"], "rotary"))
def test_adapters_start_at_nothing_and_leave_the_base_alone(name: str) -> None:
    lm, base_lm, key = adapted(name), tiny.MODELS[name], jax.random.key(5)
    params, expected = jax.jit(lm.init)(key), jax.jit(base_lm.init)(key)
    base, adapters = lora.split(params)
    base = base | {"head": base["head"]["kernel"]}
    for (path, one), (_, other) in zip(tree.named_leaves(base), tree.named_leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)
    for path, leaf in tree.named_leaves(adapters):
        assert np.any(leaf) == path.endswith("lora_a"), path
    stack = params["encoder"]["layers"] if name == "t5" else params["layers"]
    query = np.asarray(stack["attention"]["query"]["lora_a"])
    assert np.abs(query).max() <= lm.config.width**-0.5 < 1.1 * np.abs(query).max()
    assert not np.allclose(query[0], query[1])
    x = tiny.plain()
    np.testing.assert_allclose(tiny.logp(lm, params, x), tiny.logp(base_lm, expected, x), atol=1e-6)


@pytest.mark.parametrize(("name", "scan"), [("rotary", True), ("learned", False), ("t5", True), ("t5", False)])
def test_adapters_equal_merged_weights(name: str, scan: bool) -> None:
    lm, base_lm = adapted(name), tiny.MODELS[name]
    lm, base_lm = (type(m)(dataclasses.replace(m.config, scan_layers=scan)) for m in (lm, base_lm))
    params, x = tiny.params(lm), tiny.plain()
    flat = plain(params, ALL.scale)
    np.testing.assert_allclose(tiny.logp(lm, params, x), tiny.logp(base_lm, flat, x), atol=1e-5, rtol=1e-5)
    assert not np.allclose(tiny.logp(lm, params, x), tiny.logp(base_lm, plain(params, 0.0), x), atol=1e-2)


@pytest.mark.parametrize("name", tiny.slow_but(["rotary", "t5"], "rotary"))
def test_decoding_reads_the_adapters(name: str) -> None:
    lm, base_lm = adapted(name), tiny.MODELS[name]
    params, x = tiny.params(lm), tiny.plain()
    flat = plain(params, ALL.scale)
    prompts = tiny.prompts_of(x)
    one, cache = jax.jit(lm.prefill, static_argnums=2)(params, prompts, 3)
    two, base_cache = jax.jit(base_lm.prefill, static_argnums=2)(flat, prompts, 3)
    np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)
    for t in range(2):
        one, cache = jax.jit(lm.step)(params, cache, x.response[:, t])
        two, base_cache = jax.jit(base_lm.step)(flat, base_cache, x.response[:, t])
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tiny.slow_but(["rotary", "t5"], "rotary"))
def test_split_trees_join_and_only_adapters_have_gradients(name: str) -> None:
    lm, x = adapted(name), tiny.plain()
    params = tiny.params(lm)
    base, adapters = lora.split(params)
    joined = lora.join(base, adapters)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(one is other for one, other in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))

    def loss(adapters: Params, base: Params) -> jax.Array:
        return jnp.sum(lm.logprobs(lora.join(base, adapters), x).logp)

    grads = jax.jit(jax.grad(loss))(adapters, base)
    everything, _ = lora.split(jax.jit(jax.grad(lambda p: jnp.sum(lm.logprobs(p, x).logp)))(params))[::-1]
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(everything), strict=True):
        assert np.any(one), path
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", tiny.slow_but(["rotary", "t5"], "rotary"))
def test_adapters_are_cut_like_the_kernels_they_belong_to(name: str) -> None:
    lm = adapted(name)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    shardings = dict(tree.named_leaves(specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh)))
    for path, leaf in tree.named_leaves(lm.abstract()):
        if not lora.is_adapter(tuple(path.split("/"))):
            continue
        kernel = shardings[path.rsplit("/", 1)[0] + "/kernel"].spec
        cut = [axis for axis in shardings[path].spec if axis is not None]
        assert set(cut) <= {axis for axis in kernel if axis is not None}, path
        assert leaf.shape[-1 if path.endswith("lora_a") else leaf.ndim - _outputs(path)] == ALL.rank, path
    up = "encoder/layers/mlp/up" if name == "t5" else "layers/mlp/up"
    assert shardings[f"{up}/lora_a"].spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert shardings[f"{up}/lora_b"].spec == jax.sharding.PartitionSpec(None, None, "tensor")


def _outputs(path: str) -> int:
    """Return how far from the end the rank's axis of lora_b is."""
    return 3 if path.split("/")[-2] in ("query", "key", "value") else 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tied": True, "lora": Lora(rank=2, alpha=1.0, targets=("head",))}, "lora.targets = .'head',. must target"),
        ({"gated": False, "lora": Lora(rank=2, alpha=1.0, targets=("gate",))}, "lora.targets = .'gate',. must target"),
    ],
)
def test_adapters_of_nothing_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny.ROTARY, **change)


def test_only_targets_have_adapters() -> None:
    some = Lora(rank=2, alpha=1.0, targets=("query", "gate", "head"))
    lm = tiny.DecoderOnly(dataclasses.replace(tiny.ROTARY, tied=True, gated=False, lora=some))
    _, adapters = lora.split(lm.abstract())
    assert {path for path, _ in tree.named_leaves(adapters)} == {
        "layers/attention/query/lora_a",
        "layers/attention/query/lora_b",
    }
