"""Drafted tokens change how many passes a sample takes, and nothing else."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.core.types import Params, Prompts, Samples
from pit_jax.decode import drafts
from pit_jax.decode.batches import Sampler
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.sharding.rules import DEFAULT_RULES, specs, use
from pit_jax.testing.dictated import Dictated
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, VOCAB, ToyLM, all_responses, conditional
from tests.decode.distribution import assert_distributed
from tests.models import tiny
from tests.models.test_t5gemma import MODELS as T5GEMMAS

TOY = ToyLM()
PARAMS = TOY.init(jax.random.key(7))
EOS_IDS = (EOS, OTHER_EOS)
SMALL = DecoderOnly(dataclasses.replace(tiny.LEARNED, cache_dtype="int8"))
MODELS = tiny.MODELS | {"int8": SMALL} | {f"t5gemma_{name}": lm for name, lm in T5GEMMAS.items()}


def _prompts(rows: list[tuple[list[int], list[int]]], width: int) -> Prompts:
    """Return prompts of x, the reference and a token behind it."""
    tokens = np.full((len(rows), width), PAD, np.int32)
    mask, reference = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row, (x, y) in enumerate(rows):
        text = [*x, *y, 3]
        tokens[row, : len(text)], mask[row, : len(text)] = text, True
        reference[row, len(x) : len(x) + len(y)] = True
    return Prompts(tokens=tokens, mask=mask, reference=reference)  # pyright: ignore[reportArgumentType]


def _drawn(count: int, vocabulary: int) -> Prompts:
    random = np.random.default_rng(count)
    lengths = random.integers(1, 6, (count, 2))
    return _prompts([tuple(random.integers(3, vocabulary, n).tolist() for n in row) for row in lengths], 11)


def _keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(5), count)


def _assert_same(found: Samples, expected: Samples, atol: float = 1e-5) -> None:
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(vars(found)[name], vars(expected)[name])
    np.testing.assert_allclose(found.logp, expected.logp, atol=atol)
    assert expected.passes is None and found.passes is not None
    later = np.asarray(expected.mask).sum(-1) - 1
    assert np.all(found.passes <= later) and np.all((np.asarray(found.passes) == 0) == (later == 0))


def _sampler(lm: object, drafted: int, **change: object) -> Sampler:
    sampling = Sampling(draft_tokens=drafted, **change.pop("sampling", {}))  # pyright: ignore[reportCallIssue]
    settings = dict(lm=lm, width=11, max_new=7, pad_id=PAD, batch_size=8, eos_ids=EOS_IDS, sampling=sampling)
    return Sampler(**(settings | change))  # pyright: ignore[reportArgumentType]


SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3, "top_k": 4},
    {"temperature": 0.6, "top_p": 0.8, "draws": "inverse"},
]


@pytest.mark.parametrize("drafted", [4, *(pytest.param(drafted, marks=pytest.mark.slow) for drafted in (1, 12))])
def test_samples_are_those_without_drafts(drafted: int) -> None:
    prompts, keys = _drawn(24, VOCAB), _keys(48)
    saved = []
    for sampling in SETTINGS:
        plain, quick = (_sampler(TOY, k, batch_size=64, sampling=sampling) for k in (0, drafted))
        expected, found = (one.sample(PARAMS, prompts, keys) for one in (plain, quick))
        _assert_same(found, expected)
        assert found.passes is not None
        saved.append(expected.mask.sum() - 48 - found.passes.sum())
    assert min(saved) > 0, "some drafts are right"


@pytest.mark.parametrize("name", tiny.slow_but(MODELS, "learned"))
def test_every_family_says_the_same(name: str) -> None:
    lm = MODELS[name]
    params, prompts, keys = tiny.params(lm), _drawn(4, tiny.VOCABULARY), _keys(8)
    for temperature in (0.0, 0.8):
        change = {"sampling": {"temperature": temperature}, "eos_ids": (1, 2, 7, 9), "max_new": 16}
        expected, found = (_sampler(lm, k, **change).sample(params, prompts, keys) for k in (0, 3))
        _assert_same(found, expected)
        if temperature == 0.0:
            assert found.passes is not None and found.passes.sum() < expected.mask.sum() - 8, (
                "what is most likely repeats itself"
            )
        else:
            assert len(set(expected.mask.sum(-1).tolist())) > 2, "rows end at different times"


def test_sequences_follow_the_exact_distribution() -> None:
    rows, length, x, y = 20_000, 3, [3], [5, 4]
    prompts = jax.tree.map(lambda leaf: np.repeat(leaf, rows, axis=0), _prompts([(x, y)], 4))
    settings = dict(max_new=length, eos_ids=EOS_IDS, pad_id=PAD)
    samples = generate(TOY, PARAMS, prompts, _keys(rows), Sampling(draft_tokens=2), **settings)
    every = all_responses(length, EOS_IDS)
    exact = np.exp(np.asarray(TOY.logprobs(PARAMS, conditional([*x, *y, 3], every, 4, length)).logp).sum(-1))
    assert_distributed(samples, every, exact)
    assert np.asarray(samples.passes).sum() < 0.95 * (np.asarray(samples.mask).sum(-1) - 1).sum()


def _dictated(answers: list[list[int]]) -> tuple[Dictated, Params]:
    return Dictated(TOY), {"network": PARAMS, "answers": jnp.asarray(answers, jnp.int32)}


@pytest.mark.parametrize(("drafted", "passes"), [(1, 12), (3, 6), (7, 3), (30, 1)])
def test_a_copy_takes_a_pass_for_as_many_tokens_as_are_checked(drafted: int, passes: int) -> None:
    answer = np.random.default_rng(0).integers(3, VOCAB, 24).tolist()
    other = [5, *answer[1:10], 4, *answer[10:23]]
    lm, params = _dictated([[*answer, EOS], [*other, EOS]])
    prompts = _prompts([([3], answer), ([4, 4], [*other, 4])], 29)
    settings = dict(max_new=30, eos_ids=EOS_IDS, pad_id=PAD)
    plain, quick = (
        generate(lm, params, prompts, _keys(2), Sampling(draft_tokens=k), **settings)  # pyright: ignore[reportArgumentType]
        for k in (0, drafted)
    )
    _assert_same(quick, plain)
    # The first token comes with the prompt's pass; the reference's own end is drafted too.
    assert quick.passes is not None and int(quick.passes[0]) == passes == -(-24 // (drafted + 1))
    # Where the reference does not end the answer does: the end is the one token that is drawn after a wrong draft.
    assert int(quick.passes[1]) <= passes + 1


def test_nothing_is_taken_behind_an_end_of_sequence_or_the_limit() -> None:
    answer = [3, 4, OTHER_EOS, 5, 5, 4]
    lm, params = _dictated([answer, [3, 4, 5, 3, 4, 5]])
    prompts = _prompts([([4], answer), ([4], [3, 4, 5, 3, 4, 5])], 9)
    samples = generate(
        lm, params, prompts, _keys(2), Sampling(draft_tokens=5), max_new=5, eos_ids=EOS_IDS, pad_id=PAD
    )  # fmt: skip  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(samples.tokens, [[3, 4, OTHER_EOS, PAD, PAD], [3, 4, 5, 3, 4]])
    np.testing.assert_array_equal(samples.mask.sum(-1), [3, 5])
    np.testing.assert_array_equal(samples.finished, [True, False])
    np.testing.assert_array_equal(samples.passes, [1, 1])
    assert np.all(np.asarray(samples.logp)[0, 3:] == 0.0)


@pytest.mark.parametrize(
    ("rows", "samples", "portions"),
    [(3, 2, 8), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 1, 4), (6, 3, 1)))],
)
def test_rows_that_are_replaced_have_drafts_too(rows: int, samples: int, portions: int) -> None:
    prompts, keys = _drawn(11, VOCAB), _keys(11 * samples)
    expected = _sampler(TOY, 0, batch_size=rows).sample(PARAMS, prompts, keys)
    found = _sampler(TOY, 3, batch_size=rows, portions=portions).sample(PARAMS, prompts, keys)
    _assert_same(found, expected)
    np.testing.assert_array_equal(found.passes, _sampler(TOY, 3, batch_size=rows).sample(PARAMS, prompts, keys).passes)


@pytest.mark.parametrize("name", tiny.slow_but(["learned", "windowed", "t5", "int8"], "learned"))
def test_caches_of_every_kind_take_new_rows(name: str) -> None:
    lm = MODELS[name]
    params, prompts, keys = tiny.params(lm), _drawn(7, tiny.VOCABULARY), _keys(14)
    change = {"eos_ids": tuple(range(12)), "batch_size": 4, "sampling": {"temperature": 0.5}}
    expected = _sampler(lm, 0, **change).sample(params, prompts, keys)
    _assert_same(_sampler(lm, 2, **change | {"portions": 2}).sample(params, prompts, keys), expected)


@pytest.mark.parametrize(
    ("mesh", "portions"),
    [
        (MeshConfig(data=2, tensor=2), 0),
        pytest.param(MeshConfig(data=4), 2, marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=4), 0, marks=pytest.mark.slow),
    ],
)
def test_devices_share_the_rows(mesh: MeshConfig, portions: int) -> None:
    lm = tiny.MODELS["learned"]
    params, prompts, keys = tiny.params(lm), _drawn(12, tiny.VOCABULARY), _keys(24)
    change = {"eos_ids": tuple(range(12)), "sampling": {"temperature": 0.5}}
    expected = _sampler(lm, 0, **change).sample(params, prompts, keys)
    devices = make_mesh(mesh, jax.devices()[:4])
    with use(devices, DEFAULT_RULES):
        placed = jax.device_put(params, specs(lm.axes(), lm.abstract(), DEFAULT_RULES, devices))
        quick = _sampler(lm, 3, **change | {"portions": portions, "mesh": devices})
        found = quick.sample(placed, prompts, keys)
    _assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=2, tensor=2)])
@pytest.mark.parametrize("name", ["rotary", "learned", "t5"])
def test_devices_exchange_no_more_than_without_drafts(name: str, mesh: MeshConfig) -> None:
    lm, devices = tiny.MODELS[name], make_mesh(mesh, jax.devices()[:4])

    def exchanges(drafted: int) -> int:
        settings = dict(max_new=8, eos_ids=EOS_IDS, pad_id=PAD)

        def sample(params: Params, prompts: Prompts, keys: jax.Array) -> Samples:
            return generate(lm, params, prompts, keys, Sampling(draft_tokens=drafted), **settings)

        with use(devices, DEFAULT_RULES):
            params = jax.device_put(tiny.params(lm), specs(lm.axes(), lm.abstract(), DEFAULT_RULES, devices))
            prompts, keys = put_batch((_drawn(8, tiny.VOCABULARY), _keys(8)), devices, row_axis=0)
            text = jax.jit(sample).lower(params, prompts, keys).compile().as_text()
        return len(re.findall(r" (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text))

    assert 0 < exchanges(3) <= exchanges(0)


def _proposed(prompts: Prompts, said: list[int], place: int | None = None) -> tuple[list[int], int]:
    source = drafts.source(jax.tree.map(jnp.asarray, prompts), 1, EOS)
    if place is not None:
        source = dataclasses.replace(source, place=jnp.asarray([place], jnp.int32))
    tokens = jnp.asarray([[*said, *[PAD] * (10 - len(said))]], jnp.int32)
    found, column = drafts.propose(source, tokens, jnp.asarray([len(said)], jnp.int32), 3, PAD)
    return found[0].tolist(), int(column[0])


REFERENCE = [11, 12, 13, 14, 12, 15, 16]


@pytest.mark.parametrize(
    ("said", "place", "expected"),
    [
        ([11], 3, [12, 13, 14]),
        ([20], 3, [12, 13, 14]),  # another first word: the reference goes on behind its own
        ([13, 14], 4, [12, 15, 16]),  # words left out
        ([11, 21, 12], 4, [13, 14, 12]),  # a word put in: the nearest of two places
        ([14, 12], 3, [15, 16, EOS]),  # two alike are more than one that is near
        ([12, 15, 16], 9, [EOS, PAD, PAD]),  # behind the reference
        ([31, 32, 33, 34, 31, 32], 9, [33, 34, 31]),  # the answer's own words
    ],
)
def test_what_follows_the_newest_tokens_is_proposed(said: list[int], place: int, expected: list[int]) -> None:
    for width in (11, 15):
        assert _proposed(_prompts([([8, 9], REFERENCE)], width), said, place)[0] == expected


def test_one_word_is_found_nearby_and_three_anywhere() -> None:
    prompts = _prompts([([7, 8, *range(30, 50)], REFERENCE)], 32)
    assert _proposed(prompts, [21, 7], 24) == ([13, 14, 12], 24)
    assert _proposed(prompts, [30, 31], 24) == ([13, 14, 12], 24)
    assert _proposed(prompts, [30, 31, 32], 24) == ([33, 34, 35], 5)


def test_the_first_draft_begins_where_the_reference_does() -> None:
    prompts = _prompts([([8, 9, 11], REFERENCE)], 12)
    assert int(drafts.source(jax.tree.map(jnp.asarray, prompts), 1, EOS).place[0]) == 3
    none = dataclasses.replace(prompts, reference=np.zeros_like(prompts.mask))
    source = drafts.source(jax.tree.map(jnp.asarray, none), 2, EOS)
    np.testing.assert_array_equal(source.place, [0, 0])
    np.testing.assert_array_equal(source.prompt[:, :-1], np.where(none.mask, none.tokens, -1).repeat(2, axis=0))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Sampling\.draft_tokens = -1"):
        Sampling(draft_tokens=-1)
