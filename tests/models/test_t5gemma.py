"""T5Gemma 1 and 2: the invariances of every model, and what is their own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import tree
from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Params
from pit_jax.models.config import RopeScaling
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.presets.t5gemma import T5GEMMA
from pit_jax.models.t5gemma import EncoderSize, T5Gemma, T5GemmaConfig
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs

from . import tiny
from .test_lora_layers import ALL, plain

SHAPE = dict(vocab_size=tiny.VOCABULARY, width=16, heads=4, kv_heads=2, head_dim=8, mlp=24, role_embedding=True)
SHAPE |= dict(decoder_layers=2, tied=False, window=3, global_every=2)
ONE = T5GemmaConfig(
    **SHAPE,
    encoder_layers=3,
    encoder=EncoderSize(width=12, heads=2, kv_heads=1, head_dim=6, mlp=20),
    encoder_window=(2, 1),
    attention_softcap=5.0,
    logit_softcap=6.0,
)
TWO = T5GemmaConfig(
    **SHAPE,
    encoder_layers=2,
    encoder_window=(1, 2),
    qk_norm=True,
    merged_attention=True,
    shared_embedding=True,
    rope_scaling=RopeScaling(kind="linear", factor=4.0),
    local_rope_base=50.0,
)
MODELS = {"one": T5Gemma(ONE), "two": T5Gemma(TWO)}
KEY = jax.random.key(0)
PUBLISHED = {"t5gemma-s-s": 312_517_632, "t5gemma-b-b": 591_490_560}
ABOUT = {
    "t5gemma-l-l": 1.2e9,
    "t5gemma-ml-ml": 2.2e9,
    "t5gemma-xl-xl": 3.8e9,
    "t5gemma-2b-2b": 5.6e9,
    "t5gemma-9b-2b": 12.3e9,
    "t5gemma-9b-9b": 20.3e9,
    "t5gemma-2-270m-270m": 370e6,
    "t5gemma-2-1b-1b": 1.7e9,
    "t5gemma-2-4b-4b": 7.1e9,
    "t5gemma-nano": 190e3,
    "t5gemma-2-nano": 157e3,
}


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "two"))
def test_neither_padding_nor_packing_changes_anything(name: str) -> None:
    lm, one = MODELS[name], tiny.EXAMPLES
    params, apart = tiny.params(lm), tiny.plain()
    wide = tiny.batch([[*one[:3]], [one[3], one[0]]], 16, 13, references=2)
    # What stands at padding must not matter either.
    wide = dataclasses.replace(
        wide,
        prompt=jnp.where(wide.prompt_segments > 0, wide.prompt, 7),
        response=jnp.where(wide.response_segments > 0, wide.response, 9),
    )
    expected, found = tiny.everything(lm, params, apart), tiny.everything(lm, params, wide)
    for (row, segment), number in {(0, 1): 0, (0, 2): 1, (0, 3): 2, (1, 1): 3, (1, 2): 0}.items():
        here, there = wide.response_segments[row] == segment, apart.response_segments[number] > 0
        np.testing.assert_allclose(found[0].logp[row, here], expected[0].logp[number, there], atol=1e-5)
        prompts_here, prompts_there = wide.prompt_segments[row] == segment, apart.prompt_segments[number] > 0
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(mine.response[row, here], theirs.response[number, there], atol=1e-5)
            np.testing.assert_allclose(mine.prompt[row, prompts_here], theirs.prompt[number, prompts_there], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_the_full_pass(name: str) -> None:
    lm, params = MODELS[name], tiny.params(MODELS[name])
    examples = [([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]), ([12], [13, 14, 15, 16, 17]), ([18, 19, 20], [1] * 5)]
    x = tiny.batch([[example] for example in examples], 6, 5, references=2)
    expected = jax.jit(lm.logprobs)(params, x)
    logits, cache = jax.jit(lm.prefill, static_argnums=2)(params, tiny.prompts_of(x), 5)
    step, rows = jax.jit(lm.step), np.arange(len(examples))
    for t in range(5):
        logp = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(logp[rows, np.asarray(x.response[:, t])], expected.logp[:, t], atol=1e-5)
        logits, cache = step(params, cache, x.response[:, t])
    # The call after the last token has room too.
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_carried_without_copies(name: str) -> None:
    lm, params = MODELS[name], tiny.params(MODELS[name])
    prompts = tiny.prompts_of(tiny.batch([[([5, 6, 7], [8])]], 3, 1))
    _, cache = jax.eval_shape(lambda: lm.prefill(params, prompts, 4))
    compiled = jax.jit(lm.step, donate_argnums=1).lower(params, cache, jnp.zeros(1, jnp.int32)).compile()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.prompt, cache.own)))
    assert compiled.memory_analysis().alias_size_in_bytes >= whole


def reach(lm: T5Gemma, read) -> np.ndarray:
    """Return whether read(params)[t] depends on token id v, as [t, v], by the gradients of the embeddings."""
    params, names = tiny.params(lm), [n for n in ("embedding", "encoder_embedding") if n in lm.abstract()]

    def outputs(tables: dict[str, jax.Array]) -> jax.Array:
        return read(params | {name: params[name] | {"token": tables[name]} for name in names})

    tables = {name: params[name]["token"] for name in names}
    return sum(np.any(one != 0, axis=-1) for one in jax.jit(jax.jacrev(outputs))(tables).values()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_token_is_predicted_from_all_before_it_and_nothing_else(name: str) -> None:
    lm, start = MODELS[name], MODELS[name].config.start_id
    # Every id occurs once, so the gradient of an id's embedding is that of its place.
    packed = tiny.batch([[([1, 3, 4], [11, 12, 13, 14]), ([5, 6], [21, 22])]], 7, 8)
    found = reach(lm, lambda params: lm.logprobs(params, packed).logp[0])
    first = {t: {start, 1, 3, 4} | set(range(11, 11 + t)) for t in range(4)}
    for t, expected in (first | {4: {start, 5, 6}, 5: {start, 5, 6, 21}, 6: set(), 7: set()}).items():
        assert set(np.flatnonzero(found[t])) == expected, t


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "two"))
def test_windows_reach_as_far_as_they_say(name: str) -> None:
    config = dataclasses.replace(MODELS[name].config, global_every=0, encoder_layers=1, decoder_layers=1)
    lm, (before, after) = T5Gemma(config), config.encoder_window
    ids = list(range(11, 19))
    x = tiny.batch([[([1, 3, 4, 5, 6, 7, 8], ids)]], 7, 8)
    found = reach(lm, lambda params: lm.hidden(params, x, attention="causal").prompt[0, :, 0])
    assert set(np.flatnonzero(found[3])) == {1, 3, 4, 5, 6, 7, 8} & set([1, 3, 4, 5, 6, 7, 8][3 - before : 4 + after])
    found = reach(lm, lambda params: lm.hidden(params, x, attention="causal").response[0, :, 0])
    # Inputs are shifted: the state of place 6 reads ids[5], and with a window of 3 the two before it.
    assert set(np.flatnonzero(found[6])) == {1, 3, 4, 5, 6, 7, 8} | set(ids[3:6])


@pytest.mark.parametrize("name", MODELS)
def test_bidirectional_sees_the_whole_segment(name: str) -> None:
    lm = MODELS[name]
    packed = tiny.batch([[([1, 2], [11, 12]), ([4], [21, 22])]], 4, 5)
    hidden = functools.partial(lm.hidden, attention="bidirectional")
    found = reach(lm, lambda params: jnp.concatenate(hidden(params, packed), axis=1)[0, :, 0])
    for t, segment in enumerate([1, 1, 2, 0, 1, 1, 2, 2, 0]):
        assert set(np.flatnonzero(found[t])) == {1: {1, 2, 11, 12}, 2: {4, 21, 22}, 0: {0}}[segment], t


@pytest.mark.parametrize("name", tiny.slow_but(MODELS))
def test_scan_remat_and_chunks_change_nothing(name: str) -> None:
    config, x = dataclasses.replace(MODELS[name].config, dropout=0.2), tiny.plain()

    def gradients(lm: T5Gemma, key: jax.Array | None) -> tuple[jax.Array, Params]:
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(lm.logprobs(p, x, key).logp)))(tiny.params(lm))

    expected, expected_grads = gradients(T5Gemma(config), KEY)
    assert not np.allclose(expected, jnp.sum(tiny.logp(T5Gemma(config), tiny.params(T5Gemma(config)), x)))
    changed = dataclasses.replace(config, scan_layers=False, remat="dots", logprob_chunk=20)
    value, grads = gradients(T5Gemma(changed), KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-6, err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_equal_merged_weights(name: str) -> None:
    base, x = MODELS[name], tiny.plain()
    lm = T5Gemma(dataclasses.replace(base.config, lora=ALL))
    params = tiny.params(lm)
    expected = tiny.logp(base, plain(params, ALL.scale), x)
    np.testing.assert_allclose(tiny.logp(lm, params, x), expected, atol=5e-5)
    assert not np.allclose(expected, tiny.logp(base, plain(params, 0.0), x), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "two"))
def test_four_devices_equal_one(name: str) -> None:
    lm, mesh = MODELS[name], make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    params, x = tiny.params(lm), tiny.plain()
    step = jax.jit(jax.value_and_grad(lambda p, x: jnp.mean(lm.logprobs(p, x).logp)))
    expected, expected_grads = jax.block_until_ready(step(params, x))
    cut = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
    assert not cut["decoder"]["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        value, grads = jax.block_until_ready(step(cut, put_batch(x, mesh, row_axis=0)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for (path, one), (_, other) in zip(tree.named_leaves(grads), tree.named_leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_abstract_and_axes_describe_the_parameters(name: str) -> None:
    lm, config = MODELS[name], MODELS[name].config
    made, shapes = jax.eval_shape(lm.init, KEY), lm.abstract()
    assert jax.tree.map(lambda leaf: leaf.shape, made) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    axes = dict(tree.named_leaves(jax.tree.map("|".join, lm.axes(), is_leaf=lambda node: isinstance(node, tuple))))
    for path, leaf in tree.named_leaves(shapes):
        names = axes[path].split("|")
        assert len(names) == leaf.ndim, path
        across = "/cross/key/" in path or "/cross/value/" in path
        width = config.prompt_width if across or path.startswith("encoder") else config.width
        assert leaf.shape[names.index("embed")] == width if "embed" in names else True, path
    assert ("cross" in shapes["decoder"]["layers"]) == (name == "one")


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_reward_reads_whichever_stack_it_must(attention: str) -> None:
    model, x = ScalarModel(MODELS["one"], readout="last", attention=attention), tiny.plain()
    params, made = tiny.params(model), jax.eval_shape(model.init, KEY)
    width = {"bidirectional": 12, "causal": 16}[attention]
    assert params["head"]["kernel"].shape == made["head"]["kernel"].shape == (width,)
    assert np.all(np.isfinite(jax.jit(model.scores, static_argnums=2)(params, x, 1)))
    assert jax.eval_shape(ValueModel(MODELS["one"]).init, KEY)["head"]["kernel"].shape == (16,)


def test_means_over_states_of_two_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="different widths, 12 and 16"):
        ScalarModel(MODELS["one"], attention="causal")
    ScalarModel(MODELS["two"], attention="causal")


@pytest.mark.parametrize("name", T5GEMMA)
def test_parameter_counts(name: str) -> None:
    config = T5GemmaConfig(**T5GEMMA[name])
    count = tree.parameter_count(T5Gemma(config).abstract())
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:
        np.testing.assert_allclose(count, ABOUT[name], rtol=0.04)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "T5GemmaConfig.kv_heads = 3 must divide heads = 4"),
        ({"head_dim": 3}, "T5GemmaConfig.head_dim = 3 must be even"),
        ({"start_id": 99}, r"start_id = 99 must lie in \[0, 48\)"),
        ({"encoder_window": None}, "encoder_window = None must be given with window"),
        ({"encoder_window": (1, -1)}, "two numbers, at least 0"),
        ({"window": None}, "encoder_window = .* must be left out without a window"),
        ({"merged_attention": True}, "merged_attention = True must be False where the encoder has a width"),
        ({"shared_embedding": True}, "shared_embedding = True must be False where"),
        ({"logit_softcap": 0.0}, "logit_softcap = 0.0 must be positive"),
        ({"decoder_layers": 0}, "decoder_layers = 0 must be at least 1"),
    ],
)
def test_contradictions_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ONE, **change)
    with pytest.raises(ConfigError, match="EncoderSize.kv_heads = 3 must divide heads = 2"):
        dataclasses.replace(ONE.encoder, kv_heads=3)
