"""How speed grows: fine-tuning at a fixed number of tokens over ever more rows, and RL steps with ever longer samples.

    python -m benchmarks.growth [--shape nano] [--tokens 4096] [--rows 8 16 32 64] [--responses 16 32 64 128]
                                [--steps 5] [--output DIR]

Every measurement is a process of its own. The seconds of processors that a step took, and how many processors others
kept busy meanwhile, say what the times are worth on a machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import record
from benchmarks.speed.record import Record, from_json
from benchmarks.speed.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure all sizes, and print how far each is from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="nano")
    parser.add_argument("--tokens", type=int, default=4096, help="of every fine-tuning step")
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--responses", type=int, nargs="*", default=[16, 32, 64, 128], help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    common = [f"--shape={arguments.shape}", f"--steps={arguments.steps}", "--no_ceilings"]
    tuned = [
        measured("sft_step", *common, f"--rows={rows}", "--prompt=1", f"--response={arguments.tokens // rows - 1}")
        for rows in arguments.rows
    ]
    trained = [measured("rl_step", *common, f"--response={response}") for response in arguments.responses]
    written = {"sft": [one.to_json() for one in tuned], "rl": [one.to_json() for one in trained]}
    record.save(arguments.output, "growth", written | {"command": record.command()})
    print(tuning_table(tuned), sampling_table(trained), f"command: {record.command()}", sep="\n\n")


def measured(module: str, *arguments: str) -> Record:
    """Run a benchmark and return what it measured."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--output={output}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return from_json(json.loads(next(Path(output).glob("*.json")).read_text()))


def tuning_table(found: list[Record]) -> str:
    """Return tokens a second and seconds of processors by rows, and their ratios to the first."""
    heads = ("rows", "tokens a row", "tokens/s", "to the first", "processor s", "to the first", "others busy")
    rows = [
        (str(one.work.rows), str(one.work.length), f"{one.tokens_per_second:,.0f}",
         f"{one.tokens_per_second / found[0].tokens_per_second:.3f}", f"{one.processor:.3f}",
         f"{one.processor / found[0].processor:.3f}", f"{one.disturbance:.1f}")
        for one in found
    ]  # fmt: skip
    return record.table(heads, rows)


def sampling_table(found: list[Record]) -> str:
    """Return seconds of an RL step by generated tokens, and what each token more than in the row above takes."""
    heads = ("sample", "generated", "s/step", "ms a token more", "processor s", "ms a token more", "others busy")
    rows = []
    for before, one in zip([found[0], *found], found, strict=False):
        more = generated(one) - generated(before)
        wall, processors = one.median - before.median, one.processor - before.processor
        each = [f"{1e3 * seconds / more:.3f}" if more else "" for seconds in (wall, processors)]
        rows.append((
            str(one.work.response), str(generated(one)), f"{one.median:.3f}", each[0], f"{one.processor:.3f}", each[1],
            f"{one.disturbance:.1f}",
        ))  # fmt: skip
    return record.table(heads, rows)


def generated(one: Record) -> int:
    """Return the tokens that a step generates."""
    return one.work.rows * one.work.response


if __name__ == "__main__":
    main()
