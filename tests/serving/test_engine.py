"""The engine alone: what it batches, how long it waits, what it gives up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pathlib
from collections.abc import AsyncIterator

import jax
import numpy as np
import pytest

from pit_jax.core.errors import PitError
from pit_jax.core.rng import stream_id
from pit_jax.decode.batches import Response
from pit_jax.improve.loop import first_answers, sample_keys
from pit_jax.serving.batch import keys_of
from pit_jax.serving.engine import Engine
from pit_jax.serving.loaded import Models, bucket, buckets
from pit_jax.serving.metrics import Metrics
from pit_jax.serving.settings import Batching
from pit_jax.serving.work import Draw, EngineError, Sampling, Scoring
from pit_jax.sharding import rules
from pit_jax.sharding.mesh import make_mesh
from pit_jax.stages import improve as improve_module

PROMPTS = ["goal from oak", "mill", "goal from mill by blue"]


@contextlib.asynccontextmanager
async def running(models: Models, **batching: float) -> AsyncIterator[tuple[Engine, Metrics]]:
    metrics = Metrics()
    engine = Engine(models, Batching(**{"max_batch": 4, **batching}), metrics)  # pyright: ignore[reportArgumentType]
    engine.start(warm_up=False)
    try:
        yield engine, metrics
    finally:
        engine.stop(60)


def _sampling(models: Models, text: str, number: int = 0, limit: int = 1000) -> Sampling:
    row = models.codec.policy_prompt(models.codec.prompt_ids(text))
    draw = Draw(
        seed=3, stream="answers", iteration=0, number=number, candidate=0, temperature=1.0, top_p=1.0, limit=limit
    )
    return Sampling("policy", row, draw)


def _batches(metrics: Metrics, kind: str = "policy") -> int:
    return int(metrics.registry.get_sample_value("pit_batch_rows_count", {"kind": kind}) or 0)


def test_rows_that_arrive_together_are_one_batch_and_get_the_samples_of_improve(models: Models) -> None:
    async def main() -> list[Response]:
        async with running(models) as (engine, metrics):
            works = [_sampling(models, prompt, number) for number, prompt in enumerate(PROMPTS)]
            engine.submit(works)
            answers = [await work.result for work in works]
            assert _batches(metrics) == 1
            tokens = metrics.registry.get_sample_value("pit_sampled_tokens_total", {"kind": "policy"})
            assert tokens == sum(len(answer.ids) + answer.finished for answer in answers)
            return answers

    answers = asyncio.run(main())
    sampler = models.sampler("policy", 1.0)
    with rules.use(models.mesh, models.rules):
        ids = [models.codec.prompt_ids(prompt) for prompt in PROMPTS]
        answer = functools.partial(sampler.answer, models.speakers["policy"].params)
        assert answers == first_answers(answer, models.codec, ids, 3)


def test_scores_of_several_requests_are_one_call_and_those_of_each_alone(models: Models) -> None:
    codec = models.codec
    row = codec.gap_prompt(codec.prompt_ids("oak"), codec.response_ids("inn via tower"))
    answers = [Response(codec.without_eos(codec.response_ids(text)), True) for text in ("inn", "mill via oak", "")]

    async def main() -> None:
        async with running(models) as (engine, metrics):
            scorings = [Scoring([row], answers[:1]), Scoring([row, row], answers[1:])]
            engine.submit(scorings)
            together = [*await scorings[0].result, *await scorings[1].result]
            assert _batches(metrics, "gap") == 1
            alone = [Scoring([row], [answer]) for answer in answers]
            for scoring in alone:
                engine.submit([scoring])
            each = [(await scoring.result)[0] for scoring in alone]
            assert together == pytest.approx(each, abs=1e-5)
            assert len(set(together)) == 3

    asyncio.run(main())


def test_a_single_client_is_not_held_up_but_others_are_waited_for(models: Models) -> None:
    async def sample(engine: Engine, count: int) -> None:
        works = [_sampling(models, "oak", n, limit=2) for n in range(count)]
        engine.submit(works)
        await asyncio.wait_for(asyncio.gather(*(work.result for work in works)), 9.0)

    async def compile_both() -> None:
        async with running(models, linger=0.0) as (engine, _):
            for count in (1, 4):
                works = [_sampling(models, "oak", n, limit=2) for n in range(count)]
                engine.submit(works)
                await asyncio.gather(*(work.result for work in works))

    async def main() -> None:
        async with running(models, linger=10.0) as (engine, metrics):
            await sample(engine, 1)
            await sample(engine, 4)
            one = _sampling(models, "oak", 7, limit=2)
            engine.submit([one])
            await asyncio.sleep(0.1)
            assert not one.result.done(), "there were four a moment ago"
            await sample(engine, 3)
            assert one.result.done()
            assert _batches(metrics) == 3

    asyncio.run(compile_both())
    asyncio.run(main())


def test_what_is_given_up_in_the_queue_is_never_sampled(models: Models) -> None:
    async def main() -> None:
        async with running(models, running=1) as (engine, metrics):
            held, dropped, kept = (_sampling(models, "oak", n) for n in range(3))
            engine.submit([held])
            dropped.drop()
            engine.submit([dropped, kept])
            await asyncio.gather(held.result, kept.result)
            assert dropped.result.cancelled()
            assert metrics.registry.get_sample_value("pit_batch_rows_sum", {"kind": "policy"}) == 2

    asyncio.run(main())


def test_an_engine_that_stops_refuses_what_waits_and_what_comes(models: Models) -> None:
    async def main() -> None:
        async with running(models) as (engine, _):
            works = [_sampling(models, "oak", n) for n in range(9)]
            engine.submit(works)
            engine.stop(60)
            results = await asyncio.gather(*(work.result for work in works), return_exceptions=True)
            assert any(isinstance(result, EngineError) for result in results)
            assert all(isinstance(result, EngineError | Response) for result in results)
            with pytest.raises(PitError, match="stopping"):
                engine.submit([_sampling(models, "oak")])

    asyncio.run(main())


def test_devices_that_share_the_rows_give_the_same_answers(
    models: Models, run_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(given: Models) -> list[Response]:
        async def main() -> list[Response]:
            async with running(given) as (engine, _):
                works = [_sampling(given, prompt, number, limit=8) for number, prompt in enumerate(PROMPTS)]
                engine.submit(works)
                return [await work.result for work in works]

        return asyncio.run(main())

    monkeypatch.setattr(improve_module, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:2]))
    shared = Models(str(run_dir), 3)
    assert (shared.row_sizes, models.row_sizes) == ((2, 4), (1, 2, 4))
    assert whole(shared) == whole(models)


def test_drafted_tokens_change_no_answer(models: Models, run_dir: pathlib.Path) -> None:
    def whole(given: Models) -> list[Response]:
        async def main() -> list[Response]:
            async with running(given) as (engine, _):
                drawn = [
                    _sampling(given, prompt, number, limit=8 + number).draw for number, prompt in enumerate(PROMPTS)
                ]
                works = [Sampling("improver", row, draw) for row, draw in zip(rows, drawn, strict=True)]
                engine.submit(works)
                return [await work.result for work in works]

        return asyncio.run(main())

    codec, drafting = models.codec, Models(str(run_dir), 4, 3)
    reference = codec.prompt_ids("inn via tower inn")
    rows = [codec.improver_prompt(codec.prompt_ids(prompt), reference) for prompt in PROMPTS]
    drafted = {kind: speaker.program.draft_tokens for kind, speaker in drafting.speakers.items()}
    assert drafted == {"improver": 3, "policy": 0}
    assert whole(drafting) == whole(models)


def test_shapes_are_few_and_hold_everything() -> None:
    assert buckets(1, 64) == (1, 4, 16, 64)
    assert buckets(1, 65) == (1, 4, 16, 64, 65)
    assert buckets(128, 100) == (100,)
    assert [bucket(n, (1, 4, 16)) for n in (1, 2, 4, 5, 16)] == [1, 4, 4, 16, 16]


def test_keys_are_those_of_improve() -> None:
    for seed in (0, 5, 2**31 - 1):
        names = [(seed, stream_id("improve"), 2, number, candidate) for number in (0, 3) for candidate in (0, 1)]
        wanted = sample_keys(seed, "improve", 2, [0, 3], 2)
        got = keys_of(np.array(names, np.uint32))
        np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(wanted))
