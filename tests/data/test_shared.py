"""Batches whose records share prompts hold the same passes as plain ones, and give the same losses and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core import metric, tree
from pit_jax.data.collate import ComparisonView, collator_for
from pit_jax.data.pack import Packing
from pit_jax.data.schema import Record
from pit_jax.data.shared import SharedComparisonCollator, with_shared_prompts
from pit_jax.data.views import DropReport, make_examples
from pit_jax.losses.preference import COMPARISONS
from pit_jax.models.heads import ScalarModel
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.ops.shared import apart
from pit_jax.stages.reward import comparison_objective
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

LENGTHS = Lengths(inputs=10, targets=7)
CODEC = Codec(ByteTokenizer(), Templates(policy="Q{prompt}A", gap="Q{prompt}R{reference}C"), LENGTHS)
TURNED = Codec(ByteTokenizer(), Templates(policy="Q{prompt}A", gap="{reference}Q{prompt}"), LENGTHS)
RECORDS = [
    Record(id=str(n), group=str(n), prompt="abcdefgh"[: n + 1], chosen="wo" * (1 + n % 3), rejected="x" * (1 + n % 4))
    for n in range(7)
]
LM = language_model(preset("nano", vocab_size=320, width=16, heads=2, kv_heads=2, head_dim=8, mlp=24, layers=1))


def both(view: ComparisonView, codec: Codec, micro_batches: int | None) -> tuple[Any, Any]:
    """Return the same records as a plain batch and as one that shares prompts."""
    examples = list(make_examples(view, RECORDS, codec, DropReport()))
    plain: Any = collator_for(view, codec, batch_size=8, micro_batches=micro_batches, packing=None)
    sharing = with_shared_prompts(plain, 2)
    assert isinstance(sharing, SharedComparisonCollator)
    (one, used), (other, count) = plain.leading(examples), sharing.leading(examples)
    assert used == count == len(RECORDS)
    return one, other


def passes(batch: Any) -> list[tuple[bytes, ...]]:
    """Return prompt, marks and response of each pass of each record that counts, from the arrays alone."""
    x = apart(jax.tree.map(jnp.asarray, batch.inputs))
    rows = []
    for row in np.asarray(batch.index).T[np.asarray(batch.weight) > 0].reshape(-1):
        there, answered = (np.asarray(part[row]) > 0 for part in (x.prompt_segments, x.response_segments))
        tokens, marks, response = np.asarray(x.prompt[row]), np.asarray(x.prompt_reference[row]), x.response[row]
        rows.append((tokens[there].tobytes(), marks[there].tobytes(), np.asarray(response)[answered].tobytes()))
    return rows


@pytest.mark.parametrize("codec", [CODEC, TURNED], ids=["prompt first", "reference first"])
@pytest.mark.parametrize("view", ["reward_bt", "reward_gap"])
def test_shared_batches_hold_the_passes_of_plain_ones(view: ComparisonView, codec: Codec) -> None:
    plain, sharing = both(view, codec, None)
    assert passes(sharing) == passes(plain) and len(set(passes(plain))) > 2 * len(RECORDS) - 3
    np.testing.assert_array_equal(sharing.weight, plain.weight)
    np.testing.assert_array_equal(sharing.length, plain.length)
    tokens = [
        sum(leaf.size for leaf in (x.prompt, x.response)) + (0 if x.rest is None else x.rest.tokens.size)
        for x in (sharing.inputs, plain.inputs)
    ]
    assert tokens[0] < tokens[1]


def test_micro_batches_are_cut_alike() -> None:
    plain, sharing = both("reward_gap", CODEC, 2)
    assert sharing.inputs.response.shape == plain.inputs.response.shape == (2, 16, 7)
    assert sharing.inputs.prompt.shape[:2] == (2, 4) and sharing.inputs.rest.tokens.shape[:2] == (2, 8)
    for part in range(2):
        one, other = (jax.tree.map(lambda leaf, part=part: leaf[part], batch) for batch in (sharing, plain))
        assert passes(one) == passes(other) and len(passes(one)) == 4 * (4 - part)


@pytest.mark.parametrize("readout", ["mean_difference", pytest.param("last", marks=pytest.mark.slow)])
def test_the_gap_loss_and_its_gradients_are_the_same(readout: Any) -> None:
    model = ScalarModel(LM, readout, "causal")
    params = model.init(jax.random.key(0))
    objective: Any = comparison_objective(model, "gap", COMPARISONS, 1)

    def total(params: Any, batch: Any) -> Any:
        value, metrics = objective(params, batch, None)
        return value.value(), metrics

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))
    results = [compiled(params, batch) for batch in both("reward_gap", CODEC, None)]
    ((value, metrics), grads), ((wanted, expected), other) = results
    np.testing.assert_allclose(value, wanted, atol=1e-5)
    for name, one in metric.values(metrics).items():
        np.testing.assert_allclose(one, metric.values(expected)[name], atol=1e-5, err_msg=name)
    for (path, one), (_, two) in zip(tree.named_leaves(grads), tree.named_leaves(other), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5, err_msg=path)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-3


def test_packed_rows_and_uneven_cuts_stay_plain() -> None:
    packing = Packing(rows=12, inputs=64, targets=28, segments=4)
    packed: Any = collator_for("reward_gap", CODEC, batch_size=8, micro_batches=None, packing=packing)
    plain: Any = collator_for("reward_gap", CODEC, batch_size=6, micro_batches=None, packing=None)
    assert with_shared_prompts(packed, 1) is packed and with_shared_prompts(plain, 4) is plain
    assert dataclasses.asdict(with_shared_prompts(plain, 3).layout) == dataclasses.asdict(plain.layout)
