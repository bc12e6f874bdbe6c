"""Metric files: one JSON object a line, cut back exactly, and never torn."""

from __future__ import annotations

import json
import math
import struct

import pytest

from pit_jax.core.errors import ConfigError, TrainingError
from pit_jax.io import writers
from pit_jax.io.writers import MetricWriter, read_metrics, without_timing


def write_three(directory):
    writer = MetricWriter(directory, tensorboard=False)
    writer.write(10, "train", {"loss": 1.5, "timing/seconds": 3.0})
    writer.write(10, "eval", {"loss": 1.25})
    writer.write(20, "train", {"loss": 1.0, "timing/seconds": 6.0})
    return writer


def test_records_are_on_file_before_close(tmp_path):
    writer = write_three(tmp_path)
    assert [(r["step"], r["kind"], r["loss"]) for r in read_metrics(writer.path)] == [
        (10, "train", 1.5), (10, "eval", 1.25), (20, "train", 1.0)
    ]  # fmt: skip
    assert without_timing(read_metrics(writer.path)[0]) == {"step": 10, "kind": "train", "loss": 1.5}
    writer.close()


@pytest.mark.parametrize("torn", ["", '{"step": 20, "kind": "tr'])
def test_truncation_keeps_whole_lines_up_to_the_step_and_appends_after_them(tmp_path, torn):
    writer = write_three(tmp_path)
    before = writer.path.read_text().splitlines()
    writer.close()
    with open(writer.path, "a") as file:
        file.write(torn)
    again = MetricWriter(tmp_path, tensorboard=False)
    again.truncate_after(10)
    again.write(20, "train", {"loss": 1.0, "timing/seconds": 6.0})
    again.close()
    assert writer.path.read_text().splitlines() == before


def test_truncating_nothing_makes_nothing(tmp_path):
    MetricWriter(tmp_path / "new", tensorboard=False).truncate_after(5)
    assert not (tmp_path / "new").exists()


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.write(1, "train", {"a": math.nan, "b": math.inf, "c": 0.1})
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(writer.path.read_text(), parse_constant=refuse) == {
        "step": 1, "kind": "train", "a": None, "b": None, "c": 0.1
    }  # fmt: skip


def test_a_spoilt_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
        MetricWriter(tmp_path, tensorboard=False).truncate_after(1)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written"):
        MetricWriter(tmp_path, tensorboard=False).write(1, "train", {"loss": 1.0})


def test_remote_records_are_rewritten_whole_at_every_sync(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.files, "is_local", lambda path: False)
    write_three(tmp_path).close()
    again = MetricWriter(tmp_path, tensorboard=False)
    again.truncate_after(10)
    again.write(30, "train", {"loss": 0.5})
    assert [r["step"] for r in read_metrics(again.path)] == [10, 10]
    again.sync()
    assert [r["step"] for r in read_metrics(again.path)] == [10, 10, 30]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, tensorboard=True)
    writer.write(7, "eval", {"accuracy": 0.625})
    writer.close()
    (events,) = (tmp_path / "tensorboard" / "eval").iterdir()
    content = events.read_bytes()
    assert b"accuracy" in content and struct.pack("<f", 0.625) in content


def test_weights_and_biases_that_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricWriter(tmp_path, tensorboard=False, wandb_project="pit")
