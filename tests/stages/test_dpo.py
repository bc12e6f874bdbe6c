"""DPO: its loss against one written down again, and the stage in all its variants."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import CheckpointError, ConfigError, DataError
from pit_jax.core.rng import key_for
from pit_jax.core.types import Comparisons, Params
from pit_jax.data.collate import collator_for
from pit_jax.data.pack import Packing
from pit_jax.data.views import Example
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.lora import Lora, is_adapter, split
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import put_batch
from pit_jax.stages import supervised
from pit_jax.stages.dpo import REFERENCE, Dpo, log_ratios, preference_objective
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.programs import stage_programs
from pit_jax.stages.run import Adapters, Run
from pit_jax.stages.supervised import SupervisedProgram
from pit_jax.train.optim import Optimizer

from . import small

BETA, MESH = 0.3, MeshConfig(data=2, fsdp=2)
ADAPTERS = Adapters(base="sft_policy", lora=Lora(rank=2, alpha=4.0))
STOCHASTIC = Optimizer(learning_rate=0.1, kind="sgd", clip_norm=None)
PACKING = Packing(rows=16, inputs=90, targets=60, segments=5)


def dpo(steps: int = 4, *, training: dict[str, Any] | None = None, **changes: Any) -> Dpo:
    """Return the stage."""
    trained = small.training(steps, **(training or {}))
    whole = Dpo(name="dpo_policy", init_from="sft_policy", training=trained, beta=BETA, report_records=24)
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def run(whole: pathlib.Path) -> Run:
    with small.devices(1):
        opened = Run(str(whole), 0, small.experiment())
        assert opened.mesh.size == 1
    return opened


@pytest.fixture(scope="module")
def examples(run: Run) -> list[Example]:
    return run.examples("reward_bt", "train", limit=8)


def batch_of(run: Run, examples: list[Example], packing: Packing | None = None) -> Comparisons:
    collator = collator_for("reward_bt", run.codec, batch_size=len(examples), micro_batches=None, packing=packing)
    batch, used = collator.leading(examples)
    assert used == len(examples)
    assert isinstance(batch, Comparisons)
    return put_batch(batch, run.mesh, row_axis=0)


LM = DecoderOnly(dataclasses.replace(small.MODEL, role_embedding=False))
"""Without roles, which the plain logits do not know of."""


def both() -> Params:
    """Return a policy that is far from its reference, and the reference beside it."""
    return LM.init(jax.random.key(1)) | {REFERENCE: LM.init(jax.random.key(2))}


def value_and_gradient(segments: int, params: Params, batch: Comparisons) -> tuple[float, dict[str, Any], Params]:
    objective = preference_objective(LM, BETA, segments)

    def mean(params: Params) -> tuple[jax.Array, Any]:
        loss, metrics = objective(params, batch, key_for(0, "unused"))
        return loss.value(), {name: metric.value() for name, metric in metrics.items()}

    (value, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return float(value), {name: float(metric) for name, metric in metrics.items()}, jax.device_get(gradient)


@jax.jit
def log_probability(params: Params, tokens: jax.Array, prompt: jax.Array, length: jax.Array) -> jax.Array:
    """Return log p(reply | x) from the logits of one padded row, prompt and reply in one piece."""
    places = jnp.arange(tokens.size)
    logp = jax.nn.log_softmax(LM.logits(params, tokens[None], (places < length)[None])[0])
    said = logp[places[:-1], tokens[1:]]
    return jnp.sum(jnp.where((places[1:] >= prompt) & (places[1:] < length), said, 0.0))


def test_loss_and_gradient_are_those_of_the_formula(run: Run, examples: list[Example]) -> None:
    params, few, gradient_of = both(), examples[:4], jax.jit(jax.grad(log_probability))
    value, metrics, gradient = value_and_gradient(1, params, batch_of(run, few))
    reference = params.pop(REFERENCE)
    ratios, slopes = np.zeros((len(few), 2)), []
    for n, example in enumerate(few):
        prompt = list(run.codec.policy_prompt(example["prompt"].tolist()).ids)
        for side, reply in enumerate(("chosen", "rejected")):
            ids = prompt + example[reply].tolist()
            row = (jnp.asarray(ids + [0] * (40 - len(ids))), jnp.asarray(len(prompt)), jnp.asarray(len(ids)))
            ratios[n, side] = float(log_probability(params, *row)) - float(log_probability(reference, *row))
            slopes.append(gradient_of(params, *row))
    margin = BETA * (ratios[:, 0] - ratios[:, 1])
    assert np.abs(margin).min() > 1e-3
    assert value == pytest.approx(np.mean(np.log1p(np.exp(-margin))), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean(margin > 0))
    assert metrics["log_ratio/chosen"] == pytest.approx(ratios[:, 0].mean(), abs=1e-4)
    assert metrics["log_ratio/rejected"] == pytest.approx(ratios[:, 1].mean(), abs=1e-4)
    # d loss / d params = -beta mean s(-margin) (d log pi(y_w) - d log pi(y_l)); none of it through the reference.
    push = BETA / (1 + np.exp(margin)) / len(few)
    weights = np.stack([-push, push], axis=1).reshape(-1)
    wanted = jax.tree.map(lambda *parts: np.einsum("n,n...->...", weights, np.stack(parts)), *slopes)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient.pop(REFERENCE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, wanted)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 1e-3


def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(run: Run, examples: list[Example]) -> None:
    start = LM.init(jax.random.key(1))
    batch, params = batch_of(run, examples), start | {REFERENCE: start}
    value, metrics, gradient = value_and_gradient(1, params, batch)
    assert value == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin/square"] == pytest.approx(0, abs=1e-8)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3
    np.testing.assert_allclose(jax.jit(log_ratios(LM, 1))(params, batch), 0, atol=1e-5)


def test_packed_rows_have_the_loss_and_gradient_of_plain_ones(run: Run, examples: list[Example]) -> None:
    plain, packed = batch_of(run, examples), batch_of(run, examples, PACKING)
    assert packed.inputs.response_segments.max() > 1, "nothing was packed"
    params = both()
    one, other = (value_and_gradient(segments, params, batch) for segments, batch in ((1, plain), (5, packed)))
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one[2], other[2])


@pytest.mark.slow
def test_devices_packing_and_micro_batches_make_the_same_update_as_planned(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small.alone(whole, tmp_path / "plain", dpo(1, training={"optimizer": STOCHASTIC}))
    cut = {"micro_batches": 2, "packing": dataclasses.replace(PACKING, rows=32)}
    stage, calls = dpo(1, training={"optimizer": STOCHASTIC, **cut}), _recorded_steps(monkeypatch)
    other = small.alone(whole, tmp_path / "mesh", stage, count=4, mesh=MESH)
    records = [small.records(pathlib.Path(str(run.directory)), "dpo_policy") for run in (plain, other)]
    for before, after in zip(*records, strict=True):
        assert before.keys() == after.keys()
        # In the first step all margins are 0 but for rounding, which decides who is right.
        for key in before.keys() - {"kind"} - ({"accuracy"} if before["kind"] == "train" else set()):
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-5), key
    with small.devices(1):
        params = [Run(str(r.directory), 0, r.experiment).artifact("dpo_policy").params() for r in (plain, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *params)
    one, two = ((run.result("dpo_policy") or {})["means"] for run in (plain, other))
    assert [entry["value"] for entry in one.values()] == pytest.approx(
        [entry["value"] for entry in two.values()], abs=1e-4
    )
    settings = small.experiment(mesh=MESH, tokenizer=str(whole / "tokenizer"))
    recipe = Recipe(model_dir="run", seed=0, experiment=settings, stages=(small.sft("policy"), stage))
    programs = {program.name: program for program in stage_programs(recipe, stage, make_mesh(MESH))[0]}
    assert list(programs) == ["start", "step", "held-out loss", "report log-ratios"]
    planned = _seen(programs["step"].arguments)
    # The key is made where the process runs, so only its shape is planned.
    assert calls[0] == [(s, d, calls[0][n][2] if place is None else place) for n, (s, d, place) in enumerate(planned)]


def _recorded_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that will hold the arguments' shapes and places of every training step."""
    make, calls = supervised.make_step, []

    def recording(*args: Any, **named: Any) -> Any:
        step = make(*args, **named)

        def recorded(*arguments: Any) -> Any:
            calls.append(_seen(arguments))
            return step(*arguments)

        return recorded

    monkeypatch.setattr(supervised, "make_step", recording)
    return calls


