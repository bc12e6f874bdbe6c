"""Response sets of an evaluation: sampled once, kept as files, so that an interrupted evaluation continues."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.decode.batches import Response
from pit_jax.decode.sampling import Sampling
from pit_jax.evaluation.report_parts import Dropped
from pit_jax.evaluation.winrate import ResponseSet
from pit_jax.improve.accept import Improve
from pit_jax.improve.baselines import best_of_n
from pit_jax.improve.loop import Judge, first_answers, improve
from pit_jax.io import files
from pit_jax.sharding import processes
from pit_jax.stages import answering, together
from pit_jax.stages.artifact import RESPONSES
from pit_jax.stages.run import HeldOut, Run
from pit_jax.text.codec import Codec

_LOG = logging.getLogger(__name__)
LEFT_OUT = ".left_out.json"
"""End of the names of files that say what a system could not use."""


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


def iterated(name: str, iterations: int) -> list[str]:
    """Return the names of the response sets after 1, 2, ... steps: NAME, NAME_iter2, ..."""
    return [name if k == 1 else f"{name}_iter{k}" for k in range(1, iterations + 1)]


def response_of(codec: Codec, text: str, finished: bool = True) -> Response:
    """Return a text as a response, cut at the longest that the codec has room for; a finished one has EOS as well."""
    ids, room = codec.without_eos(codec.tokenizer.encode(text)), codec.lengths.targets
    return Response(ids[:room], finished and len(ids) < room)


class Answers:
    """Answers held-out prompts with the run's models, one file for each response set."""

    @classmethod
    def of_stage(cls, run: Run, name: str, prompts: int, batch_size: int) -> Answers:
        """Return the answers of a stage that has begun, to the first held-out prompts; says if there are fewer."""
        found = run.held_out(prompts)
        if len(found) < prompts:
            _LOG.warning("%s: only %d of %d held-out prompts exist", name, len(found), prompts)
        return cls(run, run.stage_directory(name) / RESPONSES, found, batch_size)

    def __init__(self, run: Run, directory: epath.Path, prompts: Sequence[HeldOut], batch_size: int) -> None:
        self.run, self.prompts, self.batch_size = run, prompts, batch_size
        self._ids = [prompt.ids for prompt in prompts]
        self._directory = directory

    def originals(self, name: str, policy: str, temperature: float, sample: int = 0) -> Answered:
        """Return one sample of a policy for each prompt: the first, or a further one."""

        def make() -> list[list[Response]]:
            sampler = answering.sampler(self.run, "policy", Sampling(temperature=temperature), self.batch_size)
            answerer = functools.partial(sampler.answer, self.run.language_model(policy, "policy"))
            return [first_answers(answerer, self.run.codec, self._ids, self.run.seed, sample)]

        return self.kept([name], temperature, make)[0]

    def best_of(self, name: str, policy: str, reward: str, temperature: float, n: int) -> Answered:
        """Return the best of n samples by R_P for each prompt; sample 0 is that of `originals`."""

        def make() -> list[list[Response]]:
            sampler = answering.sampler(self.run, "policy", Sampling(temperature=temperature), self.batch_size)
            answerer = functools.partial(sampler.answer, self.run.language_model(policy, "policy"))
            judge = self.judge(reward, "policy")
            best = best_of_n(answerer, judge, self.run.codec, self._ids, n, self.run.seed)
            return [[entry.answer for entry in best]]

        return self.kept([name], temperature, make)[0]

    def improved(self, name: str, improver: str, gap: str, config: Improve, original: Answered) -> list[Answered]:
        """Return the answers after 1, 2, ... `config.iterations` improvement steps: NAME, NAME_iter2, ..."""
        temperature = original.temperature

        def make() -> list[list[Response]]:
            sampler = answering.sampler(self.run, "improver", Sampling(temperature=temperature), self.batch_size)
            trajectories = improve(
                config,
                functools.partial(sampler.answer, self.run.language_model(improver, "improver")),
                self.judge(gap, "gap"),
                self.run.codec,
                self._ids,
                original.responses,
                self.run.seed,
            )
            return [[trajectory.answer(k) for trajectory in trajectories] for k in range(1, config.iterations + 1)]

        return self.kept(iterated(name, config.iterations), temperature, make)

    def replies(self, name: str, which: Literal["chosen", "rejected"], temperature: float) -> Answered:
        """Return the replies of the data: y_w or y_l of the record each prompt was found in; too long ones are cut."""

        def make() -> list[list[Response]]:
            texts = [prompt.chosen if which == "chosen" else prompt.rejected for prompt in self.prompts]
            return [[response_of(self.run.codec, text) for text in texts]]

        return self.kept([name], temperature, make)[0]

    def judge(self, reward: str, kind: Literal["policy", "gap"]) -> Judge:
        """Return the scoring function of a reward stage for policy or gap prompts."""
        return answering.scores_by(self.run, reward, kind, self.batch_size)

    def rewards(self, judge: Judge, answered: Answered) -> Float[np.ndarray, " n"]:
        """Return R_P of every response."""
        rows = [self.run.codec.policy_prompt(prompt) for prompt in self._ids]
        return np.asarray(judge(rows, answered.responses), np.float64)

    def kept(
        self, names: Sequence[str], temperature: float, make: Callable[[], list[list[Response]]]
    ) -> list[Answered]:
        """Return response sets from their files, which are written first where they are not there.

        Args:
          names: of the sets.
          temperature: of sampling; also part of the files' names.
          make: returns them, one response to each prompt in each set. All processes call it.
        """
        if not self._are_there(names, temperature):
            for name, responses in zip(names, make(), strict=True):
                self._write(name, temperature, responses)
        return [self._read(name, temperature) for name in names]

    def leave_out(self, name: str, temperature: float, found: Sequence[Dropped]) -> None:
        """Keep what a system could not use, beside its responses; for reports, also those of a later run."""
        path = self._directory / f"{name}_T{temperature:g}{LEFT_OUT}"
        rows = [dataclasses.asdict(entry) for entry in found]
        together.write(f"what {name} left out", lambda: files.write_json(path, rows), path)

    def left_out(self) -> list[Dropped]:
        """Return what systems could not use, at all temperatures."""
        paths = sorted(self._directory.glob(f"*{LEFT_OUT}"))
        return [Dropped(**row) for path in paths for row in files.read_json(path)]

    def _are_there(self, names: Sequence[str], temperature: float) -> bool:
        """Return whether all of these sets were made before; what process 0 sees counts, for all must do the same."""
        paths = [self._path(name, temperature) for name in names]
        return processes.first(f"responses of {names[0]}", lambda: all(path.exists() for path in paths))

    def _path(self, name: str, temperature: float) -> epath.Path:
        return self._directory / f"{name}_T{temperature:g}.jsonl"

    def _write(self, name: str, temperature: float, responses: Sequence[Response]) -> None:
        codec = self.run.codec
        # Of a prompt all is shown: chat templates end turns by EOS, where the text of a response would stop.
        prompts = [codec.tokenizer.decode(prompt) for prompt in self._ids]
        lines = [
            json.dumps({"prompt": prompt, "response": codec.text(r.ids), "ids": list(r.ids), "finished": r.finished})
            for prompt, r in zip(prompts, responses, strict=True)
        ]
        path = self._path(name, temperature)
        together.write(f"responses of {name}", lambda: files.write_text(path, "\n".join(lines) + "\n"), path)

    def _read(self, name: str, temperature: float) -> Answered:
        rows = [json.loads(line) for line in self._path(name, temperature).read_text().splitlines()]
        responses = tuple(Response(tuple(row["ids"]), row["finished"]) for row in rows)
        return Answered(name=name, temperature=temperature, responses=responses)
