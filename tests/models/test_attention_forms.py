"""The flash kernels give what plain attention gives, in every family: values, gradients, on one device and on four."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Conditional, Params
from pit_jax.models import attending
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.ops import blocks, cudnn
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use

from . import test_t5gemma as gemmas
from . import tiny

PREFIX = dataclasses.replace(tiny.ROTARY, heads=4, kv_heads=2, prefix_lm=True)
MODELS: dict[str, ConditionalLM] = {
    "rotary": tiny.MODELS["rotary"],
    "windowed": tiny.MODELS["windowed"],
    "gemma3": tiny.MODELS["gemma3"],
    "prefix": DecoderOnly(PREFIX),
    "t5": tiny.MODELS["t5"],
    "t5gemma": gemmas.MODELS["one"],
    "t5gemma 2": gemmas.MODELS["two"],
}
MESHES = {"data x tensor": MeshConfig(data=2, tensor=2), "sequence x tensor": MeshConfig(tensor=2, sequence=2, data=1)}


def packed() -> Conditional:
    """Return rows with several examples, padding between prompt and response, a missing prompt and an empty row."""
    one = tiny.EXAMPLES
    return tiny.batch([[*one[:2], one[3]], [one[1], ([], [5, 6])], [one[2]], []], 16, 12, references=2)


def with_form(lm: ConditionalLM, form: str, **changes) -> ConditionalLM:
    return type(lm)(dataclasses.replace(lm.config, attention=form, **changes))


def on(mesh_config: MeshConfig, lm: ConditionalLM, params: Params, x: Conditional) -> tuple:
    """Return what `scored` does, over four devices."""
    mesh = make_mesh(mesh_config, jax.devices()[:4])
    placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
    with use(mesh, DEFAULT_RULES):
        return jax.block_until_ready(scored(lm, placed, put_batch(x, mesh, row_axis=0)))


@functools.partial(jax.jit, static_argnums=0)
def scored(lm: ConditionalLM, params: Params, x: Conditional) -> tuple:
    """Return the log-probabilities, the bidirectional states, and the gradient of a function of both."""

    def total(params: Params) -> tuple[jax.Array, tuple]:
        hidden = lm.hidden(params, x, attention="bidirectional")
        states = jnp.concatenate(hidden, axis=1)
        there = jnp.concatenate([x.prompt_segments, x.response_segments], axis=1) > 0
        states = jnp.where(there[:, :, None], states, 0.0).astype(jnp.float32)
        logp = lm.logprobs(params, x).logp
        return jnp.sum(logp) + jnp.sum(jnp.sin(states)), (logp, states)

    grads, outputs = jax.grad(total, has_aux=True)(params)
    return outputs, grads


def assert_equal(found: tuple, expected: tuple, atol: float) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, atol=atol)
    for (path, one), (_, other) in zip(tree.named_leaves(found[1]), tree.named_leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=atol * (1 + np.abs(other).max()), err_msg=path)


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "rotary", "prefix"))
def test_splash_equals_xla(name: str) -> None:
    lm, params, x = MODELS[name], tiny.params(MODELS[name]), packed()
    found = scored(with_form(lm, "splash"), params, x)
    assert_equal(found, scored(with_form(lm, "xla"), params, x), 3e-5)


@pytest.mark.parametrize("mesh", tiny.slow_but(MESHES, "sequence x tensor"))
@pytest.mark.parametrize("name", tiny.slow_but(["windowed", "prefix", "t5gemma 2"], "prefix"))
def test_splash_over_four_devices_equals_xla_on_one(name: str, mesh: str) -> None:
    lm, params, x = MODELS[name], tiny.params(MODELS[name]), packed()
    found = on(MESHES[mesh], with_form(lm, "splash"), params, x)
    assert_equal(found, scored(with_form(lm, "xla"), params, x), 3e-5)


def in_blocks(monkeypatch: pytest.MonkeyPatch, lm: ConditionalLM, params: Params, x: Conditional, least: int) -> tuple:
    """Return what `scored` does, with plain attention in blocks of 8 queries from so many keys on, and their number."""
    calls, attend = [], blocks.attend

    def noted(*arrays: jax.Array, mask: jax.Array, plan: blocks.Plan) -> jax.Array:
        calls.append(len(plan.blocks))
        return attend(*arrays, mask=mask, plan=plan)

    for name, value in {"_LONG_ON_CPU": least, "_SMALLEST": 8, "_CACHED": 1}.items():
        monkeypatch.setattr(attending, name, value)
    monkeypatch.setattr(blocks, "attend", noted)
    # A function of its own: the constants are no part of what compiled functions are known by.
    return jax.jit(lambda params, x: scored.__wrapped__(lm, params, x))(params, x), calls


@pytest.mark.parametrize("name", tiny.slow_but(["rotary", "windowed", "gemma3", "prefix", "t5gemma 2"], "rotary"))
def test_blocks_equal_xla(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, params, x = with_form(MODELS[name], "xla"), tiny.params(MODELS[name]), packed()
    found, calls = in_blocks(monkeypatch, lm, params, x, 1)
    assert calls and max(calls) > 1
    expected, calls = in_blocks(monkeypatch, lm, params, x, 1000)
    assert not calls
    assert_equal(found, expected, 3e-5)


@pytest.mark.parametrize("mesh", tiny.slow_but(MESHES, "data x tensor"))
def test_blocks_over_four_devices_equal_xla_on_one(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, x = with_form(MODELS["prefix"], "xla"), packed()
    params = tiny.params(lm)
    expected, _ = in_blocks(monkeypatch, lm, params, x, 1000)
    devices = make_mesh(MESHES[mesh], jax.devices()[:4])
    placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, devices))
    with use(devices, DEFAULT_RULES):
        found, calls = in_blocks(monkeypatch, lm, placed, put_batch(x, devices, row_axis=0), 1)
        jax.block_until_ready(found)
    assert calls and max(calls) > 1
    assert_equal(found, expected, 3e-5)


@pytest.fixture
def calls_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let the calls of cuDNN take float32, as they can without a GPU, and note them: there XLA runs them."""
    calls, attend = [], cudnn.attend

    def noted(*arrays: jax.Array, scale: float, on_gpu: bool) -> jax.Array:
        calls.append(on_gpu)
        return attend(*arrays, scale=scale, on_gpu=on_gpu)

    monkeypatch.setattr(cudnn, "takes", lambda dtype, width: True)
    monkeypatch.setattr(cudnn, "attend", noted)
    return calls


