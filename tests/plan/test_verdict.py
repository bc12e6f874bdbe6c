"""Compilers' words turned into a verdict, and what a machine's numbers say of a program."""

from __future__ import annotations

import json

import pytest

from pit_jax.plan.cost import Collective, Cost
from pit_jax.plan.report import Plan, Suggestion
from pit_jax.plan.topology import TPUS, target
from pit_jax.plan.verdict import Memory, Planned, estimate, overflow

# Recorded from libtpu 0.0.42 (a product too large, and a program whose arguments alone are) and from XLA on a GPU.
BEFORE_SCHEDULING = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.12G) exceeds "
    "available HBM (15.75G)."
)
AFTER_SCHEDULING = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 64.00G of 15.75G "
    "hbm. Exceeded hbm capacity by 48.25G.\n\nTotal hbm usage >= 64.50G:\n    reserved        260.00M"
)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (BEFORE_SCHEDULING, int(16.12 * 2**30)),
        (AFTER_SCHEDULING, 64 * 2**30),
        ("RESOURCE_EXHAUSTED: HBM (2.50T) exceeds available HBM (95.74G)", int(2.5 * 2**40)),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1024 bytes", 1024),
        ("INVALID_ARGUMENT: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_what_a_program_wanted_is_read_from_the_message(message: str, wanted: int | None) -> None:
    assert overflow(message) == wanted


def _planned(total: int | None, *, compiled: bool = True, available: int | None = 100) -> Planned:
    memory = None if total is None else Memory(arguments=10, residents=5, total=total)
    cost = Cost(flops=7.0, bytes=3.0, collectives=(), uncounted=())
    return Planned(
        stage="sft", name="step", memory=memory, cost=cost, compiled=compiled, seconds=1.0, available=available,
        seconds_estimate={}, problem=None if compiled else "out of memory",
    )  # fmt: skip


def test_a_program_fits_only_with_all_that_stays_beside_it() -> None:
    assert _planned(100).fits
    assert not _planned(101).fits
    assert _planned(101).out_of_memory
    assert not _planned(90, compiled=False).fits
    assert _planned(10**12, available=None).fits
    assert not _planned(None, compiled=False).fits
    assert not _planned(None, compiled=False).out_of_memory


def test_json_says_the_same_of_what_does_not_fit() -> None:
    tried = Suggestion(changes=("remat = 'full'",), programs=(_planned(90),))
    plan = Plan(
        machine=target("v5e-4"), mesh={"data": 1, "fsdp": 4}, programs=(_planned(50), _planned(300, compiled=False)),
        suggestions=(tried,),
    )  # fmt: skip
    data = json.loads(json.dumps(plan.to_json()))
    fine, failed = data["programs"]
    assert set(fine) == set(failed)
    assert (data["fits"], fine["fits"], failed["fits"]) == (False, True, False)
    assert failed["excess_bytes_per_chip"] == 200
    assert failed["flops_per_chip"] == 7.0
    assert failed["bytes_accessed_per_chip"] is None
    assert data["suggestions"][0]["fits"]


def test_the_least_time_is_that_of_the_slowest_part() -> None:
    chip = TPUS["v5p"]
    crossing = Collective(kind="all-reduce", axes="data", devices=2, count=1, bytes=1e9, wire_bytes=1e9)
    inside = Collective(kind="all-gather", axes="fsdp", devices=64, count=1, bytes=1e9, wire_bytes=1e9)
    cost = Cost(flops=459e12, bytes=2.765e12, collectives=(crossing, inside), uncounted=())
    one, two = (estimate(cost, chip, slices) for slices in (1, 2))
    assert one["flops"] == pytest.approx(1.0)
    assert one["memory"] == pytest.approx(1.0)
    assert one["collectives"] == pytest.approx(2 / 600)
    assert two["collectives"] == pytest.approx(1 / 6.25 + 1 / 600)
