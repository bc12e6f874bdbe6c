"""What this machine reaches in products of matrices and in copies: what all other figures are compared with.

    python -m benchmarks.ceilings [--shape nano] [--output DIR]

The shape says in which dtype products are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from benchmarks.speed import ceilings, record
from benchmarks.speed.shapes import SHAPES


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="nano")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    shape, device = SHAPES[arguments.shape], jax.devices()[0].device_kind
    found = ceilings.measure(shape)
    facts = {"device": device, "dtype": shape.compute, "command": record.command(), "machine": record.machine()}
    record.save(arguments.output, "ceilings", found._asdict() | facts)
    stated = "-" if found.peak is None else f"{found.peak / 1e12:,.0f} TFLOP/s"
    heads = ("device", "dtype", "products", "stated peak", "copies, read and written")
    cells = (device, shape.compute, f"{found.matmul / 1e12:,.3f} TFLOP/s", stated, f"{found.copy / 1e9:,.1f} GB/s")
    print(record.table(heads, [cells]))


if __name__ == "__main__":
    main()
