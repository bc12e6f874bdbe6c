"""A program of its own that makes SRT's data: `python -m tests.stages.srt_data_program RUN URL`."""

from __future__ import annotations

import sys

import jax

from pit_jax.evaluation.endpoint_config import EndpointConfig, Limits
from pit_jax.srt.critics import EndpointCriticConfig
from pit_jax.stages.pipeline import Recipe
from tests.stages import srt_small


def asked(url: str) -> srt_small.SrtData:
    """Return the stage with a critic behind a server."""
    limits = Limits(concurrency=4, first_wait=0.05)
    critic = EndpointCriticConfig(endpoint=EndpointConfig(base_url=url, model="critic", limits=limits))
    return srt_small.data(critic=critic)


def main() -> None:
    """Run the one stage in a run whose base model is finished."""
    directory, url = sys.argv[1:]
    jax.config.update("jax_disable_most_optimizations", True)
    Recipe(model_dir=directory, seed=0, experiment=srt_small.experiment(), stages=(asked(url),)).run()


if __name__ == "__main__":
    main()
