"""Tokens a second of sampling answers that end early, of more prompts than a batch has rows.

python -m benchmarks.rollout_ending [--shape nano] [--steps 5] [--stage portions=4] [--output DIR]

So many tokens count as an end that answers have about `--mean_length` tokens and at most `--response`. `portions`
replaces rows as they end (continuous batching); without it a batch goes on until its last row has ended.
"""

from __future__ import annotations

from benchmarks.speed.ours import main

if __name__ == "__main__":
    main("ending", __doc__)
