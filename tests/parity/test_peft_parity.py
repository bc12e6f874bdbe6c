"""Adapters between PEFT and us, both ways, on a base that we exported: the same logits and scores, the same files."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from pit_jax.core.types import Params
from pit_jax.models import lora
from pit_jax.models.config import ModelConfig
from pit_jax.models.convert.hf_save import save_hf
from pit_jax.models.convert.peft import load_peft, save_peft
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import ScalarModel
from pit_jax.models.lora import Lora

from ..convert.test_hf_save import CONFIGS, SPECIAL, model, random_params, spread
from .test_hf_export import TOLERANCE, our_logits, our_scores, rows, their_logits, their_scores

pytestmark = [
    pytest.mark.parity,
    # PEFT 0.21 reads what transformers 5.23 calls otherwise, and says so where it saves an output matrix.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning"),
]

NAMES = pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "t5_1_1", "umt5"])
ENCODES = ("t5_1_1", "umt5")
EVERY_LAYER = tuple(target for target in lora.TARGETS if target != "head")
LORAS = {
    "llama": Lora(rank=3, alpha=6.0, targets=lora.TARGETS),
    "qwen2": Lora(rank=2, alpha=1.5, targets=("query", "out", "down"), rslora=True),
    "gemma3": Lora(rank=2, alpha=3.0, targets=EVERY_LAYER),
    "t5_1_1": Lora(rank=3, alpha=6.0, targets=("query", "value", "gate", "down")),
    "umt5": Lora(rank=2, alpha=3.0, targets=EVERY_LAYER),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "o_proj", "down_proj"],
    "gemma3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "t5_1_1": ["q", "v", "wi_0", "wo"],
    "umt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}


def _adapted(name: str) -> tuple[ModelConfig, Params]:
    """Return the config with adapters, and all parameters at random."""
    config = dataclasses.replace(CONFIGS[name][1], lora=LORAS[name])
    return config, random_params(model(config).abstract())


@functools.cache
def _base(name: str, directory: Path) -> Params:
    """Write the base of `_adapted` and return its parameters."""
    config, params = _adapted(name)
    bare = dataclasses.replace(config, lora=None)
    base = lora.split(params)[0]
    if config.adapts("head"):
        base = base | {"head": base["head"]["kernel"]}
    save_hf(directory, model(bare), base, special=SPECIAL)
    return base


def _with_adapters(
    name: str, base: Params, found: Lora, adapters: Params
) -> tuple[DecoderOnly | EncoderDecoder, Params]:
    """Return a model with adapters and its parameters."""
    lm = model(dataclasses.replace(CONFIGS[name][1], lora=found))
    if "head" in adapters:
        base = base | {"head": {"kernel": base["head"]}}
    return lm, lora.join(base, jax.tree.map(jnp.asarray, adapters))


def _their_base(directory: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(directory)
    encodes = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
    return auto.from_pretrained(directory, attn_implementation="eager")


@NAMES
def test_peft_loads_ours(tmp_path: Path, name: str) -> None:
    config, params = _adapted(name)
    _base(name, tmp_path / "base")
    save_peft(tmp_path / "ours", params, config, family=CONFIGS[name][0], base_name=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(_their_base(tmp_path / "base"), tmp_path / "ours").eval()
    found = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    written = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == written.keys()
    ids, mask = rows()
    kept = np.ones_like(mask) if name in ENCODES else mask
    ours = our_logits(model(config), params)[kept]
    np.testing.assert_allclose(their_logits(theirs, ids, mask)[kept], ours, atol=TOLERANCE, rtol=0)
    save_hf(tmp_path / "merged", model(config), params, special=SPECIAL)
    merged = their_logits(_their_base(tmp_path / "merged").eval(), ids, mask)[kept]
    np.testing.assert_allclose(merged, ours, atol=TOLERANCE, rtol=0)
    assert np.abs(their_logits(_their_base(tmp_path / "base").eval(), ids, mask)[kept] - ours).max() > 0.1


@NAMES
def test_we_load_pefts(tmp_path: Path, name: str) -> None:
    base = _base(name, tmp_path / "base")
    settings = LORAS[name]
    task = "SEQ_2_SEQ_LM" if name in ENCODES else "CAUSAL_LM"
    asked = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=TARGETS[name],
        use_rslora=settings.rslora,
        task_type=task,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(_their_base(tmp_path / "base"), asked).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    found, adapters, head = load_peft(tmp_path / "theirs", CONFIGS[name][1])
    assert (found, head) == (settings, None)
    lm, params = _with_adapters(name, base, found, adapters)
    ids, mask = rows()
    kept = np.ones_like(mask) if name in ENCODES else mask
    expected = their_logits(theirs, ids, mask)[kept]
    np.testing.assert_allclose(our_logits(lm, params)[kept], expected, atol=TOLERANCE, rtol=0)
    file = "adapter_model.safetensors"
    for place, placed in (("back", params), ("from_four_devices", spread(params))):
        save_peft(tmp_path / place, placed, lm.config, family=CONFIGS[name][0], base_name=str(tmp_path / "base"))
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "from_four_devices" / file).read_bytes()
    if not lm.config.adapts("head"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    ours, back = (safetensors.numpy.load_file(tmp_path / place / file) for place in ("theirs", "back"))
    # With an adapter on the output matrix PEFT saves that matrix too, as it was.
    assert ours.keys() - back.keys() <= {"base_model.model.lm_head.base_layer.weight"}
    for tensor, array in back.items():
        assert array.tobytes() == ours[tensor].tobytes()
    ours, back = (json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("theirs", "back"))
    differ = {field for field in back if back[field] != ours[field]}
    assert differ <= {"target_modules", "init_lora_weights"}
    assert set(back["target_modules"]) == set(ours["target_modules"])


def test_scores_with_adapters(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["llama"][1], lora=Lora(rank=2, alpha=3.0, targets=("query", "up")))
    network = ScalarModel(model(config), readout="last", attention="causal")
    params = random_params(network.abstract())
    params |= {"head": params["head"] | {"bias": jnp.zeros(())}}
    bare = dataclasses.replace(network, lm=model(dataclasses.replace(config, lora=None)))
    trunk = lora.split(params["trunk"])[0]
    other = jax.tree.map(jnp.zeros_like, params["head"])
    base = str(tmp_path / "base")
    save_hf(base, bare, {"trunk": trunk, "head": other}, special=SPECIAL)
    save_peft(tmp_path / "ours", params["trunk"], config, family="llama", base_name=base, head=params["head"]["kernel"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", attn_implementation="eager", num_labels=1
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    ours = our_scores(network, params)
    np.testing.assert_allclose(their_scores(theirs), ours, atol=TOLERANCE, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_peft(tmp_path / "theirs", dataclasses.replace(config, lora=None))
    assert found.lora == config.lora
    np.testing.assert_array_equal(found.head, params["head"]["kernel"])
    with torch.no_grad():
        merged = theirs.merge_and_unload()
    save_hf(tmp_path / "merged", network, params, special=SPECIAL)
    name = "model.layers.1.self_attn.q_proj.weight"
    weights = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(weights[name], merged.state_dict()[name].numpy(), rtol=1e-5, atol=1e-6)
