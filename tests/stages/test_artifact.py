"""Which differences of configuration make another run or another model, and which do not matter."""

from __future__ import annotations

import dataclasses

import pytest

from pit_jax.io import serialize
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.stages.artifact import changes, other_model, split_reference
from pit_jax.train.loop import Loop

LOOP = Loop(steps=10)
NANO = preset("nano")


@pytest.mark.parametrize(
    ("field", "value", "matters"),
    [("steps", 11, True), ("log_every", 1, False), ("checkpoint_every", 3, False), ("keep", 1, False)],
)
def test_only_what_is_trained_makes_another_run(field, value, matters):
    other = dataclasses.replace(LOOP, **{field: value})
    found = changes(serialize.to_json({"loop": LOOP}), serialize.to_json({"loop": other}))
    assert bool(found) == matters
    assert all(field in line for line in found)


@pytest.mark.parametrize(
    ("field", "value", "matters"),
    [("width", 32, True), ("rope_base", 7.0, True), ("remat", "full", False), ("scan_layers", False, False)],
)
def test_how_a_model_is_computed_makes_no_other_model(field, value, matters):
    one, two = (
        serialize.to_json(language_model(config)) for config in (NANO, dataclasses.replace(NANO, **{field: value}))
    )
    assert bool(other_model(one, two)) == matters


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("sft_policy", ("sft_policy", None)),
        ("rl_policy:50", ("rl_policy", "50")),
        ("/runs/a/rl:stage1", ("/runs/a/rl", "stage1")),
        ("gs://bucket/a/sft", ("gs://bucket/a/sft", None)),
        ("gs://bucket/a/sft:50", ("gs://bucket/a/sft", "50")),
    ],
)
def test_references_name_a_stage_or_a_path_and_a_snapshot(reference, wanted):
    assert split_reference(reference) == wanted
