"""The project's own verifiable instruction-following set, as SeqIO tasks: one family for each difficulty.

Tasks: `synthetic_easy_<view>`, `synthetic_demo_<view>`, `synthetic_hard_<view>`, tokenised as bytes. The records are
made while they are read, and are the same every time; `pit_jax.data.synthetic.quality(prompt, response)` judges what a
model answers. Recipes that run where there is no TensorFlow use the generator itself:

    DataSpec(generator="pit_jax.data.synthetic:generate", config=SyntheticConfig(difficulty="demo"))
"""

from __future__ import annotations

import functools

from pit_jax.data.seqio_tasks import register_preference_tasks
from pit_jax.data.synthetic import PRESETS, SyntheticConfig, generate

for difficulty in PRESETS:
    config = SyntheticConfig(difficulty=difficulty)
    register_preference_tasks(f"synthetic_{difficulty}", functools.partial(generate, config))
