"""A run whose adapters stand on an int8 base."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.tree import named_leaves
from pit_jax.models.lora import Lora, is_adapter, split
from pit_jax.models.quantised import quantise
from pit_jax.stages.artifact import Artifact
from pit_jax.stages.run import Adapters, Run

from . import small

ADAPTERS = Adapters(base="sft_policy", lora=Lora(rank=4, alpha=8.0), quantise="int8")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("quantised") / "run"
    with small.devices(1):
        small.recipe(directory, experiment=small.experiment(adapters=ADAPTERS)).run()
    return directory


@pytest.mark.slow
def test_every_model_stands_on_one_int8_copy_of_the_base(adapted: pathlib.Path) -> None:
    with small.devices(1):
        run = Run(str(adapted), 0, small.experiment(adapters=ADAPTERS))
        assert run.mesh.size == 1
    trees = [run.language_model(name) for name in ("sft_policy", "sft_improver", "rl_policy:2", "rl_improver")]
    trees += [run.params(name)["trunk"] for name in ("reward_bt", "reward_gap")]
    first = dict(named_leaves(split(trees[0])[0]))
    assert jnp.dtype(jnp.int8) in {leaf.dtype for leaf in first.values()}
    for tree in trees[1:]:
        assert all(leaf is first[name] for name, leaf in named_leaves(split(tree)[0]))
    whole = Artifact(adapted / "sft_policy").params()
    for name, leaf in named_leaves(quantise(whole, run.lm, donate=False)):
        np.testing.assert_array_equal(leaf, first[name], err_msg=name)


@pytest.mark.slow
def test_checkpoints_hold_no_integers_of_the_base(adapted: pathlib.Path) -> None:
    step = max((adapted / "rl_improver").glob("checkpoint_*"))
    names = json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["tree"]
    params = [name for name in names if name.startswith("params/")]
    assert params
    assert all(is_adapter(tuple(name.split("/"))) for name in params)


@pytest.mark.slow
def test_adapters_alone_and_in_floats(adapted: pathlib.Path) -> None:
    alone = Artifact(adapted / "reward_gap")
    floats = Artifact(adapted / "reward_gap", in_floats=True)
    found, exact = dict(named_leaves(alone.params())), dict(named_leaves(floats.params()))
    base = dict(named_leaves({"trunk": Artifact(adapted / "sft_policy").params()}))
    assert jnp.dtype(jnp.int8) in {leaf.dtype for leaf in found.values()}
    assert exact.keys() == {name for name, _ in named_leaves(floats.network.abstract())}
    for name, leaf in exact.items():
        np.testing.assert_array_equal(leaf, base.get(name, found[name]), err_msg=name)
