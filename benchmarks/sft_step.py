"""Seconds, tokens a second and memory of a fine-tuning step: rows of one prompt token, and targets.

python -m benchmarks.sft_step [--shape nano] [--steps 5] [--set scan_layers=True] [--output DIR]
"""

from __future__ import annotations

from benchmarks.speed.ours import main

if __name__ == "__main__":
    main("sft", __doc__)
