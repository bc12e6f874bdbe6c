"""How fast data are read: the SeqIO path against plain SeqIO, the cache against what a 1B model takes, and memory.

    python benchmarks/data_pipeline.py [--path PAIRS.jsonl] [--records 4000] [--words 100] [--tokenizer SPM.model]

Without `--path`, records of random words are made, with a tokenizer of their own. Three tables: records/s of reading
and tokenising the same preferences by this project's SeqIO task and by a plain `seqio.Task` (a function of records,
`seqio.preprocessors.tokenize`, `append_eos`); tokens/s of batches out of a cache (shuffled, templates applied,
collated, packed or not) against 10 times what a 1B model takes on one H200 at 55 % MFU; and the memory of this process
over many batches. The first needs SeqIO. `--json FILE` writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pit_jax.core.types import Comparisons
from pit_jax.data.collate import TrainingView, collator_for, take_batch
from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec, open_source, write_view_cache
from pit_jax.data.pack import Packing
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import SentencePieceTokenizer, SentencePieceTraining, train_sentencepiece

NEEDED = 10 * 0.55 * 126_500
"""Tokens a second: a 1B model takes 126,500 on one H200 at 100 % MFU."""
FOLDS = Folds(validation_fraction=0.0)
PIECES = 2000


def synthetic(path: Path, records: int, words: int, seed: int = 0) -> None:
    """Write preferences of random words, of Zipf's frequencies and random lengths."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(20_000)]

    def text(mean: int) -> str:
        ranks = np.minimum(random.zipf(1.2, max(int(random.exponential(mean)), 3)) - 1, len(vocabulary) - 1)
        return " ".join(vocabulary[rank] for rank in ranks)

    with path.open("w") as file:
        for number in range(records):
            record = {"prompt": text(words), "chosen": text(words // 2), "rejected": text(words // 2)}
            file.write(json.dumps(record | {"id": str(number), "group": str(number)}) + "\n")


def tokenizer_for(path: Path, model: str | None, output: str) -> SentencePieceTokenizer:
    """Return a given tokenizer, or one trained on the records."""
    if model is not None:
        return SentencePieceTokenizer(model)
    texts = (record[name] for record in read(path)[:2000] for name in ("prompt", "chosen"))
    return train_sentencepiece(texts, SentencePieceTraining(model_type="bpe", vocab_size=PIECES), output)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_task(path: Path, tokenizer: SentencePieceTokenizer, directory: Path) -> Callable[[], Iterator[Any]]:
    """Register the task that a user of SeqIO would write, and return what goes through it once."""
    import seqio
    import tensorflow as tf

    tokenizer.save(directory)
    vocabulary = seqio.SentencePieceVocabulary(str(next(directory.glob("*.model"))), extra_ids=0)
    names = ("prompt", "chosen", "rejected")

    def opened(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        def records() -> Iterator[dict[str, str]]:
            for line in path.open():
                record = json.loads(line)
                yield {name: record[name] for name in names}

        return tf.data.Dataset.from_generator(
            records, output_signature={n: tf.TensorSpec((), tf.string) for n in names}
        )

    seqio.TaskRegistry.add(
        "plain_pairs",
        source=seqio.FunctionDataSource(opened, splits=("train",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={name: seqio.Feature(vocabulary, add_eos=name != "prompt") for name in names},
    )
    return lambda: seqio.get_mixture_or_task("plain_pairs").get_dataset(
        None, split="train", shuffle=False, num_epochs=1
    ).as_numpy_iterator()  # fmt: skip


def our_task(path: Path, codec: Codec) -> Callable[[], Iterator[Any]]:
    """Register this project's tasks of the same file, and return what goes through its pairs once."""
    from pit_jax.data.seqio_live import examples_of_task
    from pit_jax.data.seqio_tasks import register_preference_tasks

    register_preference_tasks("our_pairs", str(path), codec=codec, folds=FOLDS)
    return lambda: examples_of_task("our_pairs_evaluate", "train", "evaluate")


def seqio_table(path: Path, codec: Codec, runs: int) -> dict[str, float]:
    """Return records/s of both tasks, the best of interleaved runs, and print them."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = codec.tokenizer
        assert isinstance(tokenizer, SentencePieceTokenizer)
        ways = {"plain seqio": plain_task(path, tokenizer, Path(directory)), "pit_jax": our_task(path, codec)}
        best = dict.fromkeys(ways, 0.0)
        for _ in range(runs):
            for name, opened in ways.items():
                begin = time.perf_counter()
                count = sum(1 for _ in opened())
                best[name] = max(best[name], count / (time.perf_counter() - begin))
    print(f"\nreading and tokenising {path.name}\n{'task':14} {'records/s':>10} {'ratio':>7}")
    for name, rate in best.items():
        print(f"{name:14} {rate:10.0f} {rate / best['plain seqio']:6.2f}x")
    return best


FORMS: dict[str, tuple[TrainingView, Packing | None]] = {
    "sft": ("sft_policy", None),
    "sft, packed": ("sft_policy", Packing(rows=16, inputs=2048, targets=2048, segments=32)),
    "gap reward": ("reward_gap", None),
    "gap reward, packed": ("reward_gap", Packing(rows=64, inputs=2048, targets=2048, segments=32)),
}


def cache_table(path: Path, codec: Codec, seconds: float) -> dict[str, float]:
    """Return tokens/s of batches that a cache gives, and print them against what is needed."""
    rates = {}
    print(f"\nbatches from the cache, one process\n{'batches':20} {'tokens/s':>12} {'of what is needed':>18}")
    with tempfile.TemporaryDirectory() as directory:
        for view in sorted({view for view, _ in FORMS.values()}):
            write_view_cache(DataSpec(path=str(path), folds=FOLDS), directory, view=view, split="train", codec=codec)
        for name, (view, packing) in FORMS.items():
            source = open_source(DataSpec(cache=directory), view=view, split="train", codec=codec, seed=0)
            size = 64 if packing is None else packing.rows * packing.segments
            collator = collator_for(view, codec, batch_size=size, micro_batches=1, packing=packing)
            take_batch(source, collator)
            tokens, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                tokens += count_tokens(take_batch(source, collator))
            rates[name] = tokens / (time.perf_counter() - begin)
            print(f"{name:20} {rates[name]:12,.0f} {rates[name] / NEEDED:17.2f}x", flush=True)
    return rates


def count_tokens(batch: Any) -> int:
    """Return the tokens of a batch."""
    inputs = batch.inputs if isinstance(batch, Comparisons) else batch
    return int((inputs.prompt_segments > 0).sum() + (inputs.response_segments > 0).sum())


def memory_table(path: Path, codec: Codec, batches: int) -> dict[str, float]:
    """Return the resident MiB of this process after a tenth of so many batches and after all, and print them."""
    with tempfile.TemporaryDirectory() as directory:
        write_view_cache(
            DataSpec(path=str(path), folds=FOLDS), directory, view="reward_gap", split="train", codec=codec
        )
        spec = DataSpec(cache=directory, window=1000)
        source = open_source(spec, view="reward_gap", split="train", codec=codec, seed=0)
        collator = collator_for("reward_gap", codec, batch_size=16, micro_batches=1, packing=None)
        found = {}
        for number in range(1, batches + 1):
            take_batch(source, collator)
            if number in (batches // 10, batches):
                found[f"after {number} batches"] = resident() / 2**20
    print("\nmemory of this process")
    for name, mebibytes in found.items():
        print(f"{name:24} {mebibytes:8.1f} MiB")
    return found


def resident() -> int:
    """Return the resident bytes of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="JSON Lines of preferences")
    parser.add_argument("--tokenizer", help="a SentencePiece model; by default one is trained on the records")
    parser.add_argument("--records", type=int, default=4000, help="synthetic records")
    parser.add_argument("--words", type=int, default=100, help="mean words of a synthetic prompt")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each form of batch")
    parser.add_argument("--batches", type=int, default=3000, help="of the memory table")
    parser.add_argument("--runs", type=int, default=3, help="of the SeqIO table")
    parser.add_argument("--tables", nargs="+", default=["seqio", "cache", "memory"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(args.path or f"{directory}/pairs.jsonl")
        if args.path is None:
            synthetic(path, args.records, args.words)
        tokenizer = tokenizer_for(path, args.tokenizer, f"{directory}/tokenizer")
        codec = Codec(tokenizer, Templates(), Lengths(inputs=1024, targets=512))
        about = f"{os.cpu_count()} cores, {len(read(path))} records, vocabulary {tokenizer.vocab_size}"
        print(f"{platform.machine()}, {about}")
        tables: dict[str, Callable[[], dict[str, float]]] = {
            "seqio": lambda: seqio_table(path, codec, args.runs),
            "cache": lambda: cache_table(path, codec, args.seconds),
            "memory": lambda: memory_table(path, codec, args.batches),
        }
        figures = {name: tables[name]() for name in args.tables}
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
