"""Counts of operations and bytes: by hand, and against what compiled programs of the product do."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.speed import product
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.work import WORKS, Work, decoding, decoding_bytes, forward, operations, prefill, training
from pit_jax.core.tree import parameter_count
from pit_jax.core.types import Conditional
from pit_jax.models.presets.catalog import language_model
from pit_jax.plan import cost
from pit_jax.stages.sft import likelihood

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name: str) -> None:
    shape = SHAPES[name]
    config = product.model_config(shape, {})
    assert parameter_count(language_model(config).abstract()) == shape.parameters


def test_the_work_of_llama_is_what_was_worked_out_by_hand() -> None:
    """973,078,528 entries in the layers and 262,668,288 in the head; 4 x 32 x 64 x 16 a pair of query and key."""
    llama, work = SHAPES["llama-3.2-1b"], WORKS["llama-3.2-1b"]["sft"]
    row = 2 * 973_078_528 * 2048 + 2 * 262_668_288 * 2047 + 131_072 * 2048 * 2049 // 2
    assert operations(llama, work) == 3 * 16 * row
    assert operations(llama, work) == pytest.approx(256.2e12, rel=1e-3)


def test_decoding_is_what_a_whole_pass_leaves_after_the_prompt() -> None:
    """Read token by token or at once, the same queries meet the same keys; the last token is drawn but never read."""
    work = WORKS["tiny"]["rollout"]
    whole = forward(TINY, work.rows, work.length - 1, work.response)
    assert prefill(TINY, work) + decoding(TINY, work) == whole


def test_bytes_of_decoding_by_hand() -> None:
    shape = dataclasses.replace(TINY, compute="bfloat16")
    work = Work(kind="rollout", rows=3, prompt=5, response=3)
    weights = 2 * (2 * (2 * 32 * (4 + 2) * 8 + 3 * 32 * 64) + 512 * 32)
    token = 2 * (2 * 2 * 2 * 8)
    assert decoding_bytes(shape, work) == 2 * weights + 3 * token * (6 + 7)


@pytest.mark.parametrize("name", WORKS)
def test_reinforcement_is_the_sum_of_its_parts(name: str) -> None:
    shape, work = SHAPES[name], WORKS[name]["rl"]
    rollout = operations(shape, dataclasses.replace(work, kind="rollout"))
    update = operations(shape, dataclasses.replace(work, kind="sft"))
    judged = forward(shape, work.rows, work.length, 0)
    assert operations(shape, work) == rollout + judged + update // 3 + update


def test_the_count_is_that_of_the_compiled_programs() -> None:
    """A kernel may do all of the square of attention, and the head once more than three times: no more than that."""
    rows, prompt, response = 2, 24, 40
    length = prompt + response
    lm = language_model(product.model_config(TINY, {}))
    ones = {"prompt": (rows, prompt), "response": (rows, response)}
    arrays = {name: np.ones(shape, np.int32) for name, shape in ones.items()}
    batch = Conditional(
        prompt_segments=arrays["prompt"], prompt_reference=np.zeros(ones["prompt"], bool),
        response_segments=arrays["response"], **arrays,
    )  # fmt: skip
    objective = likelihood(lm, 0.0)

    def loss(params: dict, batch: Conditional) -> jax.Array:
        return objective(params, batch, None)[0].total  # type: ignore[arg-type]

    def flops(function: object) -> float:
        text = jax.jit(function).lower(lm.abstract(), batch).compile().as_text()  # type: ignore[arg-type]
        return cost.count(text, {}).flops

    square = rows * 2 * TINY.heads * TINY.head_dim * TINY.layers * length * (length - 1)
    least = forward(TINY, rows, length, response)
    assert least <= flops(loss) <= 1.02 * (least + square)
    head = rows * 2 * TINY.head_weights * response
    assert training(TINY, rows, length, response) <= flops(jax.grad(loss)) <= 1.02 * (3 * (least + square) + head)


def test_wrong_work_is_refused() -> None:
    with pytest.raises(SystemExit, match="multiple of the 3 samples"):
        Work(kind="rl", rows=4, prompt=2, response=2, samples=3)
    with pytest.raises(SystemExit, match="mean_length -2 must be >= 0"):
        Work(kind="rollout", rows=4, prompt=2, response=2, mean_length=-2)
    with pytest.raises(SystemExit, match="one of sft, gap, rollout, rl"):
        Work(kind="dpo", rows=4, prompt=2, response=2)
