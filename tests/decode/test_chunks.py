"""Sampling in pieces gives the tokens of sampling at once, row by row, whatever the pieces and the mates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.core.rng import key_for
from pit_jax.decode import chunks
from pit_jax.decode.chunks import Draws, Program
from pit_jax.decode.loop import generate
from pit_jax.decode.passes import Rows
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.testing.toy import EOS, OTHER_EOS, PAD, ToyLM
from pit_jax.text.codec import PromptRow, rows_to_prompts

ROWS = [PromptRow(ids=ids, reference=(0, 0)) for ids in ((3, 4), (5,), (4, 4, 3), (3, 5, 5, 4), (5, 3))]
PROMPTS = rows_to_prompts(ROWS, 5, PAD)
SETTINGS = [(1.0, 1.0), (0.0, 1.0), (1.7, 0.6), (0.7, 0.9), (1.0, 0.4)]
LENGTH = 12
EOS_IDS = (EOS, OTHER_EOS)
SIZES = {"nano": {"layers": 2, "kv_heads": 1}, "t5-nano": {"encoder_layers": 1, "decoder_layers": 2}}


@pytest.fixture(
    scope="module",
    params=("toy", "nano", *(pytest.param(name, marks=pytest.mark.slow) for name in SIZES if name != "nano")),
)
def model(request: pytest.FixtureRequest) -> tuple[ConditionalLM, dict]:
    if request.param == "toy":
        return ToyLM(), ToyLM().init(jax.random.key(7))  # pyright: ignore[reportReturnType]
    config = preset(request.param, vocab_size=12, width=16, heads=2, head_dim=8, mlp=24, **SIZES[request.param])
    lm = language_model(config)
    return lm, jax.tree.map(lambda leaf: 1.4 * leaf, lm.init(jax.random.key(1)))


def _draws(limits: list[int] | None = None) -> Draws:
    temperature, top_p = np.array(SETTINGS, np.float32).T
    return Draws(
        keys=jax.random.split(key_for(3, "test"), len(ROWS)),
        temperature=jnp.asarray(temperature),
        top_p=jnp.asarray(top_p),
        limit=jnp.asarray(limits or [LENGTH] * len(ROWS), jnp.int32),
    )


def _sampled(
    model: tuple[ConditionalLM, dict],
    draws: Draws,
    piece: int,
    given_up: dict[int, int] | None = None,
    drafted: int = 0,
) -> Rows:
    """Sample all rows in pieces; `given_up` maps a row to the number of tokens after which nobody wants it."""
    lm, params = model
    program = Program(lm=lm, max_new=LENGTH, eos_ids=EOS_IDS, pad_id=PAD, draft_tokens=drafted)
    state = chunks.begin(params, PROMPTS, draws, program)
    while not bool(state.over.all()):
        t = int(state.t.max())
        wanted = np.array([t < (given_up or {}).get(row, LENGTH + 1) for row in range(len(ROWS))])
        state = chunks.advance(params, state, draws, wanted, np.int32(t + piece), program)
    return state


@pytest.mark.parametrize("piece", [*(pytest.param(piece, marks=pytest.mark.slow) for piece in (1, 100)), 5])
def test_every_row_is_what_generate_samples_with_its_settings(model: tuple[ConditionalLM, dict], piece: int) -> None:
    draws = _draws()
    state = _sampled(model, draws, piece)
    for row, (temperature, top_p) in enumerate(SETTINGS):
        sampling = Sampling(temperature=temperature, top_p=top_p)
        alone = generate(*model, PROMPTS, draws.keys, sampling, max_new=LENGTH, eos_ids=EOS_IDS, pad_id=PAD)
        np.testing.assert_array_equal(state.tokens[row], alone.tokens[row])
        assert int(state.t[row]) == int(alone.mask[row].sum())
        assert bool(state.finished[row]) == bool(alone.finished[row])


@pytest.mark.parametrize("piece", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_drafts_change_no_row(model: tuple[ConditionalLM, dict], piece: int) -> None:
    limits = [LENGTH, 1, 7, 0, LENGTH]
    plain, quick = (_sampled(model, _draws(limits), piece, drafted=drafted) for drafted in (0, 3))
    for name in ("tokens", "t", "over", "finished"):
        np.testing.assert_array_equal(vars(quick)[name], vars(plain)[name])
    np.testing.assert_allclose(quick.logp, plain.logp, atol=1e-5)
    left = _sampled(model, _draws(limits), piece, given_up={4: 4}, drafted=3)
    np.testing.assert_array_equal(left.tokens[:4], plain.tokens[:4])
    count = int(left.t[4])
    np.testing.assert_array_equal(left.tokens[4, :count], plain.tokens[4, :count])
    assert np.all(np.asarray(left.tokens[4, count:]) == PAD) and bool(left.over[4])
    # One of the models says nothing that it could repeat.
    assert quick.passes.sum() < plain.passes.sum() or plain.passes.sum() == 0


def test_limits_and_rows_given_up_give_prefixes_and_leave_the_others_alone(model: tuple[ConditionalLM, dict]) -> None:
    whole = _sampled(model, _draws(), 3)
    limits = [LENGTH, 1, 2, 0, LENGTH]
    cut = _sampled(model, _draws(limits), 3, given_up={4: 4})
    lengths = np.minimum(np.asarray(whole.t), [LENGTH, 1, 2, 0, 4])
    np.testing.assert_array_equal(cut.t, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(cut.tokens[row, :length], whole.tokens[row, :length])
        assert np.all(np.asarray(cut.tokens[row, length:]) == PAD)
        assert bool(cut.finished[row]) == (bool(whole.finished[row]) and length == int(whole.t[row]))


def test_the_loop_halts_where_it_is_told_and_ends_with_the_last_row() -> None:
    lm = ToyLM()
    params, draws = lm.init(jax.random.key(7)), _draws()
    program = Program(lm=lm, max_new=LENGTH, eos_ids=EOS_IDS, pad_id=PAD)  # pyright: ignore[reportArgumentType]
    state = chunks.begin(params, PROMPTS, draws, program)
    assert int(state.t.max()) == 1
    state = chunks.advance(params, state, draws, np.ones(5, bool), np.int32(3), program)
    assert int(state.t.max()) == 3 or bool(state.over.all())
    state = chunks.advance(params, state, draws, np.zeros(5, bool), np.int32(LENGTH), program)
    assert int(state.t.max()) == 3 and bool(state.over.all())


def test_bad_programs_are_named() -> None:
    with pytest.raises(ConfigError, match="max_new = 0"):
        Program(lm=ToyLM(), max_new=0, eos_ids=(1,), pad_id=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="draft_tokens = -1"):
        Program(lm=ToyLM(), max_new=1, eos_ids=(1,), pad_id=0, draft_tokens=-1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="eos_ids"):
        Program(lm=ToyLM(), max_new=1, eos_ids=(), pad_id=0)  # pyright: ignore[reportArgumentType]
