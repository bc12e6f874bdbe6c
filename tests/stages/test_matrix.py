"""Every objective, a rollout and a checkpoint, for every family, whole and with adapters."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.types import Comparisons, Conditional, Experience, Params
from pit_jax.decode.batches import Sampler
from pit_jax.decode.sampling import Sampling
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.losses.policy import PolicyLoss
from pit_jax.losses.preference import COMPARISONS
from pit_jax.models.config import ModelConfig, RopeScaling
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.lora import Lora
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.models.trained import Network, divide, language_model_of, whole
from pit_jax.rl.config import RlConfig
from pit_jax.rl.experience import objective as rl_objective
from pit_jax.stages.dpo import REFERENCE, preference_objective
from pit_jax.stages.reward import comparison_objective
from pit_jax.stages.sft import likelihood
from pit_jax.stages.supervised import with_more
from pit_jax.text.codec import PromptRow, rows_to_prompts
from pit_jax.train.optim import Optimizer, build
from pit_jax.train.state import TrainState
from pit_jax.train.step import Objective, make_step

VOCABULARY, S, T = 32, 6, 5
_SHAPE: dict[str, Any] = dict(vocab_size=VOCABULARY, width=16, heads=2, head_dim=8, mlp=24)
_DECODER = _SHAPE | dict(layers=2, kv_heads=1)
_GEMMA = _DECODER | dict(activation="gelu_tanh", norm_offset=1.0, scale_embedding=True)
_T5 = _SHAPE | dict(encoder_layers=2, decoder_layers=1, relative_buckets=8, relative_max_distance=16)
_LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_positions=8)
FAMILIES: dict[str, ModelConfig] = {
    "llama2": DecoderOnlyConfig(**_DECODER, tied=False),
    "llama3": DecoderOnlyConfig(**_DECODER, rope_scaling=_LLAMA3),
    "mistral": DecoderOnlyConfig(**_DECODER, window=3, tied=False),
    "qwen2": DecoderOnlyConfig(**_DECODER, qkv_bias=True),
    "qwen3": DecoderOnlyConfig(**_DECODER, qk_norm=True),
    "gemma": DecoderOnlyConfig(**_GEMMA),
    "gemma2": DecoderOnlyConfig(
        **_GEMMA, post_norms=True, window=3, global_every=2, attention_softcap=50.0, logit_softcap=30.0
    ),
    "gemma3": DecoderOnlyConfig(
        **_GEMMA, post_norms=True, qk_norm=True, window=3, global_every=2, local_rope_base=100.0
    ),
    "t5x_prefix_lm": DecoderOnlyConfig(**_DECODER, position="relative", attention_scale=1.0, prefix_lm=True),
    "t5": EncoderDecoderConfig(**_T5, tied=True, activation="relu", gated=False),
    "flan_t5": EncoderDecoderConfig(**_T5),
    "umt5": EncoderDecoderConfig(**_T5, relative_per_layer=True),
    "t5gemma": preset("t5gemma-nano", vocab_size=VOCABULARY),
    "t5gemma2": preset("t5gemma-2-nano", vocab_size=VOCABULARY),
}
ADAPTERS = {"whole": None, "adapters": Lora(rank=2, alpha=4.0)}
OPTIMIZER = Optimizer(learning_rate=1e-2, kind="sgd", b1=0.0, clip_norm=None)
"""The plainest, because what is compiled is most of the time."""
RNG = np.random.default_rng(0)


def conditional(rows: int) -> Conditional:
    """Return prompts with a reference in their midst, and responses of several lengths."""
    prompt, response = (RNG.integers(3, VOCABULARY, (rows, n)).astype(np.int32) for n in (S, T))
    prompt_mask = np.arange(S)[None, :] < RNG.integers(3, S + 1, (rows, 1))
    response_mask = np.arange(T)[None, :] < RNG.integers(2, T + 1, (rows, 1))
    reference = prompt_mask & (np.arange(S)[None, :] >= 1)
    arrays = (prompt * prompt_mask, prompt_mask, reference, response * response_mask, response_mask)
    dtypes = (np.int32, np.int32, bool, np.int32, np.int32)
    names = ("prompt", "prompt_segments", "prompt_reference", "response", "response_segments")
    return Conditional(**{name: jnp.asarray(a.astype(d)) for name, a, d in zip(names, arrays, dtypes, strict=True)})


def comparisons(passes: int, pairs: int = 2) -> Comparisons:
    """Return the passes of some pairs, one a row."""
    rows = passes * pairs
    return Comparisons(
        inputs=conditional(rows),
        index=jnp.arange(rows, dtype=jnp.int32).reshape(passes, pairs),
        weight=jnp.ones(pairs),
        length=jnp.full((passes, pairs), T, jnp.int32),
    )


def experience(rows: int = 4) -> Experience:
    """Return sampled responses with advantages of both signs."""
    inputs = conditional(rows)
    mask = (inputs.response_segments > 0).astype(jnp.float32)
    logp = -2.0 * mask
    advantage = mask * jnp.where(jnp.arange(rows) % 2 == 0, 1.0, -1.0)[:, None]
    return Experience(
        inputs=inputs,
        logp_sampler=logp,
        logp_old=logp,
        logp_anchor=logp,
        advantage=advantage,
        returns=advantage,
        values_old=jnp.zeros_like(logp),
    )


@functools.cache
def batches() -> dict[str, Any]:
    """Return a batch for every objective."""
    made = {"sft": conditional(4), "bt": comparisons(2), "gap": comparisons(4), "rl": experience(), "ppo": experience()}
    made["dpo"] = made["bt"]
    return {name: jax.tree.map(lambda leaf: leaf[None], batch) for name, batch in made.items()}


def stages(lm: Any) -> dict[str, tuple[Network, Objective]]:
    """Return network and objective of every stage."""
    policy = PolicyLoss(kind="ppo_clip")
    scalar = ScalarModel(lm)
    return {
        "sft": (lm, likelihood(lm, 1e-4)),
        "bt": (scalar, comparison_objective(scalar, "bt", (), 1)),
        "gap": (scalar, comparison_objective(scalar, "gap", COMPARISONS, 1)),
        "dpo": (lm, preference_objective(lm, 0.1, 1)),
        "rl": (lm, rl_objective(lm, RlConfig(samples_per_prompt=2))),
        "ppo": (ValueModel(lm), rl_objective(lm, RlConfig(samples_per_prompt=2, estimator="ppo", policy=policy))),
    }


def one_step(
    network: Network, objective: Objective, batch: Any, params: Params, beside: Params | None = None
) -> Params:
    """Return the parameters after one update, which has changed something, and adapters and heads alone."""
    base, trained = divide(network, params)
    frozen = with_more(base, beside)
    before = jax.tree.map(np.asarray, trained)
    state = TrainState(params=trained, opt_state=build(OPTIMIZER, 3).init(trained), step=jnp.int32(0))
    state, metrics = make_step(objective, OPTIMIZER, steps=3)(state, batch, jax.random.key(2), frozen)
    assert metrics["loss_is_finite"].total == 1
    assert np.isfinite(metrics["loss"].total)
    # Adapters' A stand still in the first step, because their B are 0.
    pairs = zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
    assert any(bool(np.any(a != np.asarray(b))) for a, b in pairs)
    after = whole(base, state.params)
    assert jax.tree.structure(after) == jax.tree.structure(network.abstract())
    return after


def drawn(network: Network) -> Params:
    """Return random parameters without compiling anything; B of adapters are 0, as at their start."""
    rng = np.random.default_rng(7)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        value = rng.normal(0.0, 0.3, leaf.shape) + (name == "scale")
        return jnp.asarray(0.0 * value if name == "lora_b" else value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, network.abstract())


# A decoder and an encoder-decoder; the others differ from them in settings and layers, which tests/models compares.
KEPT = ("t5",)
# All objectives are built from these three: `bt` is a part of `gap`'s program, `rl` of `ppo`'s, `dpo` is `sft`'s twice.
FAST = ("sft", "gap", "ppo")
CASES = [
    pytest.param(family, adapters, FAST, marks=[] if adapters == "adapters" and family in KEPT else pytest.mark.slow)
    for family in FAMILIES
    for adapters in ADAPTERS
] + [pytest.param(family, "adapters", ("bt", "rl", "dpo"), marks=pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize(("family", "adapters", "names"), CASES)
def test_every_stage_with_every_family(
    family: str, adapters: str, names: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    lm = language_model(dataclasses.replace(FAMILIES[family], lora=ADAPTERS[adapters]))
    after: dict[str, Params] = {}
    for name in names:
        network, objective = stages(lm)[name]
        beside = {REFERENCE: drawn(network)} if name == "dpo" else None
        after[name] = one_step(network, objective, batches()[name], drawn(network), beside)
    check_rollout(lm, drawn(lm))
    network, _ = stages(lm)[names[-1]]
    check_restore(network, after[names[-1]], tmp_path)


def check_rollout(lm: Any, params: Params) -> None:
    """Sample, and compare the sampler's log-probabilities with the training graph's."""
    rows = [PromptRow((4, 5, 6, 7), (1, 3)), PromptRow((9,), (0, 0))]
    prompts = rows_to_prompts(rows, S, 0)
    sampler = Sampler(lm=lm, sampling=Sampling(), width=S, max_new=T, eos_ids=(1, 2), pad_id=0, batch_size=2)
    samples = sampler.sample(params, prompts, jax.random.split(jax.random.key(0), 2))
    x = Conditional(
        prompt=jnp.asarray(prompts.tokens),
        prompt_segments=jnp.asarray(prompts.mask).astype(jnp.int32),
        prompt_reference=jnp.asarray(prompts.reference),
        response=jnp.asarray(samples.tokens),
        response_segments=jnp.asarray(samples.mask).astype(jnp.int32),
    )
    logp = jax.jit(lm.logprobs)(params, x).logp
    np.testing.assert_allclose(samples.logp, logp, atol=2e-5)


def check_restore(network: Network, params: Params, directory: pathlib.Path) -> None:
    """Save what is trained, restore it, and put it together again."""
    frozen, trained = divide(network, params)
    checkpoints = Checkpoints(directory, keep=None, asynchronous=False)
    checkpoints.save(1, {"params": trained}, {})
    restored = whole(frozen, checkpoints.restore_params(1, divide(network, network.abstract())[1]))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert language_model_of(network).config.lora is None or frozen is not None
