"""`pit_jax.load_pretrained`: everything a user does with a checkpoint, and what he is told when it is no good."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import pit_jax
from pit_jax.core.errors import CheckpointError, ConfigError, DataError, PitError
from pit_jax.models.convert import stream
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages.pretrained import Pretrained

from . import checkpoints

pytestmark = pytest.mark.slow

HF, T5X = checkpoints.DATA / "hf", checkpoints.DATA / "t5x"


def reference(directory: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(directory / "reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoints.write(tmp_path_factory.mktemp("llama") / "model", "llama3")


@pytest.fixture(scope="module")
def model(llama: str) -> Pretrained:
    return pit_jax.load_pretrained(llama)


def test_it_comes_apart(model: Pretrained) -> None:
    lm, params, tokenizer = model
    assert lm is model.model and params is model.params
    assert tokenizer is model.tokenizer is not None
    assert model.eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side: str) -> None:
    found, loaded = reference(HF / "gemma2"), pit_jax.load_pretrained(HF / "gemma2")
    ids, mask, want = found["input_ids"], found["attention_mask"], found["logits"]
    if side == "left":
        shift = mask.shape[1] - mask.sum(-1)
        ids, mask, want = (np.stack([np.roll(*pair, axis=0) for pair in zip(x, shift)]) for x in (ids, mask, want))  # noqa: B905
    assert loaded.tokenizer is None
    np.testing.assert_allclose(loaded.logits(ids, mask)[mask > 0], want[mask > 0], atol=1e-4)


@pytest.mark.parametrize("name", ["hf/t5_1_1", "hf_t5gemma/t5gemma"])
def test_encoder_decoders(name: str) -> None:
    directory = checkpoints.DATA / name
    found, loaded = reference(directory), pit_jax.load_pretrained(directory)
    logits = loaded.logits(found["input_ids"], found["attention_mask"], found["decoder_input_ids"])
    np.testing.assert_allclose(logits, found["logits"], atol=1e-4)


def test_greedy_continuation_is_the_recorded_one() -> None:
    found, loaded = reference(HF / "llama3"), pit_jax.load_pretrained(HF / "llama3")
    (answer,) = loaded.generate(found["greedy_prompt"].reshape(1, -1), max_new_tokens=64)
    want = found["greedy_ids"].reshape(-1).tolist()
    ends = [want.index(eos) + 1 for eos in loaded.eos_ids if eos in want]
    assert answer == want[: min(ends, default=64)]


@pytest.mark.parametrize(
    ("name", "config"), [("t5_1_1/orbax", "t5_1_1"), ("t5_1_1/legacy", "t5_1_1"), ("scalable_apart", "scalable_apart")]
)
def test_t5x(name: str, config: str) -> None:
    """Also where `config.json` lies beside the checkpoint, as if it were Hugging Face's."""
    found = reference(T5X / config)
    loaded = pit_jax.load_pretrained(T5X / name, config=T5X / config / "config.json")
    prompts = found["encoder_input_tokens"]
    seen = found["decoder_loss_weights"] > 0
    logits = loaded.logits(prompts, prompts > 0, found["decoder_input_tokens"])
    np.testing.assert_allclose(logits[seen], found["logits"][seen], atol=1e-4)


def test_prefix_lm() -> None:
    found = reference(T5X / "prefix_lm")
    loaded = pit_jax.load_pretrained(T5X / "prefix_lm", config=T5X / "prefix_lm" / "config.json")
    seen = found["decoder_target_tokens"] > 0
    logits = loaded.logits(found["decoder_input_tokens"], seen, prefix=found["prefix"])
    np.testing.assert_allclose(logits[seen], found["logits"][seen], atol=1e-4)


def test_t5x_without_its_config_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match='"num_decoder_layers": 2'):
        pit_jax.load_pretrained(T5X / "scalable_apart")


def test_generation_of_texts_ids_and_arrays(model: Pretrained) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None and tokenizer.bos_id is not None
    texts = ["the quick", "lazy dog, don't"]
    answers = model.generate(texts, max_new_tokens=4)
    assert [model.generate(text, max_new_tokens=4) for text in texts] == answers
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    ids = model.generate(rows, max_new_tokens=4)
    assert [tokenizer.decode(row) for row in ids] == answers
    length = max(map(len, rows))
    padded = np.stack([np.pad(row, (length - len(row), 0)) for row in rows])
    assert model.generate(padded, padded > 0, max_new_tokens=4) == ids


def test_samples_depend_on_the_seed_and_the_row_alone(model: Pretrained) -> None:
    settings: dict[str, Any] = dict(max_new_tokens=6, temperature=1.0)
    both = model.generate([[3, 4], [5, 6]], seed=1, **settings)
    assert model.generate([[3, 4]], seed=1, **settings) == both[:1]
    assert model.generate([[3, 4]], seed=2, **settings) != both[:1]
    assert model.generate([[3, 4], [5, 6]], seed=1, draft_tokens=2, **settings) == both


