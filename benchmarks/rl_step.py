"""A whole step of reinforcement learning: sampling, reward model, anchor, update.

python -m benchmarks.rl_step [--shape nano] [--steps 5] [--set scan_layers=True] [--output DIR]
"""

from __future__ import annotations

from benchmarks.speed.ours import main

if __name__ == "__main__":
    main("rl", __doc__)
