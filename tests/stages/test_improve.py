"""`pit-jax improve` on the shared run: what comes out, and from which directory it is made."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from typing import Any

import pytest

from pit_jax.core.errors import CheckpointError, ConfigError, DataError
from pit_jax.improve.loop import first_answers
from pit_jax.io import files
from pit_jax.stages import improve as module
from pit_jax.stages.artifact import Artifact
from pit_jax.stages.improve import Improver, Request, improve_file

PROMPT = "goal from oak by red blue end thanks"
DRAFTS = [
    {"prompt": PROMPT, "response": "inn via tower inn thanks"},
    {"prompt": PROMPT},
    {"prompt": "goal from mill by blue red", "response": None, "id": 7},
    {"prompt": "from barn by red red end cheers", "response": ""},
    {"prompt": "from farm by blue blue", "response": "farm via barn pond"},
]


@pytest.fixture
def drafts(tmp_path: pathlib.Path) -> pathlib.Path:
    return _file(tmp_path / "drafts.jsonl", DRAFTS)


def _file(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _improved(checkpoint: pathlib.Path, source: pathlib.Path, **changes: Any) -> list[dict[str, Any]]:
    output = source.with_name("improved.jsonl")
    improve_file(Request(checkpoint=str(checkpoint), input=str(source), output=str(output), **changes))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_line_is_answered_and_the_accept_rule_holds(whole: pathlib.Path, drafts: pathlib.Path) -> None:
    rows = _improved(whole, drafts, iterations=3)
    assert [row["prompt"] for row in rows] == [draft["prompt"] for draft in DRAFTS]
    for row, draft in zip(rows, DRAFTS, strict=True):
        if draft.get("response") is not None:
            assert row["response"] == draft["response"]
        accepted = [step for step in row["steps"] if step["accepted"]]
        assert all(step["gap"] > step["zero"] for step in accepted)
        assert all(step["accepted"] for step in row["steps"][:-1]), "no step follows a rejected one"
        assert 1 <= len(row["steps"]) <= 3
        assert row["improved"] == (accepted[-1]["proposal"] if accepted else row["response"])
        assert row["changed"] == (row["improved"] != row["response"]) or accepted


def test_drafted_tokens_change_no_row(whole: pathlib.Path, drafts: pathlib.Path) -> None:
    rows = _improved(whole, drafts, candidates=2, iterations=2)
    assert _improved(whole, drafts, candidates=2, iterations=2, draft_tokens=3) == rows
    assert Improver(str(whole), 3).sampler("improver", 1.0).sampling.draft_tokens == 3
    assert Improver(str(whole), 3).sampler("policy", 1.0).sampling.draft_tokens == 0
    assert Improver(str(whole)).sampler("improver", 1.0).sampling.draft_tokens == 0


def test_missing_responses_are_written_by_the_policy_of_the_improver(whole: pathlib.Path, drafts: pathlib.Path) -> None:
    improver = Improver(str(whole))
    assert improver.artifact.directory.name == "rl_improver"
    assert improver.gap is not None and improver.gap.directory.name == "reward_gap"
    rows = _improved(whole, drafts, temperature=0.0)
    sampler = improver.sampler("policy", 0.0)
    middle = Artifact(whole / "rl_policy").trunk("2", improver.mesh)  # rl_improver names rl_policy:2
    prompts = [improver.codec.prompt_ids(DRAFTS[n]["prompt"]) for n in (1, 2)]
    wanted = first_answers(lambda *args: sampler.answer(middle, *args), improver.codec, prompts, 0)
    assert [rows[n]["response"] for n in (1, 2)] == [improver.codec.text(answer.ids) for answer in wanted]


def test_same_seed_same_file_whatever_the_batches(
    whole: pathlib.Path, drafts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _improved(whole, drafts, candidates=2, seed=3)
    assert _improved(whole, drafts, candidates=2, seed=3) == first
    monkeypatch.setattr(module, "_BATCH", 2)
    second = _improved(whole, drafts, candidates=2, seed=3)
    for one, other in zip(first, second, strict=True):
        assert one["improved"] == other["improved"]
        assert [s["gap"] for s in one["steps"]] == pytest.approx([s["gap"] for s in other["steps"]], abs=1e-5)
    proposals = [[step["proposal"] for step in row["steps"]] for row in _improved(whole, drafts, seed=4)]
    assert proposals != [[step["proposal"] for step in row["steps"]] for row in first]


def test_stage_directory_and_snapshot_choose_the_improver(whole: pathlib.Path, drafts: pathlib.Path) -> None:
    assert _improved(whole, drafts) == _improved(whole / "rl_improver", drafts)
    earlier = _improved(pathlib.Path(f"{whole}/rl_improver:stage1"), drafts, accept="always")
    assert earlier != _improved(whole, drafts, accept="always")
    assert Improver(str(whole / "sft_improver")).policy is not None
    with pytest.raises(CheckpointError, match="sft --role=policy, not an improver"):
        _improved(whole / "sft_policy", drafts)
    with pytest.raises(CheckpointError, match="no finished improver"):
        _improved(drafts.parent, drafts)
    with pytest.raises(CheckpointError, match="no snapshot 'last'"):
        _improved(pathlib.Path(f"{whole}/rl_improver:last"), drafts)


def test_main_improver_is_taken_from_a_copied_run_with_an_ablation(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copied = pathlib.Path(shutil.copytree(whole, tmp_path / "copied", copy_function=shutil.copy))
    shutil.copytree(copied / "rl_improver", copied / "ablation")
    order = files.read_json(copied / "stages.json")
    files.write_json(copied / "stages.json", [*order, "ablation"])
    for name in order:
        (copied / name / "result.json").touch()
    assert Improver(str(copied)).artifact.directory.name == "rl_improver"


def test_without_a_gap_model_the_rule_is_off_and_that_is_said(
    whole: pathlib.Path, tmp_path: pathlib.Path, drafts: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = pathlib.Path(shutil.copytree(whole, tmp_path / "copied"))
    shutil.rmtree(copied / "reward_gap")
    with caplog.at_level(logging.WARNING):
        rows = _improved(copied, drafts, candidates=2)
    assert "the accept rule is OFF" in caplog.text
    assert all(step["accepted"] and step["gap"] is None for row in rows for step in row["steps"])
    shutil.rmtree(copied / "rl_policy")
    rows = _improved(copied, drafts, accept="always")  # the SFT policy is left
    assert rows[1]["response"] == rows[1]["response"].strip()
    shutil.rmtree(copied / "sft_policy")
    with pytest.raises(DataError, match="no policy to write one"):
        _improved(copied, drafts)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{oops", "not JSON"),
        ({"response": "x"}, "'prompt' must be a text"),
        ({"prompt": "  "}, "'prompt' must be a text that is not empty"),
        ({"prompt": PROMPT, "response": 3}, "'response' must be a text, not int"),
        ({"prompt": PROMPT, "response": "inn " * 40}, "Lengths.targets = 14"),
    ],
)
def test_bad_lines_fail_or_are_skipped_with_their_place(
    whole: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, line: Any, named: str
) -> None:
    source = _file(tmp_path / "some.jsonl", [DRAFTS[0], line, DRAFTS[4]])
    output = tmp_path / "improved.jsonl"
    output.write_text("before")
    with pytest.raises(DataError, match=f"(?s)some.jsonl.*2.*{named}"):
        _improved(whole, source)
    assert output.read_text() == "before", "a refused file changes nothing"
    with caplog.at_level(logging.WARNING):
        rows = _improved(whole, source, on_bad_record="skip")
    assert [row["prompt"] for row in rows] == [PROMPT, DRAFTS[4]["prompt"]]
    assert "some.jsonl" in caplog.text and named in caplog.text


def test_nothing_to_improve_and_bad_settings_are_named(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="no line to improve"):
        _improved(whole, _file(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match="Improve.accept = 'gaps' must be one of"):
        _improved(whole, _file(tmp_path / "one.jsonl", DRAFTS[:1]), accept="gaps")
    with pytest.raises(ConfigError, match="Improve.iterations = 0"):
        _improved(whole, _file(tmp_path / "one.jsonl", DRAFTS[:1]), iterations=0)


def test_output_appears_whole_or_not_at_all(
    whole: pathlib.Path, drafts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = drafts.with_name("improved.jsonl")
    output.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            _improved(whole, drafts)
    assert output.read_text() == "before"
    names = ["drafts.jsonl", "improved.jsonl", "improved.jsonl.part"]
    assert sorted(path.name for path in drafts.parent.iterdir()) == names, "what is made is kept"
    rows = _improved(whole, drafts)
    assert len(rows) == len(DRAFTS) and sorted(path.name for path in drafts.parent.iterdir()) == names[:2]


def test_lines_go_to_standard_output_without_a_file(
    whole: pathlib.Path, drafts: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    improve_file(Request(checkpoint=str(whole), input=str(drafts)))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == _improved(whole, drafts)
