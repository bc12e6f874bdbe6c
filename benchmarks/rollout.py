"""Tokens a second of sampling a fixed number of tokens for every prompt, at temperature 1.

python -m benchmarks.rollout [--shape nano] [--steps 5] [--set scan_layers=True] [--output DIR]
"""

from __future__ import annotations

from benchmarks.speed.ours import main

if __name__ == "__main__":
    main("rollout", __doc__)
