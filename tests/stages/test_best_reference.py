"""`STAGE:best`: a stage that starts from another one's best checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.models.trained import abstract_params
from pit_jax.stages.artifact import Artifact
from pit_jax.train.best import KeepBest

from . import small


def test_the_best_checkpoint_can_be_named(tmp_path: pathlib.Path) -> None:
    training = small.training()
    first = KeepBest(metric="loss", mode="max")  # the loss falls, so that the first evaluation is the "best"
    loop = dataclasses.replace(training.loop, keep_best=first, keep=1)
    policy = small.sft("policy", training=dataclasses.replace(training, loop=loop))
    improver = small.sft("improver", init_from="sft_policy:best")
    with small.devices(1):
        with pytest.raises(ConfigError, match=r"needs 'sft_policy:best', but .* set keep_best"):
            small.recipe(tmp_path, stages=(small.sft("policy"), improver)).run()
        small.recipe(tmp_path, stages=(policy, improver)).run()
    stage = Artifact(tmp_path / "sft_policy")
    best, newest = stage.params("best"), stage.params()
    expected = Checkpoints(tmp_path / "sft_policy", keep=None).restore_params(2, abstract_params(stage.network, None))
    jax.tree.map(np.testing.assert_array_equal, best, expected)
    pairs = zip(jax.tree.leaves(best), jax.tree.leaves(newest), strict=True)
    assert any(np.any(np.asarray(left) != np.asarray(right)) for left, right in pairs)
    with pytest.raises(CheckpointError, match="keeps no best checkpoint"):
        Artifact(tmp_path / "sft_improver").params("best")