def _seen(tree: Any) -> list[Any]:
    return [
        (leaf.shape, str(leaf.dtype), leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else None)
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.slow
def test_training_raises_the_margin_and_resumes_exactly(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = dpo(30, training={"batch_size": 32}, init_from="rl_policy:2")
    run = small.alone(whole, tmp_path / "straight", stage)
    last, result = small.records(run.directory, "dpo_policy", "train")[-1], run.result("dpo_policy")
    assert last["loss"] < math.log(2) - 0.01
    assert last["margin/mean"] > 0
    assert result is not None
    assert set(result["accuracy"]) == {"chosen > rejected", "chosen > rejected (clean)", "longer wins (baseline)"}
    right = result["accuracy"]["chosen > rejected"]
    assert right["n"] == 24
    assert right["ci95"][0] <= right["value"] <= right["ci95"][1]
    means = {name: entry["value"] for name, entry in result["means"].items()}
    difference = means["log-ratio of chosen"] - means["log-ratio of rejected"]
    assert means["margin"] == pytest.approx(BETA * difference, abs=1e-6)
    assert run.language_model("dpo_policy", "policy").keys() == run.lm.abstract().keys()
    _stop_at(15, whole, tmp_path / "stopped", stage, monkeypatch)
    again = small.alone(whole, tmp_path / "stopped", stage)
    assert small.records(again.directory, "dpo_policy") == small.records(run.directory, "dpo_policy")
    assert again.result("dpo_policy") == result
    jax.tree.map(np.testing.assert_array_equal, *(r.artifact("dpo_policy").params() for r in (run, again)))


def _stop_at(
    at: int, whole: pathlib.Path, directory: pathlib.Path, stage: Dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin a stage and end it before its step number `at`."""

    class Stop(Exception):
        pass

    advance = SupervisedProgram.advance

    def stopping(self: SupervisedProgram, state: Any, step: int) -> Any:
        if step == at:
            raise Stop
        return advance(self, state, step)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(SupervisedProgram, "advance", stopping)
        small.alone(whole, directory, stage)


@pytest.fixture
def written(whole: pathlib.Path, tmp_path: pathlib.Path, run: Run) -> pathlib.Path:
    """A stage of another run that has written pairs: the directory of the SFT stage with a file of pairs."""
    stage = pathlib.Path(shutil.copytree(whole / "sft_policy", tmp_path / "other" / "srt_pairs"))
    text = run.codec.text
    examples = run.examples("reward_bt", "train", limit=30)
    lines = [
        json.dumps({name: text(example[name]) for name in ("prompt", "chosen", "rejected")}) for example in examples
    ]
    (stage / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return stage


@pytest.mark.slow
def test_pairs_of_a_stage_are_learnt_from_and_may_not_change(
    whole: pathlib.Path, tmp_path: pathlib.Path, written: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, file = dpo(pairs=str(written), held_out_pairs=0.2, beta=0.01), written / "pairs.jsonl"
    _stop_at(3, whole, tmp_path / "run", stage, monkeypatch)
    before = file.read_text()
    first, second, *rest = before.splitlines()
    one, two = json.loads(first), json.loads(second)
    one["chosen"], two["chosen"] = two["chosen"], one["chosen"]
    file.write_text("\n".join([json.dumps(one), json.dumps(two), *rest]) + "\n")
    with pytest.raises(DataError, match="another stream of examples, with fingerprint"):
        small.alone(whole, tmp_path / "run", stage)
    file.write_text(before)
    run = small.alone(whole, tmp_path / "run", stage)
    held_out = (run.result("dpo_policy") or {})["accuracy"]["chosen > rejected"]["n"]
    prompts = {json.loads(line)["prompt"] for line in before.splitlines()}
    assert math.floor(0.2 * len(prompts)) <= held_out < 15
    # The stream's saved position names its length: all pairs but those held out.
    newest = max(run.directory.glob("dpo_policy/checkpoint_*"))
    meta = json.loads((newest / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert f'"length": {30 - held_out},' in json.dumps(meta)


def _line(**fields: Any) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:2], json.dumps(json.loads(lines[2]) | fields), *lines[3:]]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_line(chosen=None), r"pairs.jsonl:3: field 'chosen' is missing.* anew"),
        (_line(rejected=7), r"pairs.jsonl:3: field 'rejected' must be a text"),
        (_line(prompt="  "), r"pairs.jsonl:3: field 'prompt' is empty"),
        (
            lambda lines: [*lines[:1], lines[1][:9], "{}", *lines[3:]],
            r"pairs.jsonl:2: is not JSON.*1 more lines are bad",
        ),
        (lambda lines: lines[:1], r"usable pairs of 1 prompts .kept 1 of 1., and needs 2"),
        (lambda lines: [], "there is no pair in it"),
        (None, "there is no such file. Name a stage that writes pairs.jsonl"),
    ],
)
def test_bad_pairs_are_named(
    whole: pathlib.Path, tmp_path: pathlib.Path, written: pathlib.Path, change: Any, fault: str
) -> None:
    file = written / "pairs.jsonl"
    if change is None:
        file.unlink()
    else:
        file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))
    with pytest.raises(DataError, match=fault):
        small.alone(whole, tmp_path / "run", dpo(pairs=str(written)))


def test_wrong_starts_and_settings_are_named(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for start, fault in (("reward_bt", "must be a language model"), ("sft_improver", "role 'policy'")):
        with pytest.raises(CheckpointError, match=fault):
            small.alone(whole, tmp_path / start, dpo(init_from=start))
    for change in ({"beta": 0.0}, {"beta": math.inf}, {"held_out_pairs": 1.0}, {"report_records": 0}):
        with pytest.raises(ConfigError, match=f"Dpo.{next(iter(change))} ="):
            dpo(**change)
    recipe = small.recipe(tmp_path / "new", stages=(small.sft("policy"), dpo(pairs="srt_pairs")))
    with pytest.raises(ConfigError, match="'dpo_policy' needs 'srt_pairs', but no stage before it"):
        recipe.check_references()


def test_adapters_share_their_base_with_the_reference() -> None:
    settings = small.experiment(adapters=ADAPTERS)
    stages = (small.sft("policy"), dpo(2))
    recipe = Recipe(model_dir="run", seed=0, experiment=settings, stages=stages)
    planned, _ = stage_programs(recipe, stages[1], make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    state, _, _, frozen = next(program for program in planned if program.name == "step").arguments
    base = {id(leaf) for leaf in jax.tree.leaves({k: v for k, v in frozen.items() if k != REFERENCE})}
    assert base
    assert base <= {id(leaf) for leaf in jax.tree.leaves(frozen[REFERENCE])}
    assert all(is_adapter((path[-1].key,)) for path, _ in jax.tree.leaves_with_path(state.params))


@pytest.mark.slow
def test_adapters_are_trained_and_saved_alone(tmp_path: pathlib.Path) -> None:
    settings = small.experiment(adapters=ADAPTERS)
    recipe = Recipe(model_dir=str(tmp_path), seed=0, experiment=settings, stages=(small.sft("policy"), dpo(2)))
    with small.devices(1):
        recipe.run()
        run = Run(str(tmp_path), 0, settings)
        policy, start = run.language_model("dpo_policy", "policy"), run.language_model("sft_policy")
    assert all(a is b for a, b in zip(*(jax.tree.leaves(split(tree)[0]) for tree in (policy, start)), strict=True))
    newest = max((tmp_path / "dpo_policy").glob("checkpoint_*"))
    names = json.loads((newest / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["tree"]
    assert all(is_adapter(tuple(name.split("/"))) for name in names if name.startswith("params/"))
