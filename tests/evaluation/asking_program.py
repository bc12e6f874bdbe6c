"""A program of its own that asks a judge: `python asking_program.py URL DIRECTORY N CONCURRENCY`; prints verdicts."""

from __future__ import annotations

import json
import sys

from pit_jax.evaluation.endpoint_config import EndpointConfig, Limits
from pit_jax.evaluation.llm_judge import LlmJudgeConfig
from pit_jax.evaluation.pairwise import Question


def main() -> None:
    url, directory, count, concurrency = sys.argv[1:]
    limits = Limits(concurrency=int(concurrency), first_wait=0.05)
    config = LlmJudgeConfig(endpoint=EndpointConfig(base_url=url, model="judge", limits=limits))
    judge = config.build(directory)
    questions = [Question(f"prompt {i}", f"one {i}", f"two {i}") for i in range(int(count))]
    print(json.dumps([verdict.outcome for verdict in judge.verdicts(questions)]))


if __name__ == "__main__":
    main()
