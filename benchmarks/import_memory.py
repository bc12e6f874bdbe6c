"""Host memory and time of importing a generated Hugging Face checkpoint, on whatever jax calls its default device.

    python benchmarks/import_memory.py [--gigabytes 2.1] [--shard_gigabytes 100] [--dtype float32] [--directory DIR]
                                       [--output DIR]

On a CPU the parameters themselves lie in host memory: what is to be small there is the peak beyond them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WIDTH, MLP, VOCABULARY = 2048, 8192, 32_000


def generate(directory: Path, gigabytes: float, shard_gigabytes: float, dtype: str) -> None:
    """Write a Llama of at least this size."""
    from etils import epath

    from pit_jax.io import safetensors_writer
    from pit_jax.models.convert.hf_config import config_from_hf
    from pit_jax.models.convert.hf_layout import tensors

    per_layer = (4 * WIDTH * WIDTH + 3 * WIDTH * MLP) * np.dtype(dtype).itemsize
    settings = {
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_attention_heads": 16,
        "num_hidden_layers": max(round((gigabytes * 1e9) / per_layer - 2 * VOCABULARY * WIDTH * 4 / per_layer) + 1, 1),
    }
    (directory / "config.json").write_text(json.dumps(settings))
    layout = tensors(config_from_hf(settings, (), where="config.json"), "llama")
    random = np.random.default_rng(0)
    noise = random.standard_normal(2**22, np.float32).astype(dtype)
    entries = [safetensors_writer.Entry(name=one.name, shape=one.shape, dtype=np.dtype(dtype)) for one in layout]
    plan = safetensors_writer.plan(entries, max_shard_size=int(shard_gigabytes * 1e9))

    def values() -> Iterator[np.ndarray]:
        for entry in plan.entries:
            yield np.resize(noise, entry.shape)

    safetensors_writer.write(epath.Path(directory), plan, values())


def resident(field: str) -> int:
    """Return memory of this process in bytes, of now (VmRSS) or at its peak (VmHWM); Linux only.

    `resource.getrusage` would count the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(directory: Path) -> dict[str, float]:
    """Import in this process and return what it took, in bytes and seconds."""
    import jax
    import jax.numpy as jnp

    from pit_jax.core.tree import size_in_bytes
    from pit_jax.models.convert.hf_load import load_hf

    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(8)))
    before = resident("VmRSS")
    start = time.perf_counter()
    _, params = load_hf(directory)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    return {
        "before": before,
        "grown": resident("VmHWM") - before,
        "parameters": size_in_bytes(params),
        "seconds": seconds,
    }


def main() -> None:
    """Generate, measure in a fresh process, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.1)
    parser.add_argument("--shard_gigabytes", type=float, default=100.0)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--directory", type=Path, default=None, help="where the checkpoint is written for the while")
    parser.add_argument("--output", type=Path, default=None, help="directory for import.json")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        generate(directory, arguments.gigabytes, arguments.shard_gigabytes, arguments.dtype)
        sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
        command = [sys.executable, __file__, "--measure", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    total, largest, grown = sum(sizes), max(sizes), found["grown"]
    print(f"checkpoint {total / 1e9:.2f} GB in {len(sizes)} files, the largest {largest / 1e9:.2f} GB")
    rate = total / found["seconds"] / 1e9
    print(f"parameters {found['parameters'] / 1e9:.2f} GB; imported in {found['seconds']:.1f} s, {rate:.2f} GB/s")
    print(f"resident memory before {found['before'] / 1e9:.2f} GB, at its peak {grown / 1e9:.2f} GB more:")
    print(f"  {grown / largest:.3f} x the largest file")
    beyond = grown - found["parameters"]
    print(
        f"  beyond the parameters (on a CPU in host memory): {beyond / 1e6:.0f} MB, {beyond / largest:.3f} x that file"
    )
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        written = found | {"checkpoint": total, "largest_file": largest, "gigabytes_per_second": rate}
        written["command"] = " ".join(["python", *sys.argv])
        (arguments.output / "import.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