def test_dtype_and_mesh(llama: str, model: Pretrained) -> None:
    half = pit_jax.load_pretrained(llama, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    spread = pit_jax.load_pretrained(llama, mesh=make_mesh(MeshConfig(fsdp=4, data=1)))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread.params)} == {4}
    ids = np.arange(3, 13).reshape(2, 5)
    np.testing.assert_allclose(spread.logits(ids), model.logits(ids), atol=1e-5)
    assert spread.generate(ids, max_new_tokens=4) == model.generate(ids, max_new_tokens=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits([3, 4]), "input_ids must be token ids in rows of one length"),
        (lambda m: m.logits([[3, 4], [5]]), "rows of one length"),
        (lambda m: m.logits([[3, 352]]), "ids from 3 to 352, and the model's vocabulary has 352"),
        (lambda m: m.logits([[3, 4]], [[1]]), r"attention_mask has the shape \(1, 1\)"),
        (lambda m: m.logits([[3, 4]], decoder_input_ids=[[0]]), "left out for a model of the kind DecoderOnly"),
        (lambda m: m.generate([3, 4]), r"prompts\[0\] must be token ids in rows"),
        (lambda m: m.generate([[3], [-1]]), r"prompts\[1\] has ids from -1 to -1"),
        (lambda m: m.generate([[3], []]), "Prompt 1 has no token"),
        (lambda m: m.generate([[3]], draft_tokens=-1), "draft_tokens = -1 must be >= 0"),
    ],
)
def test_calls_that_make_no_sense(call: Callable[[Pretrained], Any], message: str, model: Pretrained) -> None:
    with pytest.raises(PitError, match=message):
        call(model)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        pit_jax.load_pretrained(HF / "qwen2").generate("a text")


def _settings(**changes: Any) -> Callable[[pathlib.Path], None]:
    def spoil(directory: pathlib.Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def _cut(directory: pathlib.Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _half_of_the_shards(directory: pathlib.Path) -> None:
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_tokenizer(directory: pathlib.Path) -> None:
    for path in (checkpoints.DATA / "hf_tokenizers" / "gemma").iterdir():
        shutil.copy(path, directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "does not exist"),
        (lambda d: [path.unlink() for path in d.iterdir()], "holds no weights.*no files"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (_cut, "is cut short"),
        (_half_of_the_shards, "lacks two.safetensors"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "never opened"),
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
        (_other_tokenizer, "tokenizer has 520 pieces, the model only 352"),
        (_settings(model_type="mamba"), "model_type = 'mamba' must be one of"),
        (_settings(quantization_config={"quant_method": "gptq"}), "Quantised weights cannot be read"),
        (_settings(mystery=1), "field mystery = 1 is unknown"),
        (_settings(hidden_size=24), "has shape"),
    ],
)
def test_bad_directories_are_one_message_before_anything_is_allocated(
    spoil: Callable[[pathlib.Path], Any],
    message: str,
    llama: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = checkpoints.copy(llama, tmp_path / "model")
    spoil(directory)

    def never(*args: Any) -> None:
        raise AssertionError("something was read onto the devices")

    monkeypatch.setattr(stream, "_fill", never)
    with pytest.raises((CheckpointError, ConfigError, DataError), match=message):
        pit_jax.load_pretrained(directory)


def test_a_config_is_for_t5x_alone(llama: str) -> None:
    with pytest.raises(ConfigError, match="for T5X checkpoints only"):
        pit_jax.load_pretrained(llama, config="network.json")


def test_stages_of_a_run(whole: pathlib.Path) -> None:
    loaded = pit_jax.load_pretrained(whole / "rl_improver")
    stage1 = pit_jax.load_pretrained(f"{whole}/rl_improver:stage1")
    ids = np.arange(4, 14).reshape(2, 5)
    assert loaded.tokenizer is not None
    assert float(np.abs(loaded.logits(ids) - stage1.logits(ids)).max()) > 0
    with pytest.raises(CheckpointError, match="no snapshot 'stage9'; it has .'stage1', 'stage2'"):
        pit_jax.load_pretrained(f"{whole}/rl_improver:stage9")
    with pytest.raises(CheckpointError, match=r"is a whole run. Name one of its stages: .*rl_improver$|rl_improver\."):
        pit_jax.load_pretrained(whole)
    with pytest.raises(ConfigError, match="brings its own"):
        pit_jax.load_pretrained(whole / "rl_improver", dtype="bfloat16")


def test_a_reward_model_scores_and_does_not_write(whole: pathlib.Path) -> None:
    loaded = pit_jax.load_pretrained(whole / "reward_bt")
    scores = loaded.logits([[4, 5, 6], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]])
    assert scores.shape == (2, 1)
    np.testing.assert_allclose(loaded.logits([[4, 5]])[0], scores[1], atol=1e-6)
    with pytest.raises(ConfigError, match="scores sequences"):
        loaded.generate([[4, 5]])
