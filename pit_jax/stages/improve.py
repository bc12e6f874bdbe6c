"""Using an improver: better replies to the prompts of a file, from a run's directory alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, ConfigError, DataError, PitError
from pit_jax.core.types import Params
from pit_jax.data.readers import OnBadRecord, ReadConfig, ReadReport, read_objects, refuse
from pit_jax.decode.batches import Response, Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.improve.accept import Improve
from pit_jax.improve.loop import Judge, Trajectory, first_answers, improve
from pit_jax.io import files, serialize
from pit_jax.models.heads import ScalarModel
from pit_jax.sharding import processes, rules
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages import answering, together
from pit_jax.stages.artifact import MANIFEST, RUN, Artifact, finished_stages, split_reference
from pit_jax.text.chat import Chat, ChatFormat, check_messages
from pit_jax.text.chat_template import TemplateChat
from pit_jax.text.codec import Codec
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer

_LOG = logging.getLogger(__name__)
_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """One line of the input: a prompt, and a response to improve (None: the run's policy writes it).

    given: the prompt as it stands in the file, a text or messages; text: as the run's models read it.
    """

    given: Any
    text: str
    response: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `pit-jax improve` is asked for.

    checkpoint: a run (its finished improver is taken), the stage of an improver, or `STAGE:SNAPSHOT`.
    accept: "gap" needs R_PIT in the run; without it the rule is off, which is said.
    on_bad_record: whether a bad line stops or is skipped.
    """

    checkpoint: str
    input: str
    output: str | None = None
    iterations: int = 1
    candidates: int = 1
    accept: Literal["gap", "always"] = "gap"
    temperature: float = 1.0
    seed: int = 0
    on_bad_record: OnBadRecord = "fail"


class Improver:
    """The improver of a run with its gap model and its policy, found from one directory."""

    def __init__(self, checkpoint: str) -> None:
        place, self._snapshot = (checkpoint, None) if epath.Path(checkpoint).exists() else split_reference(checkpoint)
        self.artifact = _improver(epath.Path(place))
        self._bases: dict[str, Params] = {}
        stage = self.artifact.manifest["stage"]
        self._run = self.artifact.directory.parent
        self.mesh, self.rules = _layout(self._run)
        # An improver trained by RL names its gap model and its policy; for an SFT one the run is searched.
        self.gap, _ = self._named(stage.get("reward")) or self._found("reward", "gap")
        self.policy, self._policy_snapshot = self._named(stage.get("policy")) or self._found("rl", "policy")
        if self.policy is None:
            self.policy, self._policy_snapshot = self._found("sft", "policy")

    @property
    def codec(self) -> Codec:
        """How its texts become tokens."""
        return self.artifact.codec

    @functools.cached_property
    def chat(self) -> Chat:
        """How prompts are written: by the tokenizer's chat template, if the run's prompts go on where that ends."""
        tokenizer = self.codec.tokenizer
        template = tokenizer.chat_template if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if template is not None and template.matches(self.codec.templates):
            return TemplateChat(path=str(self.artifact.directory / "tokenizer"))
        return ChatFormat()

    def _named(self, reference: str | None) -> tuple[Artifact, str | None] | None:
        """Return the stage and snapshot of a reference, None where there is none (any more)."""
        if reference is None:
            return None
        place, snapshot = split_reference(reference)
        path = epath.Path(place) if "/" in place else self._run / place
        return (Artifact(path), snapshot) if (path / MANIFEST).exists() else None

    def _found(self, verb: str, role: str) -> tuple[Artifact | None, None]:
        return _stage_of(self._run, verb, role), None

    def params(self) -> Params:
        """Return the improver's parameters."""
        return self.artifact.trunk(self._snapshot, self.mesh, self._bases)

    def policy_params(self) -> Params:
        """Return the policy's parameters, where the run has one."""
        assert self.policy is not None
        return self.policy.trunk(self._policy_snapshot, self.mesh, self._bases)

    def scorer(self, rows: int) -> tuple[Scorer, Params] | None:
        """Return what scores gap prompts `rows` at a time, with its parameters; None where there is no gap model."""
        if self.gap is None:
            return None
        model = self.gap.network
        assert isinstance(model, ScalarModel)
        scorer = answering.make_scorer(model, self.codec, "gap", rows, self.mesh)
        return scorer, self.gap.params(None, self.mesh, self._bases)

    def judge(self) -> Judge | None:
        """Return r_gap as a scoring function, None where the run has no gap model."""
        found = self.scorer(self._rows)
        return None if found is None else functools.partial(found[0].score, found[1])

    @property
    def _rows(self) -> int:
        return answering.shared_out(self.mesh, _BATCH)

    def sampler(self, kind: Literal["policy", "improver"], temperature: float) -> Sampler:
        """Return what answers policy or improver prompts."""
        # The two can differ in their adapters: the policy may be the base of the improver's.
        artifact = self.policy if kind == "policy" and self.policy is not None else self.artifact
        sampling = Sampling(temperature=temperature)
        return answering.make_sampler(artifact.lm, self.codec, kind, sampling, self._rows, self.mesh)

    def originals(self, prompts: Sequence[Sequence[int]], temperature: float, seed: int) -> list[Response]:
        """Return the policy's own answers, for lines without a response.

        Raises:
          DataError: the run has no policy.
        """
        if self.policy is None:
            raise DataError(
                f"Some lines have no `response`, and {self._run} has no policy to write one. Add the field."
            )
        sampler = self.sampler("policy", temperature)
        return first_answers(functools.partial(sampler.answer, self.policy_params()), self.codec, prompts, seed)


def improve_file(request: Request) -> None:
    """Improve every line of a JSON Lines file; write `prompt`, `response`, `improved` and how it came about.

    Output lines also have `changed`, and under `steps` each proposal with `accepted`, its `gap` and the gap's own
    `zero`. The file appears only when it is complete; without `output` lines go to standard output.

    Raises:
      CheckpointError: the directory has no improver. DataError: a line is bad, or a response does not fit.
      ProcessError: the hosts do not have the same drafts.
    """
    config = Improve(iterations=request.iterations, candidates=request.candidates, accept=request.accept)
    improver = Improver(request.checkpoint)
    report = ReadReport()
    drafts = list(_drafts(request, improver, report))
    if report.bad_count:
        _LOG.warning("%s: %s", report.summary(), "; ".join(report.bad))
    if not drafts:
        raise DataError(f"{request.input} has no line to improve.")
    together.agree_on_settings({"request": serialize.to_json(request), "drafts": serialize.to_json(drafts)})
    with rules.use(improver.mesh, improver.rules):
        trajectories = _improved(request, config, improver, drafts)
    lines = [
        json.dumps(_line(improver.codec, draft, trajectory), ensure_ascii=False)
        for draft, trajectory in zip(drafts, trajectories, strict=True)
    ]
    if not processes.is_first():
        return
    if request.output is None:
        sys.stdout.write("\n".join(lines) + "\n")
    else:
        files.write_text(request.output, "\n".join(lines) + "\n")
        changed = sum(trajectory.final != trajectory.first for trajectory in trajectories)
        _LOG.info("%s: %d of %d responses changed", request.output, changed, len(drafts))


def _improved(request: Request, config: Improve, improver: Improver, drafts: Sequence[Draft]) -> list[Trajectory]:
    judge = improver.judge()
    if judge is None and config.needs_gap:
        _LOG.warning(
            "no gap reward model found beside %s: the accept rule is OFF, every proposal is taken",
            improver.artifact.directory,
        )
        config = Improve(iterations=request.iterations, accept="always")
    sampler = improver.sampler("improver", request.temperature)
    prompts = [improver.codec.prompt_ids(draft.text) for draft in drafts]
    answers = _answers(improver, drafts, prompts, request)
    answerer = functools.partial(sampler.answer, improver.params())
    return improve(config, answerer, judge, improver.codec, prompts, answers, request.seed)


def _answers(
    improver: Improver, drafts: Sequence[Draft], prompts: Sequence[Sequence[int]], request: Request
) -> list[Response]:
    """Return the given responses, and the policy's where there is none."""
    given = [None if draft.response is None else improver.codec.response_ids(draft.response) for draft in drafts]
    written: Iterator[Response] = iter(())
    missing = [prompt for prompt, ids in zip(prompts, given, strict=True) if ids is None]
    if missing:
        written = iter(improver.originals(missing, request.temperature, request.seed))
    return [next(written) if ids is None else Response(improver.codec.without_eos(ids), True) for ids in given]


def _line(codec: Codec, draft: Draft, trajectory: Trajectory) -> dict[str, Any]:
    first = draft.response if draft.response is not None else codec.text(trajectory.first.ids)
    unchanged = trajectory.final == trajectory.first
    return {
        "prompt": draft.given,
        "response": first,
        "improved": first if unchanged else codec.text(trajectory.final.ids),
        "changed": not unchanged,
        "steps": [
            {"proposal": codec.text(step.proposal.ids), "accepted": step.accepted, "gap": step.gap, "zero": step.zero}
            for step in trajectory.steps
        ],
    }


def _drafts(request: Request, improver: Improver, report: ReadReport) -> Iterator[Draft]:
    config, codec = ReadConfig(on_bad_record=request.on_bad_record), improver.codec
    for line, raw in read_objects(request.input, config, report):
        try:
            draft = _draft(raw, improver.chat)
            if not codec.prompt_ids(draft.text):
                raise DataError("field 'prompt' has no token. Remove the line.")
            if draft.response is not None:
                codec.response_ids(draft.response)
        except PitError as error:
            refuse(line, str(error), config, report)
            continue
        report.records += 1
        yield draft


def _draft(raw: dict[str, object], chat: Chat) -> Draft:
    prompt, response = raw.get("prompt"), raw.get("response")
    if isinstance(prompt, str) and prompt.strip():
        text = chat.text_prompt(prompt)
    elif isinstance(prompt, list):
        text = chat.prompt(check_messages(prompt, "prompt"))
    else:
        raise DataError(
            "field 'prompt' must be a text that is not empty, or a list of messages. "
            'Write {"prompt": ..., "response": ...}.'
        )
    if response is not None and not isinstance(response, str):
        raise DataError(f"field 'response' must be a text, not {type(response).__name__}. Write the draft to improve.")
    return Draft(given=prompt, text=text, response=response)


def _layout(run: epath.Path) -> tuple[Mesh, rules.Rules]:
    """Return the run's own mesh and rules where it fits the devices there are, else all devices, each with its rows."""
    recorded = files.read_json(run / RUN)["experiment"]["mesh"] if (run / RUN).exists() else None
    config = MeshConfig() if recorded is None else serialize.from_json(recorded)
    assert isinstance(config, MeshConfig)
    try:
        return make_mesh(config), config.rules
    except ConfigError:
        return make_mesh(MeshConfig()), MeshConfig().rules


def _improver(directory: epath.Path) -> Artifact:
    """Return the improver of a run or stage directory."""
    if (directory / MANIFEST).exists():
        artifact = Artifact(directory)
        if artifact.manifest["role"] != "improver":
            raise CheckpointError(
                f"{directory} is the stage {artifact.manifest['verb']} --role={artifact.manifest['role'] or 'none'}, "
                "not an improver. Give the run, or its stage of role improver."
            )
        return artifact
    found = _stage_of(directory, "rl", "improver") or _stage_of(directory, "sft", "improver")
    if found is None:
        raise CheckpointError(
            f"{directory} has no finished improver. Give the directory of a run (MODEL_DIR) whose improver is trained, "
            "or of such a stage."
        )
    return found


def _stage_of(run: epath.Path, verb: str, role: str) -> Artifact | None:
    """Return the stage of a verb and role that was finished first: recipes put ablations after the main stage."""
    stages = [Artifact(path) for path in finished_stages(run)]
    return next((s for s in stages if (s.manifest["verb"], s.manifest["role"]) == (verb, role)), None)
