"""Answers of a model that SRT has tuned: y, f and r for each prompt, on the run's own tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from pit_jax.core.errors import CheckpointError
from pit_jax.decode.batches import Response
from pit_jax.improve.loop import sample_keys
from pit_jax.io import serialize
from pit_jax.srt.inference import PARSED, Refined, outcomes, write_refined
from pit_jax.srt.text import SrtCodec, SrtText
from pit_jax.srt.writing import Temperatures, Writer
from pit_jax.stages.answering import shared_out
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.run import Run

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """How an SRT model answers.

    text: the format it was tuned on; None finds it in the run, through the stages the checkpoint was made from.
    rest_temperature: of feedback and refinement; None takes that of the response (all in one go, as in the paper).
    """

    text: SrtText | None = None
    rest_temperature: float | None = None


def answers(
    run: Run,
    checkpoint: str,
    prompts: Sequence[Sequence[int]],
    config: Inference,
    temperature: float,
    batch_size: int,
) -> list[Refined]:
    """Return y, f and r for each prompt (raw ids); where a text does not parse, `final` is y.

    The samples depend on the run's seed, the number of the prompt and the model alone; y is drawn with the keys of
    `improve.loop.first_answers`, so comparisons with an original are paired.

    Raises:
      CheckpointError: the checkpoint is no language model, or nothing says in which format it was tuned.
    """
    text = text_of(run, checkpoint) if config.text is None else config.text
    rest = temperature if config.rest_temperature is None else config.rest_temperature
    codec = SrtCodec(text, run.codec)
    found = write_refined(
        writer(run, codec, batch_size),
        run.language_model(checkpoint, "policy"),
        codec,
        [run.codec.policy_prompt(prompt) for prompt in prompts],
        sample_keys(run.seed, "answers", 0, range(len(prompts)), 1),
        Temperatures(temperature, rest),
    )
    counts = outcomes(found)
    if counts[PARSED] < len(found):
        _LOG.warning("%s: %d of %d texts have no usable refinement: %s", checkpoint,
                     len(found) - counts[PARSED], len(found), counts)  # fmt: skip
    return found


def finals(found: Sequence[Refined]) -> list[Response]:
    """Return the answers alone."""
    return [entry.final for entry in found]


def writer(run: Run, codec: SrtCodec, batch_size: int, stop: tuple[int, ...] = ()) -> Writer:
    """Return what writes texts of a format with the run's network, at fixed shapes; `stop` ends them early."""
    return Writer(
        lm=run.lm,
        width=run.codec.width("policy"),
        max_new=codec.text.targets,
        marker=codec.markers[0],
        stop=stop,
        eos_ids=run.codec.eos_ids,
        pad_id=run.codec.pad_id,
        batch_size=shared_out(run.mesh, batch_size),
        mesh=run.mesh,
    )


def text_of(run: Run, checkpoint: str) -> SrtText:
    """Return the format a checkpoint was tuned on: that of its stage, or of the one its training started from.

    Raises:
      CheckpointError: no stage on that way was SRT's.
    """
    reference: str | None = checkpoint
    seen: list[str] = []
    while reference is not None and reference not in seen:
        seen.append(reference)
        artifact = run.artifact(reference)
        stage = artifact.manifest.get("stage", {})
        found = serialize.from_json(stage["text"]) if "text" in stage else None
        if isinstance(found, SrtText):
            return found
        start = stage.get("init_from")
        # A stage of another run names the others by where they are from there.
        apart = "/" in split_reference(reference)[0] and start is not None and "/" not in split_reference(start)[0]
        reference = f"{artifact.directory.parent}/{start}" if apart else start
    raise CheckpointError(
        f"{checkpoint!r} was not tuned by SRT (looked at {', '.join(seen)}). Name a stage `srt`, one that starts from "
        "it, or give Inference.text."
    )