@pytest.mark.parametrize("name", tiny.slow_but(["gemma3", "prefix", "t5", "t5gemma 2"], "prefix"))
def test_the_calls_of_cudnn_equal_xla(name: str, calls_of_cudnn: list[bool]) -> None:
    lm, params, x = MODELS[name], tiny.params(MODELS[name]), packed()
    found = scored(with_form(lm, "cudnn"), params, x)
    assert calls_of_cudnn and not any(calls_of_cudnn)
    assert_equal(found, scored(with_form(lm, "xla"), params, x), 3e-5)


@pytest.mark.slow
def test_the_calls_of_cudnn_over_four_devices_equal_xla_on_one(calls_of_cudnn: list[bool]) -> None:
    lm, x = with_form(MODELS["windowed"], "cudnn", attention_softcap=None), packed()
    params = tiny.params(lm)
    found = on(MESHES["sequence x tensor"], lm, params, x)
    assert calls_of_cudnn
    assert_equal(found, scored(with_form(lm, "xla"), params, x), 3e-5)


def test_auto_follows_the_platform_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tiny.ROTARY, dtype="bfloat16")

    def chosen(where: str, config=config, keys: int = 256, softcap: float | None = None, bias: bool = False) -> str:
        monkeypatch.setattr(attending, "platform", lambda: where)
        return attending.form(config, keys, softcap=softcap, bias=bias)

    assert [chosen(where) for where in ("cpu", "tpu", "gpu")] == ["xla", "splash", "cudnn"]
    assert chosen("tpu", bias=True) == chosen("gpu", bias=True) == chosen("gpu", softcap=5.0) == "xla"
    assert chosen("tpu", softcap=5.0) == "splash"
    assert chosen("tpu", keys=64) == "xla"
    assert chosen("gpu", dataclasses.replace(config, dtype="float32")) == "xla"
    assert chosen("gpu", dataclasses.replace(config, head_dim=12)) == "xla"
    assert chosen("tpu", dataclasses.replace(config, attention="xla")) == "xla"
    with pytest.raises(ConfigError, match="attention = 'splash' must be 'auto' or 'xla' on a gpu"):
        chosen("gpu", dataclasses.replace(config, attention="splash"))
    with pytest.raises(ConfigError, match="attention = 'cudnn' must be 'auto' or 'xla' on a tpu"):
        chosen("tpu", dataclasses.replace(config, attention="cudnn"))


def test_kernels_need_no_mask() -> None:
    lm, length = MODELS["windowed"], 2048
    x = jax.eval_shape(lambda: tiny.batch([[]], length // 2, length // 2))

    def program(form: str) -> str:
        form_of = with_form(lm, form)
        return str(jax.make_jaxpr(lambda p, x: form_of.logprobs(p, x).logp)(lm.abstract(), x))

    assert f"{length},{length}]" in program("xla")
    assert f"{length},{length}]" not in program("splash")


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="attention = 'flash' must be one of auto, xla, splash, cudnn"):
        dataclasses.replace(tiny.ROTARY, attention="flash")
