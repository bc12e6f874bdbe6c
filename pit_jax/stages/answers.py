"""Response sets of an evaluation: sampled once, kept as files, so that an interrupted evaluation continues."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.decode.batches import Response
from pit_jax.decode.sampling import Sampling
from pit_jax.evaluation.winrate import ResponseSet
from pit_jax.improve.accept import Improve
from pit_jax.improve.baselines import best_of_n
from pit_jax.improve.loop import Judge, first_answers, improve
from pit_jax.io import files
from pit_jax.sharding import processes
from pit_jax.stages import answering, together
from pit_jax.stages.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """One system's responses to the held-out prompts at one temperature."""

    name: str
    temperature: float
    responses: tuple[Response, ...]

    def as_set(self, run: Run) -> ResponseSet:
        """Return them as text."""
        return ResponseSet(
            name=self.name,
            temperature=self.temperature,
            responses=tuple(run.codec.text(response.ids) for response in self.responses),
            lengths=tuple(len(response.ids) for response in self.responses),
        )


class Answers:
    """Answers held-out prompts with the run's models, one file for each response set."""

    def __init__(self, run: Run, directory: epath.Path, prompts: Sequence[tuple[int, ...]], batch_size: int) -> None:
        self.run, self.prompts = run, prompts
        self._directory, self._batch_size = directory, batch_size

    def originals(self, name: str, policy: str, temperature: float) -> Answered:
        """Return one sample of a policy for each prompt."""

        def make() -> list[Response]:
            sampler = answering.sampler(self.run, "policy", Sampling(temperature=temperature), self._batch_size)
            answerer = functools.partial(sampler.answer, self.run.language_model(policy, "policy"))
            return first_answers(answerer, self.run.codec, self.prompts, self.run.seed)

        return self._kept(name, temperature, make)

    def best_of(self, name: str, policy: str, reward: str, temperature: float, n: int) -> Answered:
        """Return the best of n samples by R_P for each prompt; sample 0 is that of `originals`."""

        def make() -> list[Response]:
            sampler = answering.sampler(self.run, "policy", Sampling(temperature=temperature), self._batch_size)
            answerer = functools.partial(sampler.answer, self.run.language_model(policy, "policy"))
            judge = self.judge(reward, "policy")
            best = best_of_n(answerer, judge, self.run.codec, self.prompts, n, self.run.seed)
            return [entry.answer for entry in best]

        return self._kept(name, temperature, make)

    def improved(self, name: str, improver: str, gap: str, config: Improve, original: Answered) -> list[Answered]:
        """Return the answers after 1, 2, ... `config.iterations` improvement steps: NAME, NAME_iter2, ..."""
        names = [name if k == 1 else f"{name}_iter{k}" for k in range(1, config.iterations + 1)]
        temperature = original.temperature
        if not self._are_there(names, temperature):
            sampler = answering.sampler(self.run, "improver", Sampling(temperature=temperature), self._batch_size)
            trajectories = improve(
                config,
                functools.partial(sampler.answer, self.run.language_model(improver, "improver")),
                self.judge(gap, "gap"),
                self.run.codec,
                self.prompts,
                original.responses,
                self.run.seed,
            )
            for k, each in enumerate(names, start=1):
                self._write(each, temperature, [trajectory.answer(k) for trajectory in trajectories])
        return [self._read(each, temperature) for each in names]

    def judge(self, reward: str, kind: str) -> Judge:
        """Return the scoring function of a reward stage for policy or gap prompts."""
        scorer = answering.scorer(self.run, reward, "gap" if kind == "gap" else "policy", self._batch_size)
        return functools.partial(scorer.score, self.run.params(reward))

    def rewards(self, judge: Judge, answered: Answered) -> Float[np.ndarray, " n"]:
        """Return R_P of every response."""
        rows = [self.run.codec.policy_prompt(prompt) for prompt in self.prompts]
        return np.asarray(judge(rows, answered.responses), np.float64)

    def _kept(self, name: str, temperature: float, make: Callable[[], list[Response]]) -> Answered:
        if not self._are_there([name], temperature):
            self._write(name, temperature, make())
        return self._read(name, temperature)

    def _are_there(self, names: Sequence[str], temperature: float) -> bool:
        """Return whether all of these sets were made before; what process 0 sees counts, for all must do the same."""
        paths = [self._path(name, temperature) for name in names]
        return processes.first(f"responses of {names[0]}", lambda: all(path.exists() for path in paths))

    def _path(self, name: str, temperature: float) -> epath.Path:
        return self._directory / f"{name}_T{temperature:g}.jsonl"

    def _write(self, name: str, temperature: float, responses: Sequence[Response]) -> None:
        text = self.run.codec.text
        lines = [
            json.dumps({"prompt": text(prompt), "response": text(r.ids), "ids": list(r.ids), "finished": r.finished})
            for prompt, r in zip(self.prompts, responses, strict=True)
        ]
        path = self._path(name, temperature)
        together.write(f"responses of {name}", lambda: files.write_text(path, "\n".join(lines) + "\n"), path)

    def _read(self, name: str, temperature: float) -> Answered:
        rows = [json.loads(line) for line in self._path(name, temperature).read_text().splitlines()]
        responses = tuple(Response(tuple(row["ids"]), row["finished"]) for row in rows)
        return Answered(name=name, temperature=temperature, responses=responses)
