"""SRT whole on a tiny run: data with a program as the critic, tuning, pairs, DPO, answers; ablations; bad input."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from pit_jax.core.errors import CheckpointError, ConfigError, DataError
from pit_jax.data.collate import collator_for
from pit_jax.data.pack import Packing
from pit_jax.data.synthetic import critique, rating
from pit_jax.models.encoder_decoder import EncoderDecoderConfig
from pit_jax.models.lora import Lora
from pit_jax.sharding.mesh import MeshConfig
from pit_jax.sharding.place import put_batch
from pit_jax.srt.critics import FunctionCriticConfig
from pit_jax.srt.text import PARTS, SrtCodec, SrtText
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.run import Adapters, Run
from pit_jax.stages.srt_answers import Inference, answers, finals, text_of
from pit_jax.stages.srt_data import SrtData
from pit_jax.stages.srt_files import read_records
from pit_jax.stages.srt_pairs import SrtPairs, choose_pairs
from pit_jax.stages.srt_tune import SrtTune, make_examples

from . import small, srt_data_program, srt_small


@pytest.fixture(scope="module")
def srt(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a finished run of SRT; tests must leave it as it is."""
    directory = tmp_path_factory.mktemp("srt") / "run"
    with small.devices(1):
        srt_small.recipe(directory).run()
    return directory


@pytest.fixture(scope="module")
def run(srt: pathlib.Path) -> Run:
    with small.devices(1):
        opened = Run(str(srt), 0, srt_small.experiment())
        assert opened.mesh.size == 1
    return opened


@pytest.fixture
def copied(srt: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(srt, tmp_path / "copy"))


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(directory: pathlib.Path, stage: str) -> dict[str, Any]:
    return json.loads((directory / stage / "result.json").read_text())


def go_on(directory: pathlib.Path, *stages: Any) -> None:
    with small.devices(1):
        Recipe(model_dir=str(directory), seed=0, experiment=srt_small.experiment(), stages=stages).run()


def test_records_are_the_base_models_responses_with_their_critiques(srt: pathlib.Path) -> None:
    drafts = rows(srt / "srt_data" / "responses" / "drafts.jsonl")
    records = rows(srt / "srt_data" / "records.jsonl")
    counts = result(srt, "srt_data")
    assert counts["drafts"] == len(drafts) == 96 and counts["kept"] == len(records) > 20
    assert len({draft["prompt"] for draft in drafts}) == 96
    assert {draft["group"] for draft in drafts} <= groups_of("sft")
    finished = {(draft["prompt"], draft["response"]) for draft in drafts if draft["finished"]}
    assert sum(counts["dropped"].values()) == 96 - len(records)
    for record in records:
        pair = record["prompt"], record["response"]
        assert pair in finished and record["response_score"] == rating(*pair) == record["score"]
        assert f"### Weaknesses\n{record['weaknesses']}\n" in critique(*pair)
        assert record["refinement_score"] == rating(record["prompt"], record["refinement"]) == 10
    assert len(read_records(run_path(srt, "srt_data"))) == len(records)


def run_path(directory: pathlib.Path, stage: str) -> Any:
    from etils import epath

    return epath.Path(directory) / stage / "records.jsonl"


def groups_of(fold: str) -> set[str]:
    from pit_jax.data.open import open_records

    return {record.group for record in open_records(small.DATA, "train", fold=fold)}  # pyright: ignore


def test_only_the_prompt_is_masked(run: Run, srt: pathlib.Path) -> None:
    """The held-out loss is minus the mean log-probability of every token of y, f, r, both markers and EOS."""
    stage = srt_small.tune()
    learning = stage.learning(run)
    examples = stage.examples(run).train[:6]
    batch, used = learning.held_out.leading(examples)
    assert used == 6
    params = run.language_model("srt_tune", "policy")
    placed = put_batch(batch, run.mesh, row_axis=0)
    loss = jax.jit(learning.measured)(params, placed)["loss"]
    scores = np.asarray(jax.jit(run.lm.logprobs)(params, placed).logp)
    lengths = [len(example["targets"]) for example in examples]
    assert float(loss.weight) == sum(lengths)
    total = -sum(scores[row, :length].sum() for row, length in enumerate(lengths))
    np.testing.assert_allclose(float(loss.total), total, rtol=1e-5)
    for row, example in enumerate(examples):
        record = run.codec.text(example["targets"])
        assert record.count("<feedback>") == record.count("<refinement>") == 1
        assert (np.asarray(batch.response)[row, : lengths[row]] == example["targets"]).all()
        assert example["targets"][-1] == run.codec.eos_ids[0]


