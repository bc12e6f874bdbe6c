"""Rows that are replaced as they end give the samples of whole batches."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Prompts, Samples
from pit_jax.decode.batches import Sampler
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM
from tests.models import tiny

TOY = ToyLM()
LENGTH = 7


def _prompts(count: int, vocabulary: int) -> Prompts:
    random = np.random.default_rng(count)
    mask = np.arange(5)[None, :] < random.integers(1, 6, count)[:, None]
    return Prompts(
        tokens=np.where(mask, random.integers(3, vocabulary, mask.shape), PAD).astype(np.int32),
        mask=mask,
        reference=np.zeros_like(mask),
    )


def _sampler(lm: ConditionalLM, rows: int, **change: object) -> Sampler:
    settings = dict(lm=lm, sampling=Sampling(), width=5, max_new=LENGTH, pad_id=PAD, batch_size=rows)
    return Sampler(**(settings | {"eos_ids": (EOS, OTHER_EOS)} | change))


def _keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(5), count)


def _assert_same(found: Samples, expected: Samples) -> None:
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(vars(found)[name], vars(expected)[name])
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "samples", "portions", "draws"),
    [(4, 1, 4, "gumbel"), (4, 2, 2, "inverse"), (6, 3, 1, "gumbel"), (5, 1, 2, "gumbel"), (3, 2, 8, "gumbel")],
)
def test_samples_are_those_of_whole_batches(rows: int, samples: int, portions: int, draws: str) -> None:
    params, prompts, keys = TOY.init(jax.random.key(7)), _prompts(11, 6), _keys(11 * samples)
    plain = _sampler(TOY, rows, sampling=Sampling(draws=draws))
    _assert_same(
        dataclasses.replace(plain, portions=portions).sample(params, prompts, keys), plain.sample(params, prompts, keys)
    )


@pytest.mark.parametrize("name", ["windowed", "learned", "t5x_decoder", "t5", "int8"])
def test_caches_of_every_kind_take_new_rows(name: str) -> None:
    small = DecoderOnly(dataclasses.replace(tiny.LEARNED, cache_dtype="int8"))
    lm = (tiny.MODELS | {"int8": small})[name]
    params, prompts, keys = tiny.params(lm), _prompts(7, tiny.VOCABULARY), _keys(14)
    # A quarter of the vocabulary ends a row, so that they end at different times.
    plain = _sampler(lm, 4, eos_ids=tuple(range(12)))
    expected = plain.sample(params, prompts, keys)
    assert len(set(expected.mask.sum(-1).tolist())) > 3
    _assert_same(dataclasses.replace(plain, portions=2).sample(params, prompts, keys), expected)


def test_fewer_steps_are_taken_where_lengths_differ() -> None:
    steps = []

    class Counting(ToyLM):
        def step(self, params, cache, token):  # noqa: ANN001, ANN202
            jax.debug.callback(lambda: steps.append(1))
            return super().step(params, cache, token)

    params, prompts, keys = TOY.init(jax.random.key(7)), _prompts(40, 6), _keys(40)
    counts = []
    for portions in (0, 4):
        steps.clear()
        _sampler(Counting(), 8, max_new=40, portions=portions).sample(params, prompts, keys)
        jax.effects_barrier()
        counts.append(len(steps))
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.slow
def test_devices_share_the_rows() -> None:
    lm = tiny.MODELS["rotary"]
    params, prompts, keys = tiny.params(lm), _prompts(14, tiny.VOCABULARY), _keys(14)
    plain = _sampler(lm, 8, eos_ids=tuple(range(12)), portions=2)
    expected = plain.sample(params, prompts, keys)
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    with use(mesh, DEFAULT_RULES):
        placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, mesh))
        found = dataclasses.replace(plain, mesh=mesh).sample(placed, prompts, keys)
    _assert_same(found, expected)


def test_bad_portions_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Sampler\.portions = -1"):
        _sampler(TOY, 4, portions=-1)
