"""What we write, read by transformers: no warnings, our logits and scores. Its own files: `test_transformers.py`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from pit_jax.core.types import Conditional, Params
from pit_jax.models.convert.hf_save import save_hf
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import ScalarModel

from ..convert.test_hf_save import CONFIGS, SPECIAL, model, random_params

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
LENGTHS = (12, 7, 3)
"""Longer than the windows, and than what rotary scaling takes for the length of pretraining."""

# transformers 5 calls every T5 tied and says so of each checkpoint that is not, its own among them.
UNTIED_T5 = "will NOT tie them"
SCALARS = ("llama", "mistral", "qwen3", "gemma3")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Collect what transformers logs from warnings on."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collector(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask), padded on the right; no text has the padding id."""
    random = np.random.default_rng(3)
    mask = np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]
    return np.where(mask, random.integers(4, 40, mask.shape), 0).astype(np.int32), mask


def _auto(config) -> type:
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def _load(auto: type, directory: Path) -> transformers.PreTrainedModel:
    loaded, info = auto.from_pretrained(directory, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


@functools.partial(jax.jit, static_argnums=0)
def _logits(lm: DecoderOnly | EncoderDecoder, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return (
        lm.logits(params, ids, mask, ids[:, ::-1]) if isinstance(lm, EncoderDecoder) else lm.logits(params, ids, mask)
    )


def our_logits(lm: DecoderOnly | EncoderDecoder, params: Params) -> np.ndarray:
    """Return our logits of `rows`; a decoder with an encoder reads them backwards."""
    return np.asarray(_logits(lm, params, *map(jnp.asarray, rows())))


def their_logits(theirs: transformers.PreTrainedModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return theirs."""
    more = {"decoder_input_ids": torch.from_numpy(ids[:, ::-1].copy())} if theirs.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(), **more)
    return out.logits.numpy()


def our_scores(network: ScalarModel, params: Params) -> np.ndarray:
    """Return our scores of `rows`, the first token taken as the prompt."""
    ids, mask = rows()
    x = Conditional(
        prompt=jnp.asarray(ids[:, :1]),
        prompt_segments=jnp.ones((len(ids), 1), jnp.int32),
        prompt_reference=jnp.zeros((len(ids), 1), bool),
        response=jnp.asarray(ids[:, 1:]),
        response_segments=jnp.asarray(mask[:, 1:], jnp.int32),
    )
    return np.asarray(jax.jit(network.scores, static_argnums=2)(params, x, 1)[:, 0])


def their_scores(theirs: transformers.PreTrainedModel) -> np.ndarray:
    """Return theirs."""
    return their_logits(theirs, *rows())[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_our_logits(tmp_path: Path, name: str, said: list[str]) -> None:
    lm = model(CONFIGS[name][1])
    params = random_params(lm.abstract())
    save_hf(tmp_path / "out", lm, params, special=SPECIAL, max_shard_size=6000)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    theirs = _load(_auto(config), tmp_path / "out")
    assert [type(theirs).__name__] == config.architectures
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == ([1, 3], 0, 2)
    assert [message for message in said if UNTIED_T5 not in message] == []
    ids, mask = rows()
    ours = our_logits(lm, params)
    kept = np.ones_like(mask) if config.is_encoder_decoder else mask
    assert np.std(ours[kept]) > 500 * TOLERANCE
    np.testing.assert_allclose(their_logits(theirs, ids, mask)[kept], ours[kept], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SCALARS)
def test_transformers_gives_our_scores(tmp_path: Path, name: str, said: list[str]) -> None:
    network = ScalarModel(model(CONFIGS[name][1]), readout="last", attention="causal")
    params = random_params(network.abstract())
    params |= {"head": params["head"] | {"bias": jnp.zeros(())}}
    save_hf(tmp_path / "out", network, params, special=SPECIAL)
    theirs = _load(transformers.AutoModelForSequenceClassification, tmp_path / "out")
    assert (said, theirs.config.num_labels) == ([], 1)
    scores = our_scores(network, params)
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(their_scores(theirs), scores, atol=TOLERANCE, rtol=0)