def test_packed_rows_have_the_loss_of_plain_ones(run: Run) -> None:
    stage, codec = srt_small.tune(), SrtCodec(srt_small.TEXT, run.codec).codec
    examples = stage.examples(run).train[:6]
    params, losses = run.language_model("srt_tune", "policy"), []
    for packing in (None, Packing(rows=6, inputs=60, targets=100, segments=3)):
        collator = collator_for("sft_policy", codec, batch_size=6, micro_batches=None, packing=packing)
        batch, used = collator.leading(examples)
        assert used == 6
        measured = jax.jit(stage.learning(run).measured)
        losses.append(float(measured(params, put_batch(batch, run.mesh, row_axis=0))["loss"].total))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_held_out_groups_are_not_trained_on(run: Run, srt: pathlib.Path) -> None:
    found = srt_small.tune(held_out=0.3).examples(run)
    prompts = [{tuple(example["inputs"].tolist()) for example in part} for part in (found.train, found.held_out)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert found.report.kept == len(found.train) + len(found.held_out) == result(srt, "srt_data")["kept"]
    short = SrtCodec(dataclasses.replace(srt_small.TEXT, targets=20), run.codec)
    cut = make_examples(read_records(run_path(srt, "srt_data")), short, 0.3).report
    assert cut.dropped["too_long"] > 0 and cut.kept + cut.dropped.total() == found.report.kept


def test_pairs_are_those_whose_own_score_improved(srt: pathlib.Path) -> None:
    written = rows(srt / "srt_pairs" / "responses" / "written.jsonl")
    assert {row["group"] for row in written} <= groups_of("rl") and len(written) == 64
    better = [
        {"group": row["group"], "prompt": row["prompt"], "chosen": row["refinement"], "rejected": row["response"]}
        for row in written
        if row["outcome"] == "parsed" and row["finished"] and row["response"] and row["response"] != row["refinement"]
        and None not in (row["response_score"], row["refinement_score"])
        and row["refinement_score"] > row["response_score"]
    ]  # fmt: skip
    assert rows(srt / "srt_pairs" / "pairs.jsonl") == better != []
    counts = result(srt, "srt_pairs")
    assert counts["kept"] == len(better) and counts["chosen_by"] == "own score"
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["texts"] == 64
    stated = [row for row in written if row["feedback"] and "<10>" in row["feedback"]]
    assert all(row["response_score"] == 10 for row in stated)


def test_dpo_starts_from_the_tuned_model_and_its_pairs(srt: pathlib.Path, run: Run) -> None:
    manifest = json.loads((srt / "srt_dpo" / "stage.json").read_text())
    assert set(manifest["inputs"]) == {"srt_tune", "srt_pairs"} and manifest["role"] == "policy"
    before, after = (run.language_model(name, "policy") for name in ("srt_tune", "srt_dpo"))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after))
    assert max(moved) > 1e-4


