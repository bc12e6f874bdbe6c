"""TRL's own trainers, without vLLM: SFTTrainer, and RLOOTrainer with a reward model.

    python -m benchmarks.peers.trl_peer --work sft --variant plain --shape nano --output DIR

Variants: plain (no gradient checkpointing), checkpointing (TRL's default).
Install, in an environment of its own: pip install torch==2.13.0 && pip install trl==1.16.0 datasets
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.peers import program, torch_llama
from benchmarks.peers.program import Phases
from benchmarks.peers.torch_llama import DEVICE
from benchmarks.speed.clock import Laps
from benchmarks.speed.record import Record
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def tokenizer(shape: Shape) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with a word for every id, so that text and ids go back and forth exactly and fast."""
    words = {word: number for number, word in enumerate(_SPECIAL)}
    words |= {f"t{number}": number for number in range(len(_SPECIAL), shape.vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", model_max_length=1 << 20,
    )  # fmt: skip


def _config(shape: Shape, **changes: Any) -> transformers.LlamaConfig:
    return torch_llama.config(shape, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)


class Clock(transformers.TrainerCallback):
    """Calls the clock from the first step's start on: from end to end, so loading of data counts."""

    def __init__(self, laps: Laps, phases: Phases) -> None:
        self._laps, self._phases = laps, phases

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock at the first step."""
        if not self._laps.seconds:
            self._laps.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the end of a step."""
        torch_llama.wait()
        self._phases.end_step()
        self._laps.lap()


def _arguments(shape: Shape, work: Work, variant: str, steps: int, directory: str) -> dict[str, Any]:
    return dict(
        output_dir=f"{directory}/out", max_steps=steps, report_to="none", save_strategy="no", logging_steps=10**6,
        disable_tqdm=True, lr_scheduler_type="constant", bf16=shape.compute == "bfloat16", optim="adamw_torch_fused",
        adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, dataloader_num_workers=0, seed=0,
        use_cpu=DEVICE.type == "cpu", per_device_train_batch_size=work.rows,
        gradient_checkpointing=variant == "checkpointing",
    )  # fmt: skip


def fine_tuning(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time SFTTrainer on rows whose every token but the first is a target."""
    total, phases = laps.warmup + steps, Phases()
    ids = torch.randint(len(_SPECIAL), shape.vocabulary, (work.rows * total, work.length)).tolist()
    model = torch_llama.model(transformers.LlamaForCausalLM, _config(shape), torch.float32)
    with tempfile.TemporaryDirectory() as directory:
        settings = trl.SFTConfig(
            **_arguments(shape, work, variant, total, directory), learning_rate=1e-5, max_length=None, packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = trl.SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=tokenizer(shape),
            callbacks=[Clock(laps, phases)],
        )  # fmt: skip
        trainer.train()
    return _record(laps, work, shape, variant, {})


def _timed(function: Callable[..., Any], phases: Phases, label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        with phases.of(label, torch_llama.wait):
            return function(*arguments, **named)

    return timed


def reinforcement(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time RLOOTrainer with a reward model and an anchor of the same size; no sample ends early."""
    total, phases = laps.warmup + steps, Phases()
    words = tokenizer(shape)
    prompts = torch.randint(len(_SPECIAL), shape.vocabulary, (work.rows // work.samples * total, work.prompt)).tolist()
    data = datasets.Dataset.from_dict({"prompt": [" ".join(f"t{number}" for number in row) + " " for row in prompts]})
    kinds = (transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification)
    judge = torch_llama.model(kinds[1], _config(shape, num_labels=1), torch_llama.DTYPES[shape.compute]).eval()
    judge.config._name_or_path = "reward"
    with tempfile.TemporaryDirectory() as directory:
        policy = torch_llama.model(kinds[0], _config(shape), torch.float32)
        policy.save_pretrained(f"{directory}/policy")
        words.save_pretrained(f"{directory}/policy")
        del policy  # The trainer reads policy and anchor from there.
        settings = trl.RLOOConfig(
            **_arguments(shape, work, variant, total, directory), learning_rate=1e-6, num_generations=work.samples,
            num_iterations=1, beta=0.05, temperature=1.0, top_p=1.0, top_k=0, max_completion_length=work.response,
            use_vllm=False, model_init_kwargs={"dtype": "float32"},
            generation_kwargs={"min_new_tokens": work.response},
        )  # fmt: skip
        trainer = trl.RLOOTrainer(
            model=f"{directory}/policy", reward_funcs=judge, args=settings, train_dataset=data, processing_class=words,
            reward_processing_classes=words, callbacks=[Clock(laps, phases)],
        )  # fmt: skip
        trainer._generate = _timed(trainer._generate, phases, "generate")
        both = _timed(trainer._generate_and_score_completions, phases, "score")
        trainer._generate_and_score_completions = both
        trainer.train()
    spent = phases.medians(laps.warmup)
    spent["score"] -= spent["generate"]  # The one is inside of the other.
    return _record(laps, work, shape, variant, spent)


def _record(laps: Laps, work: Work, shape: Shape, variant: str, phases: dict[str, float]) -> Record:
    packages = ("trl", "accelerate", "datasets")
    return torch_llama.record(packages, laps=laps, work=work, shape=shape, by="trl", variant=variant, phases=phases)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    program.main(__doc__, "trl", {"sft": fine_tuning, "rl": reinforcement})
