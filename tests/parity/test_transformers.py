"""Models drawn and saved by transformers, read by `load_pretrained`: the same logits, scores, greedy answers and files.

The rows are longer than the windows, and than the lengths that rotary scaling starts from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import pit_jax
from pit_jax.core.types import Conditional
from pit_jax.models.convert.hf_save import save_hf
from pit_jax.models.heads import ScalarModel
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages.pretrained import Pretrained

from . import record, record_t5gemma

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
HALF_TOLERANCE = 0.1
"""Of bfloat16, as a part of the standard deviation of the logits; a smoke test, since both round as they go."""

WHOLE, CUT = 5_000_000, 5_000
"""Bytes of a file: all tensors, or a few."""

NEW, TEXT = 64, 58
"""Greedy tokens; ids below which a token is text in every one of the models."""
LENGTHS = (40, 23, 9)
RESPONSES = (25, 11, 17)
PROMPTS = (19, 11, 5)

SEEDS = {
    "llama": 4,
    "llama_linear": 0,
    "llama3": 1,
    "llama_yarn": 0,
    "mistral": 1,
    "qwen2": 9,
    "qwen2_plain": 0,
    "qwen3": 0,
    "qwen3_windows": 0,
    "gemma": 12,
    "gemma2": 16,
    "gemma3_text": 5,
    "t5": 63,
    "t5_1_1": 6,
    "mt5": 6,
    "umt5": 41,
    "t5gemma": 55,
    "t5gemma2": 101,
}
"""Of the weights: greedy answers are then more than repetition, and no two tokens come close."""
FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    **{name: functools.partial(record.build, name, SEEDS[name]) for name in record.FAMILIES},
    "t5gemma": functools.partial(record_t5gemma.build, "t5gemma", SEEDS["t5gemma"]),
    "t5gemma2": lambda: _without_pictures(record_t5gemma.build("t5gemma2", SEEDS["t5gemma2"])),
}
ENCODES = ("t5", "t5_1_1", "mt5", "umt5", "t5gemma", "t5gemma2")
DECODER_ONLY = tuple(name for name in FAMILIES if name not in ENCODES)
Note = Callable[[str, object], None]


def _without_pictures(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return a model to which ids that stand for pictures, which we do not read, are never the likeliest."""
    with torch.no_grad():
        model.get_input_embeddings().weight[TEXT:] = 0
    return model


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers, the directory it was saved in, and what we read there."""

    theirs: transformers.PreTrainedModel
    directory: Path
    ours: Pretrained

    @property
    def start(self) -> int | None:
        """The token an encoder-decoder's decoder starts from."""
        return self.ours.model.config.start_id if self.theirs.config.is_encoder_decoder else None


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = FAMILIES[request.param]()
    directory = tmp_path_factory.mktemp(request.param)
    # None of the random tokens ends a text.
    for settings in (theirs.config, theirs.generation_config):
        settings.eos_token_id = None
    theirs.save_pretrained(directory)
    return Pair(theirs, directory, pit_jax.load_pretrained(directory))


EVERY = pytest.mark.parametrize("pair", FAMILIES, indirect=True)


def _rows(lengths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, TEXT, length, dtype=np.int32) for length in lengths]


def _padded(rows: list[np.ndarray], *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask)."""
    width = max(map(len, rows))
    mask = np.arange(width)[None, :] < np.array([len(row) for row in rows])[:, None]
    mask = mask[:, ::-1].copy() if left else mask
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def _decoded(pair: Pair, responses: list[np.ndarray]) -> np.ndarray | None:
    """Return what the decoder of an encoder-decoder reads."""
    if pair.start is None:
        return None
    return _padded([np.concatenate([[pair.start], row[:-1]]).astype(np.int32) for row in responses])[0]


def _theirs(
    model: transformers.PreTrainedModel, ids: np.ndarray, mask: np.ndarray, decoded: np.ndarray | None
) -> np.ndarray:
    """Return the logits of transformers, in float32."""
    more = {} if decoded is None else {"decoder_input_ids": torch.from_numpy(decoded).long()}
    if model.config.model_type.startswith("t5gemma"):
        more["decoder_attention_mask"] = torch.ones(more["decoder_input_ids"].shape, dtype=torch.long)
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), **more)
    return out.logits.float().numpy()


def _both_sides(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask) of the rows padded on the right, and after those on the left."""
    sides = [_padded(rows, left=left) for left in (False, True)]
    return np.vstack([ids for ids, _ in sides]), np.vstack([mask for _, mask in sides])


