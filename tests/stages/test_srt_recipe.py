"""SRT as gin files: what they say, and that a run on two hosts asks, writes and trains as one on one host does."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from pit_jax.cli.gin_config import GinSource, build
from pit_jax.cli.stages import ROOT
from pit_jax.core.errors import ConfigError
from pit_jax.core.tree import named_leaves
from pit_jax.data.synthetic import critique, rating
from pit_jax.io import serialize
from pit_jax.srt.text import SrtCodec
from pit_jax.stages.artifact import Artifact, changes
from pit_jax.stages.dpo import Dpo
from pit_jax.stages.pipeline import Recipe
from pit_jax.stages.srt_data import SrtData
from pit_jax.stages.srt_pairs import SrtPairs
from pit_jax.stages.srt_tune import SrtTune

from ..evaluation.chat_server import ChatServer, Turn
from ..srt.formats import codec_of, words
from . import nano, srt_data_program


def recipe(directory: pathlib.Path, *bindings: str) -> Recipe:
    files = ("recipes/demo.gin",)
    return build(GinSource(files=files, bindings=(f"MODEL_DIR='{directory}/run'", *bindings)), ROOT).value


def stages(whole: Recipe) -> tuple[SrtData, SrtTune, SrtPairs, Dpo]:
    """Return SRT's stages of a recipe."""
    named = {stage.name: stage for stage in whole.stages}
    data, tune, pairs, dpo = (named[name] for name in ("srt_data", "srt_tune", "srt_pairs", "srt_dpo"))
    assert isinstance(data, SrtData) and isinstance(tune, SrtTune)
    assert isinstance(pairs, SrtPairs) and isinstance(dpo, Dpo)
    return data, tune, pairs, dpo


def test_the_stages_hang_together(tmp_path: pathlib.Path) -> None:
    whole = recipe(tmp_path, "SRT_BASE='sft_policy'")
    whole.check_references()
    data, tune, pairs, dpo = stages(whole)
    assert data.model == tune.init_from == "sft_policy" and (data.fold, pairs.fold) == ("sft", "rl")
    assert (tune.data, pairs.model, dpo.init_from, dpo.pairs) == ("srt_data", "srt_tune", "srt_tune", "srt_pairs")
    assert dpo.beta == 0.01 and data.temperature == pairs.temperature == 0.7
    # The tokenizer of the recipe can write the format of the recipe, within the model's vocabulary.
    tokenizer = words(tmp_path / "words", vars(whole.experiment.tokenizer)["special_pieces"])
    assert tokenizer.vocab_size <= whole.experiment.model.vocab_size
    SrtCodec(tune.text, codec_of(tokenizer))


def test_an_ablation_is_one_line(tmp_path: pathlib.Path) -> None:
    _, tune, _, _ = stages(recipe(tmp_path, "text.SrtText.parts=('weakness', 'suggestion')"))
    assert tune.text.parts == ("weakness", "suggestion")
    _, tune, _, _ = stages(recipe(tmp_path, "text.SrtText.parts=()"))
    assert tune.text.parts == ()


def test_length_and_critic_must_be_said(tmp_path: pathlib.Path) -> None:
    whole = tmp_path / "whole.gin"
    whole.write_text(
        """
        from __gin__ import dynamic_registration
        from pit_jax.stages import pipeline
        from pit_jax.stages import srt_data
        from pit_jax.stages import srt_tune
        include 'recipes/jsonl.gin'
        include 'stages/srt.gin'
        pipeline.Recipe.stages = [@srt_data/srt_data.SrtData(), @srt_tune/srt_tune.SrtTune()]
        """.replace("\n        ", "\n")
    )
    said = ("MODEL_DIR='run'", "DATA_PATH='mine.jsonl'")
    with pytest.raises(ConfigError, match="SRT_TARGETS"):
        build(GinSource(files=(str(whole),), bindings=said), ROOT)
    with pytest.raises(ConfigError, match="critic"):
        build(GinSource(files=(str(whole),), bindings=(*said, "SRT_TARGETS=1000")), ROOT)


def answer(turn: Turn) -> None:
    prompt, _, rest = turn.call.text.removeprefix("[Instruction]\n").partition("\n\n[Response]\n")
    response = rest.partition("\n\n[Your task]")[0]
    whole = "### Improved Response" in rest
    turn.reply(critique(prompt, response) if whole else f"[[{rating(prompt, response)}]]")


@pytest.mark.slow
def test_two_hosts_ask_once_and_train_as_one(tmp_path: pathlib.Path) -> None:
    more = [f"--gin_file={pathlib.Path(__file__).with_name('srt_nano.gin')}"]
    asked = []
    with ChatServer(answer) as server:
        for processes in (1, 2):
            flags = [*more, f"--gin.CRITIC_URL='{server.url}'"]
            line = nano.command(tmp_path / str(processes), ["pipeline"], flags)
            nano.run(line, tmp_path / f"{processes}.log", devices=2 // processes, processes=processes)
            asked.append({call.text for call in server.calls})
            assert max(server.seen.values()) == 1, "one process asks, and asks nothing twice"
            server.seen.clear()
            server.calls.clear()
    assert asked[0] == asked[1] and len(asked[0]) > 20
    one, two = ((tmp_path / name) for name in "12")
    for name in ("srt_data/records.jsonl", "srt_data/responses/drafts.jsonl", "srt_data/result.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    counts = [json.loads((run / "srt_tune" / "result.json").read_text())["records"] for run in (one, two)]
    assert counts[0] == counts[1] > 5
    first, second = (dict(named_leaves(Artifact(run / "srt_tune").params())) for run in (one, two))
    for name, leaf in first.items():
        np.testing.assert_allclose(jax.device_get(leaf), jax.device_get(second[name]), rtol=1e-4, atol=1e-5)


def test_settings_of_how_a_critic_is_asked_are_no_other_run() -> None:
    stage = srt_data_program.asked("http://127.0.0.1:1/v1")
    assert isinstance(stage, SrtData)
    endpoint = vars(stage.critic)["endpoint"]
    quicker = dataclasses.replace(endpoint, limits=dataclasses.replace(endpoint.limits, concurrency=64))
    richer = dataclasses.replace(quicker, budget=dataclasses.replace(endpoint.budget, tokens=10), key_env="OTHER")
    other = dataclasses.replace(endpoint, model="another")

    def changed(new) -> list[str]:
        critic = dataclasses.replace(vars(stage)["critic"], endpoint=new)
        return changes(serialize.to_json(stage), serialize.to_json(dataclasses.replace(stage, critic=critic)))

    assert changed(richer) == [] and len(changed(other)) == 1
