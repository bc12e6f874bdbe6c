"""Clocks, records, tables, and the comparison with other projects: what is said of given times."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import pytest

from benchmarks.peers import compare, program
from benchmarks.speed import options, record
from benchmarks.speed.clock import Laps, peak_memory, since_start
from benchmarks.speed.record import Record
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.work import WORKS, operations

NANO, SFT = SHAPES["nano"], WORKS["nano"]["sft"]


def measured(by: str, seconds: tuple[float, ...], **changes: object) -> Record:
    made = Record(
        work=SFT, shape=NANO, by=by, variant="", device="cpu", seconds=seconds, processors=seconds, first=3.0,
        first_step=1.0, disturbance=0.0, memory=2**30,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_warm_up_is_not_measured() -> None:
    laps = Laps(warmup=2)
    calls: list[int] = []
    laps.repeat(lambda: calls.append(1), 3)
    assert len(calls) == len(laps.seconds) == 5
    assert len(laps.measured) == len(laps.processors) - 2 == 3
    assert 0 < laps.first < since_start()


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory()
    block = bytearray(300 * 2**20)
    assert peak_memory() >= 300 * 2**20 + 2**20 * bool(block)
    assert before > 2**20


def test_figures_of_a_record() -> None:
    found = measured("pit_jax", (2.0, 1.0, 4.0))
    assert found.median == 2.0
    assert found.tokens_per_second == 16 * 256 / 2.0
    assert found.flops == operations(NANO, SFT) / 2.0
    assert dataclasses.replace(found, device_memory=5).peak == 5


def test_where_answers_end_early_the_tokens_that_were_made_count() -> None:
    ending = WORKS["nano"]["ending"]
    ours, slower = (
        measured("pit_jax", (4.0,), work=ending, extra={"tokens": tokens}, variant=name)
        for tokens, name in ((2000.0, "replaced"), (1800.0, "plain"))
    )
    assert ours.tokens_per_second == 500.0 and ours.flops is None and record.row(ours)[4] == "-"
    assert compare.best([slower, ours], "pit_jax") is ours
    assert compare.pooled([ours, slower]).tokens == 1900.0
    assert ending.ends(8192) == tuple(range(512)) and WORKS["nano"]["rollout"].ends(8192) == ()


def test_a_record_comes_back_from_its_file(tmp_path: pathlib.Path) -> None:
    found = measured("trl", (2.0, 1.0), phases={"update": 1.0})
    record.save(tmp_path / "out", "name", found.to_json())
    written = json.loads((tmp_path / "out" / "name.json").read_text())
    again = record.from_json(written)
    assert (again.work, again.shape, again.phases) == (SFT, NANO, {"update": 1.0})
    assert written["command"] and written["machine"]["cores"] >= 1
    assert again.median == found.median


def test_tables_are_markdown() -> None:
    lines = record.table(("a", "long"), [("value", "1")]).splitlines()
    assert lines == ["| a     | long |", "| ----- | ---- |", "| value | 1    |"]
    with pytest.raises(ValueError, match="2 cells"):
        record.table(("a", "b"), [("1",)])


def test_the_fastest_variant_of_a_peer_counts() -> None:
    ours = measured("pit_jax", (1.0,), memory=2**29)
    found = [ours, measured("transformers", (3.0,), variant="sdpa"), measured("transformers", (2.0,), variant="eager")]
    row = compare.document_row("sft", "nano", ours, found)
    assert row == (
        "SFT step, nano", "CPU", "4,096 tokens/s, 0.50 GiB", "2,048 tokens/s, 1.00 GiB (eager)", "2.0 x", "-", "-",
        "-", "-", "0.50 x",
    )  # fmt: skip
    assert len(row) == len(compare.DOCUMENT_HEADS)
    assert "2.00 x" in compare.comparison(found) and "3.00 x" in compare.comparison(found)


def test_rounds_are_put_together() -> None:
    one, two = measured("trl", (1.0, 2.0), phases={"a": 1.0}), measured("trl", (9.0, 3.0), memory=7, phases={"a": 3.0})
    both = compare.pooled([one, two])
    assert sorted(both.seconds) == [1.0, 2.0, 3.0, 9.0]
    assert (both.memory, both.device_memory, both.phases) == (2**30, None, {"a": 2.0})


def arguments(*given: str) -> argparse.Namespace:
    return compare._parser().parse_args(["--shape", "tiny", *given])


def test_who_takes_part() -> None:
    asked = arguments("--peers", "trl,tunix", "--python-trl", "/trl/python", "--ours", "scan=--set scan_layers=True")
    found = compare.entries(asked, "sft")
    labels = ("pit_jax", "pit_jax micro-batches", "pit_jax scan", "trl plain", "tunix remat", "tunix plain")
    assert tuple(entry.label for entry in found) == labels
    assert found[2].command[-3:] == ("--variant=scan", "--set", "scan_layers=True")
    assert found[3].command[0] == "/trl/python"
    rollouts = ["pit_jax", "pit_jax inverse", "pit_jax two-devices", "pit_jax scan", "tunix sampler"]
    assert [entry.label for entry in compare.entries(asked, "rollout")] == rollouts
    assert found[1].command[-3:] == ("--variant=micro-batches", "--training", "micro_batches=4")
    with pytest.raises(SystemExit, match="must be among"):
        compare.entries(arguments("--peers", "vllm"), "sft")


def test_a_peer_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    entry = compare.Entry(by="trl", variant="plain", command=("python3", "-c", "raise SystemExit('no such thing')"))
    assert compare.run(entry) is None
    assert "trl plain failed" in (said := capsys.readouterr().out) and "no such thing" in said


def test_sizes_go_on_to_other_processes() -> None:
    asked = arguments("--rows", "8", "--steps", "2")
    again = options.parser(None).parse_args(options.sizes(asked))
    assert (again.shape, again.rows, again.prompt, again.steps) == ("tiny", 8, None, 2)
    shape, work = options.asked(again, "rollout")
    assert (shape.name, work.rows, work.prompt) == ("tiny", 8, 16)


def test_settings_of_the_model_are_literals_or_words() -> None:
    assert options.settings(["scan_layers=True", "remat=full", "logprob_chunk=64"]) == {
        "scan_layers": True, "remat": "full", "logprob_chunk": 64,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="FIELD=VALUE"):
        options.settings(["scan_layers"])


def test_phases_are_medians_after_the_warm_up() -> None:
    phases = program.Phases()
    for name in ("first", "update", "update"):
        with phases.of(name, lambda: None):
            pass
        phases.end_step()
    assert set(phases.medians(1)) == {"first", "update"}
    assert phases.medians(1)["first"] == 0.0