def _compare(ours: Pretrained, theirs: transformers.PreTrainedModel, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return (absolute differences, theirs) of the logits that are somebody's, [2, N, V]: right, then left padding."""
    ids, mask = _both_sides(_rows(LENGTHS, 1))
    decoded = _decoded(pair, _rows(RESPONSES, 2))
    decoded = None if decoded is None else np.vstack([decoded] * 2)
    expected = _theirs(theirs, ids, mask, decoded)
    found = np.asarray(ours.logits(ids, mask, decoded))
    assert found.dtype == np.float32
    kept = mask if decoded is None else np.ones(decoded.shape, bool)
    half = kept[: len(LENGTHS)].sum()
    shape = (2, half, expected.shape[-1])
    return np.abs(found - expected)[kept].reshape(shape), expected[kept].reshape(shape)


@EVERY
def test_logits(pair: Pair, record_property: Note) -> None:
    apart, expected = _compare(pair.ours, pair.theirs, pair)
    assert np.std(expected) > 0.3
    for side, name in zip(apart, ("right", "left"), strict=True):
        record_property(name, f"{side.max():.1e}")
        assert side.max() <= TOLERANCE, name


@EVERY
def test_log_probabilities(pair: Pair) -> None:
    prompts, responses = _rows(PROMPTS, 3), _rows(RESPONSES, 4)
    (prompt, seen), (response, trained) = _padded(prompts), _padded(responses)
    x = Conditional(
        prompt=jnp.asarray(prompt),
        prompt_segments=jnp.asarray(seen, jnp.int32),
        prompt_reference=jnp.zeros(prompt.shape, bool),
        response=jnp.asarray(response),
        response_segments=jnp.asarray(trained, jnp.int32),
    )
    logp = jax.jit(pair.ours.model.logprobs)(pair.ours.params, x).logp
    decoded = _decoded(pair, responses)
    # A decoder without an encoder predicts a token from the column before it.
    read = _padded([np.concatenate(row) for row in zip(prompts, responses, strict=True)]) if decoded is None else None
    logits = _theirs(pair.theirs, *(read or (prompt, seen)), decoded)
    for row, answer in enumerate(responses):
        first = 0 if read is None else len(prompts[row]) - 1
        predicting = torch.from_numpy(logits[row, first : first + len(answer)])
        expected = torch.log_softmax(predicting, -1).numpy()[np.arange(len(answer)), answer]
        np.testing.assert_allclose(logp[row, : len(answer)], expected, atol=TOLERANCE, rtol=0)


def _greedy(pair: Pair, prompts: list[np.ndarray], eos: list[int] | None) -> list[list[int]]:
    """Return the continuations of transformers, each up to its end of text."""
    ids, mask = _padded(prompts, left=True)
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=eos)
    settings.decoder_start_token_id = pair.start
    out = pair.theirs.generate(
        torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), generation_config=settings
    ).numpy()
    found = []
    for row in out[:, ids.shape[1] if pair.start is None else 1 :].tolist():
        ends = [n + 1 for n, token in enumerate(row) if token in (eos or ())]
        found.append(row[: min(ends, default=NEW)])
    return found


@EVERY
def test_greedy_continuations(pair: Pair, record_property: Note) -> None:
    prompts = _rows(PROMPTS, 6)
    theirs = _greedy(pair, prompts, None)
    assert [len(row) for row in theirs] == [NEW] * len(prompts)
    assert len(np.unique(theirs)) > 5
    assert pair.ours.eos_ids == ()
    assert pair.ours.generate(prompts, max_new_tokens=NEW) == theirs
    record_property(f"{NEW} greedy tokens", "equal")