@pytest.mark.parametrize("checkpoint", ["srt_tune", "srt_dpo"])
def test_answers_are_refinements_or_fall_back(run: Run, checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [prompt.ids for prompt in run.held_out(20)]
    found = answers(run, checkpoint, prompts, Inference(), 1.0, 20)
    assert text_of(run, checkpoint) == srt_small.TEXT
    room = run.codec.lengths.targets
    for entry, final in zip(found, finals(found), strict=True):
        assert final == (entry.refinement if entry.outcome == "parsed" else entry.response)
        assert len(final.ids) + final.finished <= room
    unparsed = sum(entry.outcome != "parsed" for entry in found)
    assert unparsed < 20, "a tuned model comes to a refinement"
    assert (f"{unparsed} of 20 texts have no usable refinement" in caplog.text) == (unparsed > 0)
    few = answers(run, checkpoint, prompts[:3], Inference(text=srt_small.TEXT), 1.0, 2)
    assert few == found[:3], "neither batch nor number of prompts matters"
    cold = answers(run, checkpoint, prompts[:3], Inference(rest_temperature=0.0), 1.0, 2)
    assert [entry.response for entry in cold] == [entry.response for entry in few]


def test_a_model_that_srt_has_not_tuned_is_refused(run: Run) -> None:
    with pytest.raises(CheckpointError, match="'sft_policy' was not tuned by SRT.*give Inference.text"):
        answers(run, "sft_policy", [(5, 6)], Inference(), 1.0, 1)


def test_running_again_changes_no_file(copied: pathlib.Path) -> None:
    before = small.contents(copied)
    with small.devices(1):
        srt_small.recipe(copied).run()
    assert small.contents(copied) == before


def test_an_interrupted_stage_goes_on_from_its_drafts(copied: pathlib.Path, srt: pathlib.Path) -> None:
    (copied / "srt_data" / "result.json").unlink()
    (copied / "srt_data" / "records.jsonl").unlink()
    drafts = copied / "srt_data" / "responses" / "drafts.jsonl"
    before = drafts.stat().st_mtime_ns
    go_on(copied, srt_small.data())
    assert drafts.stat().st_mtime_ns == before
    for name in ("records.jsonl", "result.json"):
        assert (copied / "srt_data" / name).read_bytes() == (srt / "srt_data" / name).read_bytes()


def ablated(parts: tuple[str, ...]) -> SrtText:
    return dataclasses.replace(srt_small.TEXT, parts=parts)


def test_without_scores_every_refinement_is_preferred(copied: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    for stage in ("srt_tune", "srt_pairs", "srt_dpo"):
        shutil.rmtree(copied / stage)
    go_on(copied, srt_small.tune(ablated(())), srt_small.pairs(prompts=24))
    counts = result(copied, "srt_pairs")
    assert counts["chosen_by"] == "all" and counts["kept"] > 0
    assert "has no score" in caplog.text
    written = rows(copied / "srt_pairs" / "responses" / "written.jsonl")
    assert all(row["feedback"] is row["response_score"] is row["refinement_score"] is None for row in written)
    assert not set(counts["dropped"]) & {"not_improved", "no_own_score"}
    with small.devices(1):
        opened = Run(str(copied), 0, srt_small.experiment())
        found = answers(opened, "srt_tune", [p.ids for p in opened.held_out(8)], Inference(), 1.0, 8)
    assert any(entry.outcome == "parsed" for entry in found) and all(entry.feedback is None for entry in found)


@pytest.mark.parametrize("left_out", PARTS)
def test_every_ablation_is_trained_on_text_without_the_part(run: Run, left_out: str) -> None:
    parts = tuple(part for part in PARTS if part != left_out)
    stage = srt_small.tune(ablated(parts))
    whole, found = (s.examples(run).train for s in (srt_small.tune(), stage))
    assert len(found) == len(whole)
    shorter = [len(a["targets"]) - len(b["targets"]) for a, b in zip(whole, found, strict=True)]
    assert min(shorter) >= 1
    for example in found:
        text = run.codec.text(example["targets"])
        assert ("<suggestion>" in text) == ("suggestion" in parts)
        assert any(f"<{n}>" in text for n in range(1, 11)) == ("score" in parts)


ROW = {"group": "g", "prompt": "p", "response": "y", "finished": True, "feedback": "f", "refinement": "r",
       "outcome": "parsed", "response_score": 5.0, "refinement_score": 6.0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "scored", "reason"),
    [
        ({}, True, None),
        ({"refinement_score": 5.0}, True, "not_improved"),
        ({"refinement_score": 5.0}, False, None),
        ({"refinement_score": None}, True, "no_own_score"),
        ({"response_score": None}, True, "no_own_score"),
        ({"refinement": "y"}, False, "identical"),
        ({"finished": False}, True, "unfinished_response"),
        ({"response": " "}, True, "empty_response"),
        ({"outcome": "too_long", "refinement": None}, True, "too_long"),
    ],
)
def test_why_a_pair_is_left_out(change: dict[str, Any], scored: bool, reason: str | None) -> None:
    pairs, report = choose_pairs([ROW | change], scored=scored)
    assert dict(report.dropped) == ({} if reason is None else {reason: 1})
    assert len(pairs) == report.kept == (reason is None)
    assert not pairs or pairs[0]["chosen"] == (ROW | change)["refinement"]


def test_no_record_no_pair_and_no_reply_are_errors_that_say_why(copied: pathlib.Path) -> None:
    deaf = FunctionCriticConfig(critique="builtins:max", score="pit_jax.data.synthetic:rating")
    with pytest.raises(DataError, match="no record is left.*no_refinement.*Look at what the critic writes"):
        go_on(copied, srt_small.data(name="deaf", critic=deaf))
    assert not (copied / "deaf" / "records.jsonl").exists()
    with pytest.raises(CheckpointError, match="'sft_policy' was not tuned by SRT"):
        go_on(copied, srt_small.pairs(name="more", model="sft_policy"))
    broken = srt_data_program.asked("http://127.0.0.1:9/v1")
    limits = dataclasses.replace(broken.critic.endpoint.limits, attempts=1)  # pyright: ignore
    endpoint = dataclasses.replace(broken.critic.endpoint, limits=limits)  # pyright: ignore
    silent = dataclasses.replace(broken, name="silent", critic=dataclasses.replace(broken.critic, endpoint=endpoint))  # pyright: ignore
    with pytest.raises(DataError, match=r"of \d+ drafts have no reply.*most_unanswered = 0.02.*Run the same command"):
        go_on(copied, silent)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: is not JSON"),
        ("[]", ":2: must be a JSON object"),
        ({"refinement": ""}, ":2: refinement = '' must be a text"),
        ({"weaknesses": 3}, ":2: weaknesses = 3 must be a text"),
        ({"score": 11}, ":2: score = 11 must be a number from 1 to 10"),
        ({"score": True}, ":2: score = True must be a number"),
    ],
)
def test_a_bad_line_of_records_is_named(tmp_path: pathlib.Path, line: str | dict[str, Any], said: str) -> None:
    good = {"prompt": "p", "response": "y", "weaknesses": "w", "suggestions": "s", "score": 7, "refinement": "r"}
    path = tmp_path / "srt_data" / "records.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(good) + "\n" + (line if isinstance(line, str) else json.dumps(good | line)) + "\n")
    with pytest.raises(DataError, match=said):
        read_records(run_path(tmp_path, "srt_data"))
    path.write_text(json.dumps(good) + "\n")
    (record,) = read_records(run_path(tmp_path, "srt_data"))
    assert record.group == "p" and record.critique.score == 7.0
    path.write_text("")
    with pytest.raises(DataError, match="there is no record"):
        read_records(run_path(tmp_path, "srt_data"))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="SrtData.prompts = 1"):
        srt_small.data(prompts=1)
    with pytest.raises(ConfigError, match="SrtData.most_unanswered = 1.0"):
        srt_small.data(most_unanswered=1.0)
    with pytest.raises(ConfigError, match="SrtPairs.prompts = 0"):
        srt_small.pairs(prompts=0)
    with pytest.raises(ConfigError, match="SrtTune.held_out = 0.0"):
        srt_small.tune(held_out=0.0)
    assert (SrtData.verb, SrtTune.verb, SrtPairs.verb) == ("srt-data", "srt", "srt-pairs")


