"""Plain transformers and torch: a loop that one writes by hand, with `generate()` for samples.

    python -m benchmarks.peers.transformers_peer --work sft --variant sdpa --shape nano --output DIR

Variants: sft and rl: sdpa, eager (forms of attention), compile (torch.compile, sdpa); rollout: dynamic, static
(cache, with torch.compile).
Install: pip install torch transformers
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import statistics
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks.peers import program, torch_llama
from benchmarks.peers.program import Phases
from benchmarks.peers.torch_llama import DEVICE, DTYPES
from benchmarks.speed.clock import Laps
from benchmarks.speed.record import Record
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work

_FIRST = 4
"""Ids below are special elsewhere, and are no part of random text."""


def _config(shape: Shape, **changes: Any) -> transformers.LlamaConfig:
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return torch_llama.config(shape, **(none | changes))


def _policy(shape: Shape, variant: str, dtype: torch.dtype) -> Any:
    attention = "eager" if variant == "eager" else "sdpa"
    return torch_llama.model(transformers.LlamaForCausalLM, _config(shape), dtype, attention)


def _optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def _update(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _computing(shape: Shape) -> Any:
    """Return the context of training: parameters are float32, products what the shape says."""
    return torch.autocast(DEVICE.type, DTYPES[shape.compute], enabled=shape.compute != "float32")


def _random_ids(shape: Shape, rows: int, length: int) -> torch.Tensor:
    return torch.randint(_FIRST, shape.vocabulary, (rows, length), device=DEVICE)


def fine_tuning(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time updates on rows whose every token but the first is a target."""
    model = _policy(shape, variant, torch.float32).train()
    optimizer = _optimizer(model, 1e-5)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    compiled = torch.compile(loss_of) if variant == "compile" else loss_of

    def step() -> None:
        ids = _random_ids(shape, work.rows, work.length)
        with _computing(shape):
            loss = compiled(ids)
        loss.backward()
        loss.item()
        _update(optimizer, model)
        torch_llama.wait()

    laps.repeat(step, steps)
    return _record(laps, work, shape, variant, {})


def _generation(work: Work, variant: str) -> dict[str, Any]:
    found = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, max_new_tokens=work.response)
    if variant == "static":
        compiling = transformers.generation.CompileConfig(mode="default")  # type: ignore[attr-defined]
        compiling._compile_all_devices = True  # type: ignore[attr-defined]
        found |= dict(cache_implementation="static", compile_config=compiling)
    return found


def _generated(model: Any, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def _ended(model: Any, ids: torch.Tensor, work: Work, settings: dict[str, Any]) -> int:
    """Return how many tokens were made, ends included; a call goes on until the last of its rows has ended."""
    found = _generated(model, ids, settings)[:, work.prompt :]
    ends = torch.isin(found, torch.tensor(settings["eos_token_id"], device=DEVICE))
    # A row's tokens are those before which none was an end.
    return int((ends.cumsum(1) - ends.long() == 0).sum())


def _sample(model: Any, ids: torch.Tensor, work: Work, settings: dict[str, Any]) -> torch.Tensor:
    found = _generated(model, ids, settings)
    if found.shape != (len(ids), work.length):
        raise SystemExit(f"generate() must return {(len(ids), work.length)} and returned {tuple(found.shape)}")
    return found


def rollout(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time `generate()`, a batch at a time; a prompt is given once for each of its samples, as it has no other way."""
    model, settings = _policy(shape, variant, DTYPES[shape.compute]).eval(), _generation(work, variant)
    if work.mean_length:
        settings |= dict(eos_token_id=list(work.ends(shape.vocabulary)), pad_token_id=0)
    made = []

    def answer(ids: torch.Tensor) -> int:
        if work.mean_length:
            return _ended(model, ids, work, settings)
        return _sample(model, ids, work, settings)[:, work.prompt :].numel()

    def step() -> None:
        ids = _random_ids(shape, work.rows // work.samples, work.prompt).repeat_interleave(work.samples, 0)
        made.append(sum(map(answer, ids.split(work.batch))))
        torch_llama.wait()

    laps.repeat(step, steps)
    return _record(laps, work, shape, variant, {}, tokens=statistics.mean(made[laps.warmup :]))


def _log_likelihood(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return log p of every response token, `[B, T]`, with logits of the response alone."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
    logits = model.lm_head(states).float()
    return -F.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten(), reduction="none").view(len(ids), -1)


def reinforcement(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time steps of REINFORCE with a leave-one-out baseline, a reward model and an anchor of the same size."""
    policy, phases = _policy(shape, variant, torch.float32), Phases()
    anchor = _policy(shape, variant, DTYPES[shape.compute]).eval().requires_grad_(False)
    config = _config(shape, num_labels=1, pad_token_id=0)
    judge = torch_llama.model(transformers.LlamaForSequenceClassification, config, DTYPES[shape.compute])
    judge = judge.eval().requires_grad_(False)
    optimizer, settings = _optimizer(policy, 1e-6), _generation(work, "dynamic")
    weigh = torch.compile(_log_likelihood) if variant == "compile" else _log_likelihood

    def step() -> None:
        ids = _random_ids(shape, work.rows // work.samples, work.prompt).repeat_interleave(work.samples, 0)
        with torch.no_grad(), _computing(shape):
            with phases.of("generate", torch_llama.wait):
                sampled = _sample(policy.eval(), ids, work, settings).clone()
            with phases.of("score", torch_llama.wait):
                reward = judge(input_ids=sampled, use_cache=False).logits[:, 0].float()
                anchored = weigh(anchor, sampled, work.prompt)
        with phases.of("update", torch_llama.wait):
            grouped = reward.view(-1, work.samples)
            others = (grouped.sum(1, keepdim=True) - grouped) / (work.samples - 1)
            with _computing(shape):
                logp = weigh(policy.train(), sampled, work.prompt)
            advantage = (grouped - others).reshape(-1, 1) - 0.05 * (logp.detach() - anchored)
            (-(advantage * logp).sum() / logp.numel()).backward()
            _update(optimizer, policy)
        phases.end_step()

    laps.repeat(step, steps)
    return _record(laps, work, shape, variant, phases.medians(laps.warmup))


def _record(laps: Laps, work: Work, shape: Shape, variant: str, phases: dict[str, float], **extra: float) -> Record:
    return torch_llama.record(
        (), laps=laps, work=work, shape=shape, by="transformers", variant=variant, phases=phases, extra=extra
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    works = {"sft": fine_tuning, "rollout": rollout, "ending": rollout, "rl": reinforcement}
    program.main(__doc__, "transformers", works)
