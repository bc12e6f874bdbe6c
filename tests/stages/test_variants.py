"""Single stages in all their variants, on the checkpoints of the shared run: estimators, packing, meshes, errors."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from pit_jax.core.rng import key_for
from pit_jax.core.types import Comparisons
from pit_jax.data.collate import collator_for
from pit_jax.data.pack import Packing
from pit_jax.decode.sampling import Sampling
from pit_jax.losses.policy import PolicyLoss
from pit_jax.models.heads import ScalarModel
from pit_jax.rl.config import RlConfig
from pit_jax.rl.curriculum import Round
from pit_jax.rl.monitor import MonitorConfig
from pit_jax.sharding.mesh import MeshConfig
from pit_jax.sharding.place import put_batch
from pit_jax.stages import answering
from pit_jax.stages.reward import comparison_objective
from pit_jax.stages.run import Run
from pit_jax.stages.sft import likelihood
from pit_jax.train.loop import Loop
from pit_jax.train.optim import Optimizer

from . import small

IMPROVER = (Round(name="harder", steps=3, references=("improver", "policy")),)
STOCHASTIC = Optimizer(learning_rate=0.1, kind="sgd", clip_norm=None)


@pytest.fixture(scope="module")
def run(whole: pathlib.Path) -> Run:
    with small.devices(1):
        opened = Run(str(whole), 0, small.experiment())
        assert opened.mesh.size == 1
    return opened


def _gradient(objective: Any, params: Any, batch: Any, mesh: Mesh) -> tuple[float, Any]:
    """Return the mean loss of a batch without a leading axis, and its gradient."""

    def mean(params: Any) -> jax.Array:
        loss, _ = objective(params, batch, key_for(0, "unused"))
        return loss.value()

    batch = put_batch(batch, mesh, row_axis=0)
    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    return float(value), jax.device_get(gradient)


def _assert_close(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("view", ["sft_policy", "sft_improver", "reward_bt", "reward_gap"])
def test_packed_rows_have_the_loss_and_gradient_of_plain_ones(run: Run, view: str) -> None:
    examples = run.examples(view, "train", limit=8)
    packing = Packing(rows=16, inputs=90, targets=60, segments=5)
    plain, packed = (
        collator_for(view, run.codec, batch_size=8, micro_batches=None, packing=p).leading(examples)
        for p in (None, packing)
    )
    assert plain[1] == packed[1] == 8
    inputs = packed[0].inputs if isinstance(packed[0], Comparisons) else packed[0]
    assert inputs.response_segments.max() > 1, "nothing was packed"
    if view.startswith("sft"):
        role = view.removeprefix("sft_")
        params, objectives = run.language_model(f"sft_{role}"), (likelihood(run.lm, 1e-3),) * 2
    else:
        stage = view
        params, model = run.params(stage), run.artifact(stage).network
        assert isinstance(model, ScalarModel)
        terms = small.reward("gap").terms
        objectives = tuple(comparison_objective(model, view.removeprefix("reward_"), terms, m) for m in (1, 5))
    results = [_gradient(f, params, batch, run.mesh) for f, (batch, _) in zip(objectives, (plain, packed), strict=True)]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    _assert_close(results[0][1], results[1][1])


def _stage(kind: str, **changes: Any) -> Any:
    steps = {"training": small.training(1, optimizer=STOCHASTIC, **changes)}
    return small.sft("policy", **steps) if kind == "sft" else small.reward("gap", **steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_micro_batches_packing_and_devices_make_the_same_update(
    whole: pathlib.Path, tmp_path: pathlib.Path, kind: str
) -> None:
    packing = Packing(rows=32, inputs=70, targets=50, segments=4)
    plain = small.alone(whole, tmp_path / "plain", _stage(kind))
    found = {
        "micro": small.alone(whole, tmp_path / "micro", _stage(kind, micro_batches=2)),
        "mesh": small.alone(whole, tmp_path / "mesh", _stage(kind), count=4, mesh=MeshConfig(data=2, fsdp=2)),
    }
    if kind == "sft":
        found["packed"] = small.alone(whole, tmp_path / "packed", _stage(kind, packing=packing))
    name = _stage(kind).name
    wanted = small.records(plain.directory, name)
    for variant, other in found.items():
        for before, after in zip(wanted, small.records(other.directory, name), strict=True):
            assert before.keys() == after.keys()
            for key in before.keys() - {"kind"}:
                assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-5), (variant, key)
        with small.devices(1):
            params = [Run(str(r.directory), 0, r.experiment).artifact(name).params() for r in (plain, other)]
        _assert_close(*params)


def _assert_same_step(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in wanted.keys() - {"kind", "sampler_delta/max", "sampler_delta/mean", "kl_old"}:
        assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-5), key


@pytest.mark.slow
def test_rl_on_four_devices_takes_the_same_first_step(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # Three contexts do not divide over four devices; neither do the rollout's rows.
    rounds = (Round(name="only", steps=1, references=("policy",)),)
    training = small.rl_training(contexts=6, rollout_batch=10, micro_batches=2, optimizer=STOCHASTIC)
    stage = dataclasses.replace(small.rl_improver(), rounds=rounds, training=training)
    runs = [
        small.alone(whole, tmp_path / str(count), stage, count=count, mesh=MeshConfig(data=count)) for count in (1, 4)
    ]
    one, four = (small.records(r.directory, "rl_improver", "train")[0] for r in runs)
    assert one.keys() == four.keys()
    _assert_same_step(four, one)


@pytest.mark.slow
def test_rl_whose_rows_are_replaced_takes_the_same_first_step(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rounds = (Round(name="only", steps=1, references=("policy",)),)
    training = small.rl_training(contexts=6, rollout_batch=8, optimizer=STOCHASTIC)
    stage = dataclasses.replace(small.rl_improver(), rounds=rounds, training=training)
    runs = [small.alone(whole, tmp_path / str(portions), stage, portions=portions) for portions in (0, 2)]
    plain, replaced = (small.records(r.directory, "rl_improver", "train")[0] for r in runs)
    assert replaced.keys() == plain.keys()
    _assert_same_step(replaced, plain)


@pytest.mark.slow
def test_rl_whose_answers_are_drafted_takes_the_same_first_step(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rounds = (Round(name="only", steps=1, references=("improver",)),)
    training = small.rl_training(contexts=6, rollout_batch=8, optimizer=STOCHASTIC)
    stage = dataclasses.replace(small.rl_improver(), rounds=rounds, training=training)
    runs = [small.alone(whole, tmp_path / str(count), stage, draft_tokens=count) for count in (0, 3)]
    plain, drafted = (small.records(r.directory, "rl_improver", "train")[0] for r in runs)
    assert drafted.keys() - plain.keys() == {"tokens_per_pass"} and plain.keys() <= drafted.keys()
    assert drafted["tokens_per_pass"] >= 1.0
    _assert_same_step(drafted, plain)
    # How many tokens are drafted may change while a run is under way.
    run = small.alone(whole, tmp_path / "0", stage, draft_tokens=2)
    assert small.records(run.directory, "rl_improver", "train")[0] == plain


def test_only_improvers_draft(run: Run, whole: pathlib.Path) -> None:
    with small.devices(1):
        drafting = Run(str(whole), 0, small.experiment(draft_tokens=3))
    kinds: tuple[Literal["policy", "improver"], ...] = ("policy", "improver")
    for opened, expected in ((run, [0, 0]), (drafting, [0, 3])):
        samplers = [answering.sampler(opened, kind, Sampling(temperature=0.5), 8) for kind in kinds]
        assert [sampler.sampling.draft_tokens for sampler in samplers] == expected
        assert {sampler.sampling.temperature for sampler in samplers} == {0.5}
    with pytest.raises(ConfigError, match=r"Experiment\.draft_tokens = -1"):
        small.experiment(draft_tokens=-1)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(RlConfig(estimator="reinforce", samples_per_prompt=2), marks=pytest.mark.slow),
        pytest.param(RlConfig(estimator="group", samples_per_prompt=2, whiten=True), marks=pytest.mark.slow),
        pytest.param(
            RlConfig(
                estimator="ppo", samples_per_prompt=2, epochs=2, minibatches=2, policy=PolicyLoss(kind="ppo_clip")
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda config: config.estimator,
)
def test_estimators_train_and_resume_exactly(
    whole: pathlib.Path, tmp_path: pathlib.Path, config: RlConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pit_jax.stages.rl_program import RlProgram

    rounds = (Round(name="rlhf", steps=3, references=("chosen",)),)
    stage = small.rl_policy(rl=config, rounds=rounds, snapshots=(1,))
    straight = small.alone(whole, tmp_path / "straight", stage)
    records = small.records(straight.directory, "rl_policy", "train")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["kl/mean"] > 0
    assert records[0]["grad_norm"] > 0
    if config.estimator == "ppo":
        assert "head" in straight.artifact("rl_policy").params()
        assert straight.language_model("rl_policy:1", "policy").keys() == straight.lm.abstract().keys()

    class Stop(Exception):
        pass

    advance = RlProgram.advance

    def stopping(self: RlProgram, state: Any, step: int) -> Any:
        if step == 2:
            raise Stop
        return advance(self, state, step)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RlProgram, "advance", stopping)
        small.alone(whole, tmp_path / "stopped", stage)
    again = small.alone(whole, tmp_path / "stopped", stage)
    assert small.records(again.directory, "rl_policy") == small.records(straight.directory, "rl_policy")
    for snapshot in (None, "1", "rlhf"):
        params = [r.artifact("rl_policy").params(snapshot) for r in (straight, again)]
        jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.slow
def test_references_may_be_the_improvers_own(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stage = dataclasses.replace(
        small.rl_improver(), rounds=IMPROVER, training=small.rl_training(judge_every=1),
        monitor=MonitorConfig(action="adapt", patience=1, kl_budget=1e-9, raise_beta=2.0),
    )  # fmt: skip
    run = small.alone(whole, tmp_path / "run", stage)
    records = small.records(run.directory, "rl_improver", "train")
    assert all(0 <= record["judge"] <= 1 for record in records)
    assert [r["beta"] for r in records] == pytest.approx([0.2, 0.2, 0.4]), "a KL over its budget doubles beta"


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        (lambda: small.sft("improver", init_from="reward_bt"), "must be a language model, but it is a reward model"),
        (lambda: small.rl_policy(anchor="reward_bt"), "must be a language model, but it is a reward model"),
        (lambda: small.rl_policy(reward="sft_policy"), "must be a reward model, but it is a language model"),
        (lambda: small.rl_policy(reward="reward_gap"), "role 'bt', but is of role 'gap'"),
        (lambda: small.rl_policy(init_from="sft_improver"), "role 'policy', but is of role 'improver'"),
        (lambda: small.rl_policy(init_from="rl_policy:7"), "no snapshot '7'"),
        (lambda: small.rl_policy(init_from="nothing"), "not the directory of a trained stage"),
        (lambda: small.evaluate(improver="rl_policy", improvers={}, policies={}, policy_curve={}), "role 'improver'"),
    ],
)
def test_wrong_kind_of_checkpoint_is_named(whole: pathlib.Path, tmp_path: pathlib.Path, stage: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        small.alone(whole, tmp_path / "run", stage())


def test_checkpoint_of_another_model_is_named(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wider = dataclasses.replace(small.MODEL, width=24)
    with pytest.raises(CheckpointError, match=r"another model.*width: 16 -> 24"):
        small.alone(whole, tmp_path / "run", small.reward("bt"), model=wider)


@pytest.mark.parametrize(
    ("stage", "settings", "named"),
    [
        (small.sft("policy", training=small.training(batch_size=8, micro_batches=3)), {}, "batch_size = 8 must"),
        (small.sft("policy", training=small.training(batch_size=6)), {"count": 4}, "batch size = 6 must be divisible"),
        (small.rl_policy(training=small.rl_training(micro_batches=3)), {}, "must divide the 16 samples"),
        (small.sft("policy"), {"mesh": MeshConfig(data=3), "count": 4}, "multiply to the 4 devices"),
        (small.sft("policy"), {"lengths": {"inputs": 20}}, "must have the keys 'inputs' and 'targets'"),
    ],
)
def test_sizes_that_do_not_divide_are_named(
    whole: pathlib.Path, tmp_path: pathlib.Path, stage: Any, settings: dict, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        small.alone(whole, tmp_path / "run", stage, **settings)


def test_a_setting_that_was_refused_may_be_mended_in_place(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="batch_size = 8 must"):
        small.alone(whole, tmp_path, small.sft("policy", training=small.training(1, micro_batches=3)))
    assert not (tmp_path / "sft_policy" / "stage.json").exists()
    small.alone(whole, tmp_path, small.sft("policy", training=small.training(1, micro_batches=2)))
    with pytest.raises(CheckpointError, match="micro_batches: 2 -> 4"):
        small.alone(whole, tmp_path, small.sft("policy", training=small.training(1, micro_batches=4)))


def test_loss_that_is_not_finite_stops_with_the_step(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wild = small.training(optimizer=Optimizer(learning_rate=1e30, kind="sgd", clip_norm=None))
    with pytest.raises(TrainingError, match="loss of step [234] is not finite.*learning_rate"):
        small.alone(whole, tmp_path / "run", small.sft("policy", training=wild))
    assert not (tmp_path / "run" / "sft_policy" / "result.json").exists()


def test_language_model_stage_feeds_sft(tmp_path: pathlib.Path) -> None:
    from pit_jax.data.folds import Folds
    from pit_jax.data.open import DataSpec
    from pit_jax.stages.lm import LanguageModel
    from pit_jax.stages.pipeline import Recipe

    (tmp_path / "text.txt").write_text("\n".join(f"a {n} line of text" for n in range(200)))
    data = DataSpec(path=str(tmp_path / "text.txt"), folds=Folds(validation_fraction=0.2))
    one = dataclasses.replace(small.training(2), loop=Loop(steps=2, log_every=2))
    stages = (
        LanguageModel(name="pretrain", data=data, length=16, training=one),
        small.sft("policy", init_from="pretrain", training=one),
    )
    with small.devices(1):
        Recipe(model_dir=str(tmp_path / "run"), seed=0, experiment=small.experiment(), stages=stages).run()
    assert small.records(tmp_path / "run", "pretrain", "eval")[-1]["loss"] > 0
    none = dataclasses.replace(stages[0], data=dataclasses.replace(data, folds=Folds(validation_fraction=0.0)))
    with small.devices(1), pytest.raises(DataError, match="holds out no document"):
        Recipe(model_dir=str(tmp_path / "none"), seed=0, experiment=small.experiment(), stages=(none,)).run()
