"""The recipe for a model one has, from its directory to an improver in the same format."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

import pit_jax
from pit_jax.cli import shipped
from pit_jax.core.errors import CheckpointError
from pit_jax.stages.convert import Conversion, convert
from pit_jax.stages.improve import Request, improve_file
from pit_jax.stages.pipeline import Recipe

from ..stages import checkpoints
from . import shrunk

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = (
    "TRAIN_STEPS=2",
    "RL_STEPS=1",
    "BATCH_SIZE=4",
    "EVAL_PROMPTS=4",
    "TASK_FEATURE_LENGTHS={'inputs': 112, 'targets': 32}",
    "optim.Optimizer.warmup_steps=0",
    "rl.RlTraining.contexts=2",
    "rl.RlTraining.evaluation_prompts=4",
    "rl_config.RlConfig.samples_per_prompt=2",
    "evaluate.Evaluate.best_of=(2,)",
    "evaluate.Evaluate.iterations=1",
    "run.Experiment.tensorboard=False",
    "MODEL_DTYPE='float32'",
)
LORA = ("BASE=%INITIAL_CHECKPOINT_PATH", "lora.Lora.rank=4")


def header() -> str:
    text, _, _ = (shipped.gin_directory() / "recipes/pretrained.gin").read_text().partition("from __gin__")
    return text.replace("\n#", "\n").replace("\\\n", " ")


def conversations(path: pathlib.Path) -> str:
    """Write preferences as lists of messages."""
    rows = []
    for n in range(150):
        ask = {"role": "user", "content": f"{n} + 1?"}
        answers = (f"It is {n + 1}.", f"Not {n}!")
        rows.append({"prompt": [ask]} | dict(zip(("chosen", "rejected"), answers, strict=True)))
        for field in ("chosen", "rejected"):
            rows[-1][field] = [{"role": "assistant", "content": rows[-1][field]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(directory: pathlib.Path, model: str, *bindings: str, more: tuple[str, ...] = ()) -> Recipe:
    data = conversations(directory / "mine.jsonl")
    own = (f"INITIAL_CHECKPOINT_PATH={model!r}", f"DATA_PATH={data!r}", f"MODEL_DIR='{directory}/run'")
    return shrunk.recipe("pretrained", *own, *SETTINGS, *bindings, more=more)


def stages(made: Recipe, *names: str) -> list[str]:
    made.run(list(names))
    return sorted(shrunk.results(pathlib.Path(made.model_dir)))


def test_commands_of_the_header_are_understood(tmp_path: pathlib.Path) -> None:
    """Word for word, macro on the command line included; only what it names is put in place of its names."""
    start, lora = (
        re.search(rf"{begin}.*", header())[0]  # type: ignore[index]
        for begin in ("pit-jax pipeline", "--gin_file=stages/lora.gin")
    )
    words = [*shlex.split(f"{start} {lora}")[1:], "--gin_file=models/chat.gin", "--print_config"]
    model = checkpoints.write(tmp_path / "model", "llama3")
    words = [word.replace("path/to/model", model) for word in words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "pit_jax", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "run.Adapters.base = %BASE" in done.stdout
    assert "BASE = %INITIAL_CHECKPOINT_PATH" in done.stdout


def test_first_stage_and_a_checkpoint_that_changes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk.use_devices(monkeypatch, 1)
    model = checkpoints.write(tmp_path / "model", "t5")
    made = recipe(tmp_path, model)
    assert stages(made, "sft_policy") == ["sft_policy"]
    (pathlib.Path(model) / "README.md").write_text("Our model.")
    made.run(["sft_policy"])
    shutil.rmtree(model)
    checkpoints.write(pathlib.Path(model), "t5", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="was made from another .* than .*model holds now"):
        recipe(tmp_path, model).run(["sft_policy"])


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_from_a_directory_to_an_improver(
    adapters: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrunk.use_devices(monkeypatch, 1)
    model = checkpoints.write(tmp_path / "model", "llama3")
    more = ("models/chat.gin", *(["stages/lora.gin"] if adapters else []))
    made = recipe(tmp_path, model, *(LORA if adapters else ()), more=more)
    made.run()
    assert (tmp_path / "run" / "report" / "report.html").exists()
    ask = "7 + 1?"
    lines = [{"prompt": ask, "response": "Not 7!"}, {"prompt": [{"role": "user", "content": ask}]}]
    lines[1]["response"] = "Not 7!"
    (tmp_path / "drafts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = Request(checkpoint=made.model_dir, input=str(tmp_path / "drafts.jsonl"), output=str(tmp_path / "out"))
    improve_file(request)
    steps = [json.loads(line)["steps"][0] for line in (tmp_path / "out").read_text().splitlines()]
    assert steps[0]["zero"] == pytest.approx(steps[1]["zero"], abs=1e-5)  # A text is one user's message.
    convert(Conversion(source=f"{made.model_dir}/rl_improver", output=str(tmp_path / "improver")))
    ids = np.arange(3, 15).reshape(2, 6)
    ours, theirs = (
        pit_jax.load_pretrained(place) for place in (f"{made.model_dir}/rl_improver", tmp_path / "improver")
    )
    np.testing.assert_allclose(theirs.logits(ids), ours.logits(ids), atol=1e-5)
    assert theirs.tokenizer is not None and theirs.eos_ids == ours.eos_ids
