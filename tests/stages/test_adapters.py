"""A run whose stages train adapters on one frozen base."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import CheckpointError, ConfigError
from pit_jax.core.tree import named_leaves
from pit_jax.losses.policy import PolicyLoss
from pit_jax.models.lora import Lora, is_adapter, join, split
from pit_jax.stages.artifact import Artifact
from pit_jax.stages.improve import Request, improve_file
from pit_jax.stages.rl import Rl
from pit_jax.stages.run import Adapters, Run

from . import small

# The whole recipe with adapters is trained first; tests/stages/test_matrix.py and tests/models have faster cases.
pytestmark = pytest.mark.slow

LORA = Lora(rank=4, alpha=8.0)
ADAPTERS = Adapters(base="sft_policy", lora=LORA)
ADAPTED = ("sft_improver", "reward_bt", "reward_gap", "rl_policy", "rl_improver")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("adapters") / "run"
    with small.devices(1):
        small.recipe(directory, experiment=small.experiment(adapters=ADAPTERS)).run()
    return directory


def opened(directory: pathlib.Path, **changes: Any) -> Run:
    with small.devices(1):
        run = Run(str(directory), 0, small.experiment(adapters=ADAPTERS, **changes))
        assert run.mesh.size == 1
    return run


def saved(directory: pathlib.Path, stage: str) -> dict[str, Any]:
    step = max((directory / stage).glob("checkpoint_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    return json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["tree"]


@pytest.mark.parametrize("stage", ADAPTED)
def test_checkpoints_and_optimisers_hold_adapters_and_heads_alone(adapted: pathlib.Path, stage: str) -> None:
    names = saved(adapted, stage)
    params = [name.split("/") for name in names if name.startswith("params/")]
    assert params
    assert all(is_adapter(tuple(path)) or path[1] == "head" for path in params)
    kernels = [name for name in names if name.endswith("kernel") and "head" not in name.split("/")]
    assert not kernels  # neither among the parameters nor among the moments
    assert any(name.startswith("opt_state") and name.endswith("lora_b") for name in names)


def test_the_base_is_trained_whole(adapted: pathlib.Path) -> None:
    assert not any("lora" in name for name in saved(adapted, "sft_policy"))
    assert Artifact(adapted / "sft_policy").lm.config.lora is None


def test_every_model_stands_on_one_copy_of_the_base(adapted: pathlib.Path) -> None:
    run = opened(adapted)
    trees = [run.language_model(name) for name in ("sft_policy", "sft_improver", "rl_policy:2", "rl_improver")]
    trees += [run.params(name)["trunk"] for name in ("reward_bt", "reward_gap")]
    first = [leaf for _, leaf in named_leaves(split(trees[0])[0])]
    for tree in trees[1:]:
        base, adapters = split(tree)
        assert all(a is b for a, (_, b) in zip(first, named_leaves(base), strict=True))
        assert any(np.any(np.asarray(leaf)) for name, leaf in named_leaves(adapters) if name.endswith("lora_b"))


def test_a_base_named_by_a_relative_path_is_one_copy_too(
    adapted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapted.parent)
    experiment = small.experiment(
        adapters=dataclasses.replace(ADAPTERS, base="run/sft_policy"), tokenizer=str(adapted / "tokenizer")
    )
    stage = small.sft("improver", init_from="run/sft_policy")
    with small.devices(1):
        small.recipe(tmp_path, experiment=experiment, stages=(stage,)).run()
        run = Run(str(tmp_path), 0, experiment)
        trees = [run.language_model(name) for name in ("run/sft_policy", "sft_improver")]
    bases = [[leaf for _, leaf in named_leaves(split(tree)[0])] for tree in trees]
    assert all(a is b for a, b in zip(*bases, strict=True))
    monkeypatch.chdir(tmp_path)
    assert jax.tree.structure(Artifact(tmp_path / "sft_improver").params()) == jax.tree.structure(trees[0])


def test_the_base_as_a_model_of_the_run_is_itself(adapted: pathlib.Path) -> None:
    run = opened(adapted)
    whole = Artifact(adapted / "sft_policy").params()
    ours = run.language_model("sft_policy")
    x = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) + 4
    mask = jnp.ones(x.shape, bool)
    np.testing.assert_array_equal(run.whole.logits(whole, x, mask), run.lm.logits(ours, x, mask))


def test_a_stage_alone_finds_its_base(adapted: pathlib.Path) -> None:
    run = opened(adapted)
    alone = Artifact(adapted / "rl_improver").params("stage1")
    for (name, a), (_, b) in zip(
        named_leaves(alone), named_leaves(run.language_model("rl_improver:stage1")), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_improve_from_the_directory(adapted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    record = json.loads((adapted / "evaluate" / "responses" / "original_T1.jsonl").read_text().splitlines()[0])
    drafts = tmp_path / "drafts.jsonl"
    lines = [{"prompt": record["prompt"], "response": record["response"]}, {"prompt": record["prompt"]}]
    drafts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    improve_file(Request(checkpoint=str(adapted), input=str(drafts), output=str(tmp_path / "out.jsonl")))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_interrupted_training_of_adapters_resumes(adapted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stages = tuple(
        stage if stage.name != "sft_improver" else small.sft("improver", training=small.training(4))
        for stage in small.stages()[:2]
    )
    recipe = small.recipe(tmp_path, experiment=small.experiment(adapters=ADAPTERS), stages=stages)
    with small.devices(1):
        recipe.run()
    for name in ("checkpoint_4",):
        for path in sorted((tmp_path / "sft_improver" / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "sft_improver" / name).rmdir()
    (tmp_path / "sft_improver" / "result.json").unlink()
    with small.devices(1):
        recipe.run()
    assert small.records(tmp_path, "sft_improver") == small.records(adapted, "sft_improver")


@pytest.mark.slow
def test_four_devices_train_the_same_adapters(adapted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stage = small.external(adapted, small.sft("improver", init_from="sft_policy"))
    experiment = small.experiment(
        adapters=dataclasses.replace(ADAPTERS, base=f"{adapted}/sft_policy"), tokenizer=str(adapted / "tokenizer")
    )
    losses = []
    for count in (1, 4):
        directory = tmp_path / str(count)
        with small.devices(count):
            small.recipe(directory, experiment=experiment, stages=(stage,)).run()
        losses.append([record["loss"] for record in small.records(directory, "sft_improver", "train")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_ppo_trains_adapters_and_value_head(adapted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rl = dataclasses.replace(small.rl_policy().rl, estimator="ppo", policy=PolicyLoss(kind="ppo_clip"))
    stage = small.rl_policy(rl=rl)
    stage = small.external(adapted, stage)
    assert isinstance(stage, Rl)
    experiment = small.experiment(
        adapters=dataclasses.replace(ADAPTERS, base=f"{adapted}/sft_policy"), tokenizer=str(adapted / "tokenizer")
    )
    with small.devices(1):
        small.recipe(tmp_path, experiment=experiment, stages=(stage,)).run()
    params = [name.split("/") for name in saved(tmp_path, "rl_policy") if name.startswith("params/")]
    assert ["params", "head", "kernel"] in params
    assert all(is_adapter(tuple(path)) or path[1] == "head" for path in params)


def test_a_base_that_is_not_made_is_named(tmp_path: pathlib.Path) -> None:
    experiment = small.experiment(adapters=Adapters(base="sft_polcy", lora=LORA))
    with pytest.raises(ConfigError, match="Adapters.base = 'sft_polcy'.*sft_policy"):
        small.recipe(tmp_path, experiment=experiment).run()


def test_adapters_in_the_model_itself_are_refused() -> None:
    model = dataclasses.replace(small.MODEL, lora=LORA)
    with pytest.raises(ConfigError, match="Experiment.adapters"):
        small.experiment(model=model)


def test_a_whole_stage_cannot_start_from_adapters(adapted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stage = small.external(adapted, small.sft("policy", init_from="rl_policy"))
    experiment = small.experiment(
        adapters=dataclasses.replace(ADAPTERS, base="sft_policy"), tokenizer=str(adapted / "tokenizer")
    )
    with pytest.raises(CheckpointError, match="holds adapters"), small.devices(1):
        small.recipe(tmp_path, experiment=experiment, stages=(stage,)).run()


def test_an_update_changes_adapters_alone(adapted: pathlib.Path) -> None:
    run = opened(adapted)
    before, after = run.language_model("sft_policy"), run.language_model("sft_improver")
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.structure(join(*split(after))) == jax.tree.structure(after)
