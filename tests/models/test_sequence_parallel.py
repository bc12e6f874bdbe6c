"""Activations cut along the length, and caches cut by the rules: the same numbers, in a part of the memory."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core.types import Params, Prompts
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use

from . import test_attention_forms as forms
from . import tiny

GROUPED = DecoderOnly(dataclasses.replace(tiny.ROTARY, heads=4, kv_heads=2))
MODELS = forms.MODELS | {"rotary": GROUPED}
SEQUENCE = MeshConfig(data=1, sequence=4)
BOTH = MeshConfig(data=2, sequence=2)


@pytest.mark.parametrize("name", tiny.slow_but(["rotary", "prefix", "t5", "t5gemma", "t5gemma 2"], "rotary"))
def test_four_parts_of_every_row_equal_one_device(name: str) -> None:
    lm, params, x = MODELS[name], tiny.params(MODELS[name]), forms.packed()
    found = forms.on(SEQUENCE, lm, params, x)
    assert found[0][0].sharding.spec == PartitionSpec(None, "sequence")
    forms.assert_equal(found, forms.scored(lm, params, x), 1e-5)


@pytest.mark.slow
def test_lengths_that_do_not_divide_stay_whole() -> None:
    lm, x = MODELS["rotary"], tiny.batch([[one] for one in tiny.EXAMPLES], 7, 6)
    params = tiny.params(lm)
    forms.assert_equal(forms.on(SEQUENCE, lm, params, x), forms.scored(lm, params, x), 1e-5)


@functools.partial(jax.jit, static_argnums=0)
def decoded(lm: ConditionalLM, params: Params, prompts: Prompts, tokens: jax.Array) -> tuple[jax.Array, object]:
    """Return the logits before and after each of three tokens, and the cache."""
    logits, cache = lm.prefill(params, prompts, 5)
    every = [logits]
    for t in range(3):
        logits, cache = lm.step(params, cache, tokens[:, t])
        every.append(logits)
    return jnp.stack(every), cache


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("rotary", BOTH), ("rotary", MeshConfig(data=1, tensor=2, sequence=2)), ("windowed", SEQUENCE)]
    + [("t5", BOTH), *(pytest.param(name, BOTH, marks=pytest.mark.slow) for name in ("t5gemma", "t5gemma 2"))],
)
def test_decoding_with_cut_caches_equals_one_device(name: str, mesh: MeshConfig) -> None:
    lm, params = MODELS[name], tiny.params(MODELS[name])
    x = tiny.batch([[one] for one in tiny.EXAMPLES], 8, 5, references=2)
    expected, _ = decoded(lm, params, tiny.prompts_of(x), x.response)
    on = make_mesh(mesh, jax.devices()[:4])
    placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, on))
    with use(on, DEFAULT_RULES):
        found, cache = jax.block_until_ready(
            decoded(lm, placed, put_batch(tiny.prompts_of(x), on, row_axis=0), x.response)
        )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rows, heads = ("data" if mesh.data == 2 else None), ("tensor" if mesh.tensor == 2 else None)
    for path, part in jax.tree.leaves_with_path(cache):
        if part.ndim >= 4:
            # Slots are rounded up to what divides. Those of prompts' keys come last.
            turned = ".prompt" in jax.tree_util.keystr(path) and ".keys" in jax.tree_util.keystr(path)
            spec = part.sharding.spec[part.ndim - 4 :]
            wanted = (rows, heads, None, "sequence") if turned else (rows, heads, "sequence", None)
            assert spec == wanted[: len(spec)], part.shape
            assert part.addressable_shards[0].data.size == part.size // 4


def memory(lm: ConditionalLM, parts: int) -> int:
    """Return the bytes of intermediate results on each device of a training step on long rows."""
    mesh = make_mesh(MeshConfig(data=1, sequence=parts), jax.devices()[:parts])
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree: object, shardings: object) -> object:
        return jax.tree.map(
            lambda leaf, cut: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut), tree, shardings
        )

    x = jax.eval_shape(lambda: tiny.batch([[]], 1536, 512))
    x = placed(x, jax.tree.map(lambda leaf: whole, x))
    params = placed(lm.abstract(), specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(lm.logprobs(params, x).logp)))
    with use(mesh, DEFAULT_RULES):
        return step.lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("lm", "least"), [(GROUPED, 2.4), (EncoderDecoder(tiny.T5), 3.4)], ids=["rotary", "t5"])
def test_intermediate_results_shrink_with_the_number_of_parts(lm: ConditionalLM, least: float) -> None:
    # Keys and values are whole everywhere. Where scores exist a block at a time, those are most of what is left.
    assert least < memory(lm, 1) / memory(lm, 4) < 4.5


@pytest.mark.parametrize("name", ["rotary", "t5"])
def test_sampling_holds_parts_of_caches_and_responses(name: str) -> None:
    lm, rows, new = MODELS[name], 4, 24
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    x = tiny.batch([[one] for one in tiny.EXAMPLES], 8, 5)
    keys = jax.random.split(jax.random.key(0), rows)
    placed = jax.device_put(tiny.params(lm), specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
    sample = jax.jit(
        lambda params, prompts, keys: generate(
            lm, params, prompts, keys, Sampling(), max_new=new, eos_ids=(1,), pad_id=0
        )
    )
    with use(mesh, DEFAULT_RULES):
        prompts = put_batch(tiny.prompts_of(x), mesh, row_axis=0)
        compiled = sample.lower(placed, prompts, keys).compile()
    for leaf in jax.tree.leaves(compiled.output_shardings):
        assert leaf.spec == PartitionSpec("data")
    heads, slots = (2, new) if name == "rotary" else (2, new + 1)
    carried = re.findall(r"f32\[2,(\d+),(\d+),(\d+),8\]", compiled.as_text())
    sizes = {tuple(map(int, one)) for one in carried if int(one[2]) == slots}
    assert (rows // 2, heads // 2, slots) in sizes
    assert not sizes & {(rows, heads, slots), (rows // 2, heads, slots), (rows, heads // 2, slots)}
