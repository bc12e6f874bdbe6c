"""Writing with a given beginning and two temperatures, against the ordinary sampler and a step-by-step reference."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.core.types import Conditional
from pit_jax.decode.batches import Response, Sampler, with_answers
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.srt.writing import Temperatures, Writer
from pit_jax.text.codec import PromptRow, rows_to_prompts

SIZES = {"nano": {"layers": 2, "kv_heads": 1}, "t5-nano": {"encoder_layers": 1, "decoder_layers": 2}}
ROWS = [PromptRow(ids=ids, reference=(0, 0)) for ids in ((5, 6, 7), (8,), (4, 9, 6, 3, 7), (3, 3), (10, 4))]
NOTHING = [()] * len(ROWS)
LENGTH, MARKER, EOS = 14, (5, 9), 2


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> tuple[ConditionalLM, dict]:
    config = preset(request.param, vocab_size=12, width=16, heads=2, head_dim=8, mlp=24, **SIZES[request.param])
    lm = language_model(config)
    return lm, jax.tree.map(lambda leaf: 1.4 * leaf, lm.init(jax.random.key(2)))


def writer(lm: ConditionalLM, **changes) -> Writer:
    fields = dict(lm=lm, width=6, max_new=LENGTH, marker=MARKER, stop=(), eos_ids=(EOS,), pad_id=0, batch_size=5)
    return Writer(**fields | changes)  # pyright: ignore[reportArgumentType]


def keys(rows: int = len(ROWS)) -> jax.Array:
    return jax.random.split(jax.random.key(4), rows)


@functools.partial(jax.jit, static_argnames="lm")
def _correct(lm: ConditionalLM, params: dict, batch: Conditional) -> jax.Array:
    return lm.logprobs(params, batch).correct


def greedy(model: tuple[ConditionalLM, dict], texts: list[Response]) -> list[np.ndarray]:
    """Return where each token is the most likely one, from the training graph: no cache, no loop."""
    batch = with_answers(rows_to_prompts(ROWS, 6, 0), [text.closed(EOS) for text in texts], LENGTH, 0)
    table = np.asarray(_correct(*model, jax.tree.map(jax.numpy.asarray, batch))) > 0
    return [row[: len(text.closed(EOS))] for row, text in zip(table, texts, strict=True)]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_without_beginning_it_is_the_ordinary_sampler(model, temperature) -> None:
    lm, params = model
    found = writer(lm).write(params, ROWS, NOTHING, keys(), Temperatures(temperature, temperature))
    sampler = Sampler(
        lm=lm, sampling=Sampling(temperature=temperature), width=6, max_new=LENGTH, eos_ids=(EOS,), pad_id=0,
        batch_size=5,
    )  # fmt: skip
    assert found == sampler.answer(params, ROWS, keys())


def test_it_goes_on_from_what_is_given_as_the_model_would(model) -> None:
    lm, params = model
    given = [(7, 3), (), (4,), (6, 6, 6, 8), (11,)]
    found = writer(lm).write(params, ROWS, given, keys(), Temperatures(0.0, 0.0))
    for right, beginning, text in zip(greedy(model, found), given, found, strict=True):
        assert text.ids[: len(beginning)] == beginning and right[len(beginning) :].all()
    assert max(len(text.ids) for text in found) > 6


def longest(texts: list[Response]) -> tuple[int, Response]:
    """Return the longest text with its row; an untrained model often ends at once."""
    number, text = max(enumerate(texts), key=lambda entry: len(entry[1].ids))
    assert len(text.ids) > 5
    return number, text


def test_the_temperature_changes_at_the_marker_alone(model) -> None:
    lm, params = model
    hot = writer(lm).write(params, ROWS, NOTHING, keys(), Temperatures(2.0, 2.0))
    number, text = longest(hot)
    changing = writer(lm, marker=text.ids[1:3])
    cooled = changing.write(params, ROWS, NOTHING, keys(), Temperatures(2.0, 0.0))
    start = next(n for n in range(2, len(text.ids)) if text.ids[n - 2 : n] == text.ids[1:3])
    assert cooled[number].ids[:start] == text.ids[:start]
    assert greedy(model, cooled)[number][start:].all() and not greedy(model, hot)[number][start:].all()
    for before, after in zip(hot, cooled, strict=True):
        if text.ids[1:3] not in zip(before.ids, before.ids[1:], strict=False):
            assert before == after, "no marker, no change"


def test_a_marker_in_the_beginning_counts(model) -> None:
    lm, params = model
    given = [(3, *MARKER)] * len(ROWS)
    found = writer(lm).write(params, ROWS, given, keys(), Temperatures(5.0, 0.0))
    assert all(right[3:].all() for right in greedy(model, found))
    assert max(len(text.ids) for text in found) > 5


def test_a_stop_ends_a_text_without_finishing_it(model) -> None:
    lm, params = model
    number, text = longest(writer(lm).write(params, ROWS, NOTHING, keys(), Temperatures(2.0, 2.0)))
    stop = text.ids[3:5]
    found = writer(lm, stop=stop).write(params, ROWS, NOTHING, keys(), Temperatures(2.0, 2.0))[number]
    end = next(n for n in range(2, len(text.ids) + 1) if text.ids[n - 2 : n] == stop)
    assert found == Response(text.ids[:end], finished=False)
    given = [stop] * len(ROWS)
    goes_on = writer(lm, stop=stop).write(params, ROWS, given, keys(), Temperatures(0.0, 0.0))
    assert all(text.ids[:2] == stop for text in goes_on) and any(len(text.ids) > 2 for text in goes_on)


def test_a_text_depends_neither_on_its_mates_nor_on_the_batch_nor_on_devices(model) -> None:
    lm, params = model
    given = [(7, 3), (), (4,), (6, 6, 6, 8), (11,)]
    heat = Temperatures(1.0, 0.3)
    together = writer(lm).write(params, ROWS, given, keys(), heat)
    assert writer(lm, batch_size=2).write(params, ROWS, given, keys(), heat) == together
    back = writer(lm).write(params, ROWS[::-1], given[::-1], keys()[::-1], heat)
    assert back[::-1] == together
    mesh = make_mesh(MeshConfig(fsdp=4))
    with jax.set_mesh(mesh):
        spread = writer(lm, batch_size=8, mesh=mesh).write(params, ROWS, given, keys(), heat)
    assert spread == together


def test_what_cannot_be_written_is_refused(model) -> None:
    lm, params = model
    assert writer(lm).write(params, [], [], keys(0), Temperatures(1.0, 1.0)) == []
    with pytest.raises(DataError, match="text 1 has 14 tokens and must have less than 14"):
        writer(lm).write(params, ROWS[:2], [(), (3,) * LENGTH], keys(2), Temperatures(1.0, 1.0))
    for bad in ({"marker": ()}, {"max_new": 2}):
        with pytest.raises(ConfigError, match="Writer.max_new"):
            writer(lm, **bad)
    with pytest.raises(ConfigError, match="Writer.batch_size = 0"):
        dataclasses.replace(writer(lm), batch_size=0)