@pytest.mark.parametrize("pair", ["llama3", "gemma3_text", "t5_1_1", "t5gemma"], indirect=True)
def test_any_of_several_ids_ends_an_answer(pair: Pair, tmp_path: Path) -> None:
    prompts = _rows(PROMPTS, 6)
    free = _greedy(pair, prompts, None)
    eos = [free[0][9], free[1][20]]
    for file in pair.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    ours = pit_jax.load_pretrained(tmp_path)
    assert ours.eos_ids == tuple(eos)
    found = ours.generate(prompts, max_new_tokens=NEW)
    assert found == _greedy(pair, prompts, eos)
    assert len({row[-1] for row in found} & set(eos)) > 0 and min(map(len, found)) < NEW


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_scores_of_classifiers(name: str, tmp_path: Path, record_property: Note) -> None:
    theirs = record.build(name, SEEDS[name], classifier=True)
    theirs.save_pretrained(tmp_path)
    ours = pit_jax.load_pretrained(tmp_path)
    assert isinstance(ours.model, ScalarModel)
    ids, mask = _both_sides(_rows(LENGTHS, 1))
    expected = _theirs(theirs, ids, mask, None)
    assert expected.shape == (6, 1)
    assert np.std(expected) > 500 * TOLERANCE
    apart = np.abs(np.asarray(ours.logits(ids, mask)) - expected).max()
    record_property("scores", f"{apart:.1e}")
    assert apart <= TOLERANCE


@EVERY
def test_half_precision_is_read_exactly(pair: Pair, tmp_path: Path, record_property: Note) -> None:
    for dtype in ("bfloat16", "float16"):
        theirs = _reread(pair, pair.directory, dtype)
        theirs.save_pretrained(tmp_path / dtype)
        ours = pit_jax.load_pretrained(tmp_path / dtype, dtype="float32")
        apart = _compare(ours, _reread(pair, tmp_path / dtype, "float32"), pair)[0].max()
        record_property(dtype, f"{apart:.1e}")
        assert apart <= TOLERANCE


def _reread(pair: Pair, directory: Path, dtype: str) -> transformers.PreTrainedModel:
    return type(pair.theirs).from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("pair", ["llama3", "gemma2", "qwen3", "t5_1_1"], indirect=True)
def test_activations_in_half_precision(pair: Pair, tmp_path: Path) -> None:
    theirs = _reread(pair, pair.directory, "bfloat16")
    theirs.save_pretrained(tmp_path)
    ours = pit_jax.load_pretrained(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.params)} == {"bfloat16"}
    apart, expected = _compare(ours, theirs, pair)
    assert 0 < np.sqrt(np.mean(apart**2)) < HALF_TOLERANCE * np.std(expected)


@pytest.mark.parametrize("pair", ["llama3", "gemma3_text", "qwen3", "t5_1_1", "t5gemma2"], indirect=True)
def test_logits_from_four_devices(pair: Pair, record_property: Note) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    ours = pit_jax.load_pretrained(pair.directory, mesh=mesh)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(ours.params))
    apart = _compare(ours, pair.theirs, pair)[0].max()
    record_property("on four devices", f"{apart:.1e}")
    assert apart <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "t5gemma2"])
def test_files_come_back_bitwise(name: str, tmp_path: Path, record_property: Note) -> None:
    four = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    cases = {
        "float32": ((WHOLE, None), (WHOLE, four), (CUT, None), (CUT, four)),
        "bfloat16": ((WHOLE, four), (CUT, None)),
        "float16": ((CUT, four),),
    }
    for dtype, ways in cases.items():
        # Made anew: transformers 5 cuts a model that it has read before into files in another order.
        theirs = FAMILIES[name]().to(getattr(torch, dtype))
        for number, (limit, mesh) in enumerate(ways):
            saved, back = (tmp_path / f"{dtype}-{number}-{place}" for place in ("saved", "back"))
            theirs.save_pretrained(saved, max_shard_size=limit)
            own = json.loads((saved / "config.json").read_text())
            network, params, _ = pit_jax.load_pretrained(saved, mesh=mesh)
            save_hf(back, network, params, source_config=own, max_shard_size=limit, dtype=own["dtype"])
            assert (_same_files(saved, back) > 1) == (limit == CUT)
    record_property("files", "bitwise")


def _same_files(saved: Path, back: Path) -> int:
    """Check that two directories hold the same; return how many files have weights."""
    names = {path.name for path in saved.iterdir()}
    assert names == {path.name for path in back.iterdir()}
    for name in names - {"config.json", "generation_config.json"}:
        assert (saved / name).read_bytes() == (back / name).read_bytes(), name
    left, right = (json.loads((place / "config.json").read_text()) for place in (saved, back))
    assert left == right
    left, right = (json.loads((place / "generation_config.json").read_text()) for place in (saved, back))
    for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert left.get(role) == right.get(role)
    return sum(name.endswith(".safetensors") for name in names)
