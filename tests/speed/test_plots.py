"""Pictures and tables of growth, from made-up measurements."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest
from matplotlib import pyplot as plt

from benchmarks import growth, plots
from benchmarks.speed import record
from benchmarks.speed.record import Record
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.work import WORKS, decoding, decoding_bytes, least_bytes, operations

CEILINGS = {"matmul": 1e11, "copy": 2e9, "peak": None}


def measured(kind: str, seconds: float, **phases: float) -> Record:
    return Record(
        work=WORKS["nano"][kind], shape=SHAPES["nano"], by="pit_jax", variant="", device="cpu", seconds=(seconds,),
        processors=(seconds,), first=2.0, first_step=1.0, disturbance=0.0, memory=2**30, phases=phases,
        extra={"ceilings": CEILINGS},
    )  # fmt: skip


def test_a_rollout_has_a_point_for_its_decoding() -> None:
    found = measured("rollout", 2.0, prefill=0.5, decode=1.5)
    whole, decoded = plots.points([found])
    shape, work = found.shape, found.work
    assert whole.intensity == operations(shape, work) / least_bytes(shape, work)
    assert whole.speed == operations(shape, work) / 2.0
    assert decoded.intensity == decoding(shape, work) / decoding_bytes(shape, work)
    assert decoded.speed == decoding(shape, work) / 1.5


def test_the_legend_says_how_much_of_the_roof_is_reached() -> None:
    axes = plt.figure().add_subplot()
    plots.draw_roofline(
        axes, (100.0, 10.0), [plots.Point("flat", "k", 50.0, 25.0), plots.Point("steep", "k", 2.0, 5.0)]
    )
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["flat, 25% of the roof", "steep, 25% of the roof"]
    plt.close("all")


def test_phases_fill_the_step() -> None:
    axes = plt.figure().add_subplot()
    plots.draw_phases(axes, [measured("rl", 4.0, generate=1.0, update=2.5)])
    assert [patch.get_width() for patch in axes.patches] == [1.0, 2.5, 0.5]  # type: ignore[attr-defined]
    plt.close("all")


def test_a_bar_says_how_much_faster_we_are_than_the_best_variant() -> None:
    axes = plt.figure().add_subplot()
    ours, theirs = measured("sft", 2.0), dataclasses.replace(measured("sft", 3.0), by="trl")
    plots.draw_ratios(axes, {"sft": [ours, dataclasses.replace(theirs, seconds=(5.0,)), theirs]})
    assert [text.get_text() for text in axes.texts] == ["1.5 x"]
    plt.close("all")


def test_pictures_are_made_of_the_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.save(tmp_path, "sft-nano-pit_jax", measured("sft", 2.0).to_json())
    found = measured("rl", 4.0, update=2.0)
    record.save(tmp_path / "peers", "rl-nano-pit_jax", found.to_json())
    record.save(tmp_path / "peers", "rl-nano-trl-plain", dataclasses.replace(found, by="trl").to_json())
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path), "--output", str(tmp_path / "images")])
    plots.main()
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "against_others.png",
        "rl_phases.png",
        "roofline.png",
    ]


def test_growth_is_told_against_the_row_before() -> None:
    one = measured("sft", 2.0)
    slower = dataclasses.replace(one, seconds=(2.5,))
    assert "| 0.800 " in growth.tuning_table([one, slower])
    short, long = (
        dataclasses.replace(found, work=dataclasses.replace(found.work, rows=10, response=response))
        for found, response in ((measured("rl", 1.0), 100), (measured("rl", 2.2), 200))
    )
    first, second = growth.sampling_table([short, long]).splitlines()[2:]
    assert first.startswith("| 100 ") and "1.200" not in first
    assert second.startswith("| 200 ") and "| 1.200 " in second  # 1.2 s for 1,000 tokens more
