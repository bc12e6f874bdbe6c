"""Seconds, tokens a second and memory of a step of the gap reward: four passes of each record.

python -m benchmarks.gap_step [--shape nano] [--steps 5] [--set scan_layers=True] [--output DIR]
"""

from __future__ import annotations

from benchmarks.speed.ours import main

if __name__ == "__main__":
    main("gap", __doc__)