SEQ2SEQ = EncoderDecoderConfig(
    vocab_size=96, width=16, heads=2, head_dim=8, mlp=32, encoder_layers=1, decoder_layers=1, relative_buckets=8,
    relative_max_distance=16, role_embedding=True,
)  # fmt: skip
OTHERS = {
    "adapters": {"adapters": Adapters(base="sft_policy", lora=Lora(rank=4, alpha=8.0))},
    "encoder_decoder": {"model": SEQ2SEQ},
    "four_devices": {"mesh": MeshConfig(data=2, fsdp=2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_model_goes_all_the_way(tmp_path: pathlib.Path, name: str) -> None:
    settings = dataclasses.replace(srt_small.experiment(), **OTHERS[name])
    # Adapters leave embeddings as they are, so the marker is a piece that the base model has met.
    text = dataclasses.replace(srt_small.TEXT, parts=(), refinement="<answer>")
    sft, data, _, pairs, dpo = srt_small.stages()
    stages = (sft, data, srt_small.tune(text, 200), pairs, dpo)
    with small.devices(4 if name == "four_devices" else 1):
        srt_small.recipe(tmp_path, experiment=settings, stages=stages).run()
        opened = Run(str(tmp_path), 0, settings)
        prompts = [prompt.ids for prompt in opened.held_out(32)]
        found = answers(opened, "srt_tune", prompts, Inference(), 0.7, 32)
        assert len(answers(opened, "srt_dpo", prompts[:4], Inference(), 0.7, 4)) == 4
    assert result(tmp_path, "srt_pairs")["kept"] > 1
    assert sum(entry.outcome == "parsed" for entry in found) > 8
