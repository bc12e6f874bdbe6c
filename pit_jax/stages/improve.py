"""Using an improver: better replies to prompts, from a run's directory alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from etils import epath
from jax.sharding import Mesh

from pit_jax.core.errors import CheckpointError, ConfigError, DataError, PitError
from pit_jax.core.types import Params
from pit_jax.data.readers import OnBadRecord, ReadConfig, ReadReport, read_objects, refuse
from pit_jax.decode.batches import Response, Sampler, Scorer
from pit_jax.decode.sampling import Sampling
from pit_jax.improve.accept import Improve
from pit_jax.improve.loop import Answerer, Judge, Trajectory, first_answers, improve
from pit_jax.io import files, serialize
from pit_jax.io.progress import Progress
from pit_jax.models.heads import ScalarModel
from pit_jax.sharding import processes, rules
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.stages import answering, improve_output, together
from pit_jax.stages.artifact import MANIFEST, RUN, Artifact, finished_stages, split_reference
from pit_jax.stages.improve_output import Output, Row
from pit_jax.text.chat import Chat, ChatFormat, check_messages
from pit_jax.text.chat_template import TemplateChat
from pit_jax.text.codec import Codec
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer

_LOG = logging.getLogger(__name__)
_BATCH = 64
_PORTIONS = 4
_NOT_IN_ROWS = ("input", "output", "on_bad_record", "draft_tokens")
"""Of a request, what changes no row, so that another command can go on with other values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """One line of the input: a prompt, and a response to improve (None: the run's policy writes it).

    given: the prompt as it stands in the file, a text or messages; text: as the run's models read it.
    """

    given: Any
    text: str
    response: str | None

    def made(self, row: Row) -> bool:
        """Return whether a row is this draft's."""
        return row.get("prompt") == self.given and self.response in (None, row.get("response"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `pit-jax improve` is asked for.

    checkpoint: a run (its finished improver is taken), the stage of an improver, or `STAGE:SNAPSHOT`.
    input: JSON Lines; None for prompts that are typed or piped, a line each (`improve_typed`).
    accept: "gap" needs R_PIT in the run; without it the rule is off, which is said. margin: of that rule.
    on_bad_record: whether a bad line stops or is skipped.
    chat: a prompt that is a text is what a user says, not a whole prompt. Runs whose prompts are written by a chat
      template take it so anyway.
    draft_tokens: tokens guessed from the response and checked at once (`decode.sampling.Sampling`); None for as many as
      the run's `Experiment.draft_tokens`. Answers are the same.
    """

    checkpoint: str
    input: str | None = None
    output: str | None = None
    iterations: int = 1
    candidates: int = 1
    accept: Literal["gap", "always"] = "gap"
    margin: float = 0.0
    temperature: float = 1.0
    seed: int = 0
    on_bad_record: OnBadRecord = "fail"
    chat: bool = False
    draft_tokens: int | None = None


class Improver:
    """The improver of a run with its gap model and its policy, found from one directory."""

    def __init__(self, checkpoint: str, draft_tokens: int | None = None) -> None:
        place, self._snapshot = (checkpoint, None) if epath.Path(checkpoint).exists() else split_reference(checkpoint)
        self.artifact = _improver(epath.Path(place))
        self._bases: dict[str, Params] = {}
        stage = self.artifact.manifest["stage"]
        self._run = self.artifact.directory.parent
        self.mesh, self.rules = _layout(self._run)
        self.draft_tokens = _experiment(self._run).get("draft_tokens", 0) if draft_tokens is None else draft_tokens
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

    def judge(self, rows: int | None = None) -> Judge | None:
        """Return r_gap as a scoring function of so many rows at a time, None where the run has no gap model."""
        found = self.scorer(self._rows(rows))
        return None if found is None else functools.partial(found[0].score, found[1])

    def _rows(self, rows: int | None) -> int:
        return answering.shared_out(self.mesh, _BATCH if rows is None else rows)

    def sampler(self, kind: Literal["policy", "improver"], temperature: float, rows: int | None = None) -> Sampler:
        """Return what answers policy or improver prompts, `rows` at a time."""
        # The two can differ in their adapters: the policy may be the base of the improver's.
        artifact = self.policy if kind == "policy" and self.policy is not None else self.artifact
        sampling = Sampling(temperature=temperature, draft_tokens=self.draft_tokens if kind == "improver" else 0)
        return answering.make_sampler(artifact.lm, self.codec, kind, sampling, self._rows(rows), self.mesh)

    def originals(
        self, prompts: Sequence[Sequence[int]], temperature: float, seed: int, start: int = 0, rows: int | None = None
    ) -> list[Response]:
        """Return the policy's own answers, for lines without a response; `start` is the number of the first of them.

        Raises:
          DataError: the run has no policy.
        """
        if self.policy is None:
            raise DataError(
                f"There is no `response` to improve, and {self._run} has no policy to write one. Give a response with "
                "every prompt."
            )
        sampler = self.sampler("policy", temperature, rows)
        answerer = functools.partial(sampler.answer, self._policy_params)
        return first_answers(answerer, self.codec, prompts, seed, start=start)

    @functools.cached_property
    def _policy_params(self) -> Params:
        return self.policy_params()


class Session:
    """An improver with what is asked of it: improves drafts, in any number of portions.

    The samples of a draft depend on the seed, on its number over all portions and on the draft alone, so portions do
    not change what comes out.

    Args:
      request: the settings; `input` and `output` are not looked at.
      rows: of a batch, None for many.
    """

    def __init__(self, request: Request, rows: int | None = None) -> None:
        self._config = Improve(
            iterations=request.iterations,
            candidates=request.candidates,
            accept=request.accept,
            margin=request.margin,
        )
        self.request, self._rows = request, rows
        self.improver = Improver(request.checkpoint, request.draft_tokens)
        self._done = self._written = 0

    @property
    def portion(self) -> int:
        """Drafts that are improved at once: a batch, and several where rows that have stopped leave room."""
        return _BATCH if self._config.iterations == 1 else _PORTIONS * _BATCH

    def settings(self) -> dict[str, Any]:
        """Return what decides the rows, drafts aside."""
        asked = dataclasses.asdict(self.request)
        stages = (self.improver.artifact, self.improver.gap, self.improver.policy)
        manifests = [None if stage is None else stage.manifest for stage in stages]
        kept = {name: asked[name] for name in asked if name not in _NOT_IN_ROWS}
        return kept | {"models": files.json_hash(manifests)}

    def draft(self, raw: Mapping[str, object]) -> Draft:
        """Return a line's draft.

        Raises:
          DataError: it has no prompt, or its response does not fit.
        """
        codec = self.improver.codec
        draft = _draft(raw, self.improver.chat, as_message=self.request.chat)
        if not codec.prompt_ids(draft.text):
            raise DataError("field 'prompt' has no token. Remove the line.")
        if draft.response is not None:
            codec.response_ids(draft.response)
        return draft

    def skip(self, drafts: Sequence[Draft]) -> None:
        """Count drafts whose rows are there already."""
        self._done += len(drafts)
        self._written += sum(draft.response is None for draft in drafts)

    def rows(self, drafts: Sequence[Draft]) -> list[Row]:
        """Return a row for each draft: `prompt`, `response`, `improved`, `changed` and `steps` (see `improve_file`)."""
        codec = self.improver.codec
        with rules.use(self.improver.mesh, self.improver.rules):
            prompts = [codec.prompt_ids(draft.text) for draft in drafts]
            answers, (config, judge) = self._answers(drafts, prompts), self._rule
            seed = self.request.seed
            trajectories = improve(config, self._answerer, judge, codec, prompts, answers, seed, self._done)
        self.skip(drafts)
        return [_row(codec, draft, trajectory) for draft, trajectory in zip(drafts, trajectories, strict=True)]

    @functools.cached_property
    def _rule(self) -> tuple[Improve, Judge | None]:
        """The accept rule with its gap model; without one the rule is off."""
        judge = self.improver.judge(self._rows)
        if judge is not None or not self._config.needs_gap:
            return self._config, judge
        _LOG.warning(
            "no gap reward model found beside %s: the accept rule is OFF, every proposal is taken",
            self.improver.artifact.directory,
        )
        return Improve(iterations=self._config.iterations, accept="always"), None

    @functools.cached_property
    def _answerer(self) -> Answerer:
        sampler = self.improver.sampler("improver", self.request.temperature, self._rows)
        return functools.partial(sampler.answer, self.improver.params())

    def _answers(self, drafts: Sequence[Draft], prompts: Sequence[Sequence[int]]) -> list[Response]:
        """Return the given responses, and the policy's where there is none."""
        codec, request = self.improver.codec, self.request
        given = [None if draft.response is None else codec.response_ids(draft.response) for draft in drafts]
        written: Iterator[Response] = iter(())
        missing = [prompt for prompt, ids in zip(prompts, given, strict=True) if ids is None]
        if missing:
            originals = self.improver.originals(missing, request.temperature, request.seed, self._written, self._rows)
            written = iter(originals)
        return [next(written) if ids is None else Response(codec.without_eos(ids), True) for ids in given]


def improve_file(request: Request) -> None:
    """Improve every line of a JSON Lines file; write `prompt`, `response`, `improved` and how it came about.

    Output lines also have `changed`, and under `steps` each proposal with `accepted`, its `gap` and the gap's own
    `zero`. They are written in the order of the input as soon as they are there, to standard output, or to a file that
    gets its name when it is complete and that the same command continues after an interruption (see `improve_output`).

    Raises:
      CheckpointError: the directory has no improver.
      DataError: a line is bad, a response does not fit, or the output was begun by another command.
      ProcessError: the hosts do not have the same drafts.
    """
    assert request.input is not None
    session, report = Session(request), ReadReport()
    drafts = list(_drafts(request.input, request.on_bad_record, session, report))
    if report.bad_count:
        _LOG.warning("%s: %s", report.summary(), "; ".join(report.bad))
    if not drafts:
        raise DataError(f"{request.input} has no line to improve.")
    together.agree_on_settings({"request": serialize.to_json(request), "drafts": serialize.to_json(drafts)})
    with contextlib.closing(improve_output.open_output(request.output, session.settings())) as output:
        done = processes.first("rows that are there", lambda: len(_begun(output, drafts)))
        session.skip(drafts[:done])
        shown = processes.is_first() and request.output is not None
        with Progress("improve", len(drafts), start=done, enabled=shown) as progress:
            for start in range(done, len(drafts), session.portion):
                rows = session.rows(drafts[start : start + session.portion])
                if processes.is_first():
                    output.add(rows)
                progress.advance(start + len(rows))
        if processes.is_first():
            output.finish()


def _begun(output: Output, drafts: Sequence[Draft]) -> list[Row]:
    """Return the rows that an interrupted command has left, which must be those of the first drafts."""
    rows = output.begin()
    for number, row in enumerate(rows):
        if number >= len(drafts) or not drafts[number].made(row):
            raise output.other(f"row {number + 1} is of another prompt or response than the input's")
    return rows


def _row(codec: Codec, draft: Draft, trajectory: Trajectory) -> Row:
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


def _drafts(path: str, on_bad_record: OnBadRecord, session: Session, report: ReadReport) -> Iterator[Draft]:
    config = ReadConfig(on_bad_record=on_bad_record)
    for line, raw in read_objects(path, config, report):
        try:
            draft = session.draft(raw)
        except PitError as error:
            refuse(line, str(error), config, report)
            continue
        report.records += 1
        yield draft


def _draft(raw: Mapping[str, object], chat: Chat, *, as_message: bool) -> Draft:
    prompt, response = raw.get("prompt"), raw.get("response")
    if isinstance(prompt, str) and prompt.strip():
        text = chat.prompt([{"role": "user", "content": prompt}]) if as_message else chat.text_prompt(prompt)
    elif isinstance(prompt, list):
        text = chat.prompt(check_messages(prompt, "prompt"))
    else:
        raise DataError(
            "field 'prompt' must be a text that is not empty, or a list of messages. "
            'Write {"prompt": ..., "response": ...}.'
        )
    if response is not None and not isinstance(response, str):
        raise DataError(f"field 'response' must be a text, not {type(response).__name__}. Write the draft to improve.")
    for name, words in (("prompt", text), ("response", response or "")):
        if any("\ud800" <= character <= "\udfff" for character in words):
            raise DataError(f"field {name!r} holds half of a surrogate pair, which is no text. Mend the line.")
    return Draft(given=prompt, text=text, response=response)


def _layout(run: epath.Path) -> tuple[Mesh, rules.Rules]:
    """Return the run's own mesh and rules where it fits the devices there are, else all devices, each with its rows."""
    recorded = _experiment(run).get("mesh")
    config = MeshConfig() if recorded is None else serialize.from_json(recorded)
    assert isinstance(config, MeshConfig)
    try:
        return make_mesh(config), config.rules
    except ConfigError:
        return make_mesh(MeshConfig()), MeshConfig().rules


def _experiment(run: epath.Path) -> dict[str, Any]:
    """Return a run's experiment as it is recorded, empty where nothing is."""
    return files.read_json(run / RUN)["experiment"] if (run / RUN).exists() else {}


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
