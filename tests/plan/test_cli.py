"""`pit-jax plan` from the command line: JSON alone on stdout, exit status, what is tried where it does not fit."""

from __future__ import annotations

import json

import pytest

from pit_jax.cli.main import main
from pit_jax.plan import topology

RECIPE = (
    "plan",
    "--gin_file=recipes/demo.gin",
    "--topology=cpu:2",
    "--stage=sft_policy",
    "--gin.sft_policy/supervised.Training.batch_size=16",
)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets this for good; here it is put back."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert [(program["stage"], program["name"]) for program in plan["programs"]] == [
        ("sft_policy", "start"),
        ("sft_policy", "step"),
        ("sft_policy", "held-out loss"),
    ]
    for program in plan["programs"]:
        assert program["fits"]
        assert program["memory_bytes_per_chip"] >= program["arguments_bytes"] > 0
        assert {"flops_per_chip", "collectives", "compile_seconds", "temporaries_bytes"} <= set(program)
    step = plan["programs"][1]
    assert step["flops_per_chip"] > 2.5 * plan["programs"][2]["flops_per_chip"] > 0
    assert [entry["kind"] for entry in step["collectives"]] == ["all-reduce"]


@pytest.mark.slow
def test_what_does_not_fit_ends_with_status_3_and_what_was_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "_host_memory", lambda: 2 * 2_200_000)
    with pytest.raises(SystemExit) as end:
        main([*RECIPE])
    assert end.value.code == 3
    shown = capsys.readouterr().out
    assert "Does not fit: 1 of 3 programs" in shown
    assert "sft_policy: batch_size = 16, micro_batches = 8" in shown
    assert "this fits" in shown


def test_a_misspelt_stage_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE[:3], "--stage=sft_polcy"]) == 1
    assert "Did you mean 'sft_policy'?" in capsys.readouterr().err
