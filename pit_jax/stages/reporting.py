"""What a run's report says beside the comparisons: curves, reward models, sizes, cost, warnings, and how to rerun."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pit_jax.core.tree import parameter_count
from pit_jax.evaluation import report, report_writer
from pit_jax.evaluation.document import Rerun
from pit_jax.io import files
from pit_jax.io.writers import read_metrics
from pit_jax.stages import together
from pit_jax.stages.artifact import MANIFEST, RESPONSES, RESULT, RUN, finished_stages
from pit_jax.stages.run import Run

_LOG = logging.getLogger(__name__)
CONFIG = "config.gin"
"""The configuration as text, which the command line leaves in a run's directory."""
ENOUGH = 0.93
"""Held-out accuracy of a reward model below which RL tends to find its holes (measured on the synthetic set)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecords:
    """Manifests, results and metric records of the finished stages of a run, in the order they were finished."""

    manifests: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]

    def reinforced(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        """Return the metric records of the RL stages, held-out values under `eval/`."""
        return {name: records for name, records in self._flat().items() if self.manifests[name]["verb"] == "rl"}

    def supervised(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        """Return the metric records of all other stages that have a loss, held-out values under `eval/`."""
        return {
            name: records
            for name, records in self._flat().items()
            if self.manifests[name]["verb"] != "rl" and any("loss" in record for record in records)
        }

    def _flat(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        return {name: [_flat(record) for record in records] for name, records in self.metrics.items() if records}

    def reward_models(self) -> dict[str, Mapping[str, Any]]:
        """Return the held-out reports of the reward stages."""
        return {name: self.results[name] for name, manifest in self.manifests.items() if manifest["verb"] == "reward"}

    def tokens(self, name: str) -> float:
        """Return how many tokens a stage has trained on."""
        train = [record for record in self.metrics[name] if record["kind"] == "train"]
        steps = [0, *(record["step"] for record in train)]
        return sum(
            record["tokens"] * (now - before) for record, before, now in zip(train, steps, steps[1:], strict=False)
        )

    def notes(self) -> list[str]:
        """Return the cost of every stage that has counted its tokens."""
        counted = [name for name, records in self.metrics.items() if any("tokens" in record for record in records)]
        cost = ", ".join(f"{name} {self.tokens(name) / 1e6:.1f}" for name in counted)
        return [f"Tokens trained on, in millions: {cost}."] if cost else []

    def warnings(self) -> list[str]:
        """Return warnings about reward models that are too weak for RL, and about RL that ended with alarms on."""
        found = [warning for name, records in self.reinforced().items() if (warning := _alarms(name, records))]
        for name, result in self.reward_models().items():
            clean = {key: value for key, value in result["accuracy"].items() if "baseline" not in key}
            chosen = {key: value for key, value in clean.items() if "clean" in key and value["n"]} or clean
            worst = min(chosen, key=lambda key: chosen[key]["value"])
            if chosen[worst]["value"] < ENOUGH:
                found.append(
                    f"{name} is right on {chosen[worst]['value']:.3f} of held-out records for {worst}, below "
                    f"{ENOUGH}; RL may exploit its mistakes. Train it (and SFT before it) longer, or on more data."
                )
        return found


def _alarms(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the warning about an RL stage whose last records all have alarms, "" where the very last has none."""
    train = [record for record in records if record["kind"] == "train"]
    last = list(itertools.takewhile(lambda record: record.get("alarms"), reversed(train)))
    if not last:
        return ""
    return (
        f"{name} ended with alarms of reward hacking on (all records from step {last[-1]['step']} have some; its log "
        "says which). What it learnt there may please the reward model alone: compare a snapshot of before, or train "
        "with a larger beta or MonitorConfig.action = 'adapt'."
    )


def training_records(run: Run) -> TrainingRecords:
    """Read what the finished stages of a run have left."""
    found = finished_stages(run.directory)
    metrics = {path.name: path / "metrics.jsonl" for path in found}
    return TrainingRecords(
        manifests={path.name: files.read_json(path / MANIFEST) for path in found},
        results={path.name: files.read_json(path / RESULT) for path in found},
        metrics={name: read_metrics(path) if path.exists() else [] for name, path in metrics.items()},
    )


def facts_of_run(run: Run, stage: str) -> dict[str, str]:
    """Return what a report says of the run it is about."""
    return {
        "model": f"{type(run.experiment.model).__name__}, {parameter_count(run.lm.abstract()):,} parameters",
        "tokenizer": f"{run.tokenizer.vocab_size} pieces",
        "lengths": f"prompt {run.codec.lengths.inputs}, response {run.codec.lengths.targets}, "
        f"prompt with reference {run.codec.width('improver')} tokens",
        "seed": str(run.seed),
        "configuration": f"`{CONFIG}` in the run's directory (run again: `pit-jax pipeline --gin_file=THAT_FILE`)",
        "responses": f"`{stage}/{RESPONSES}` in the run's directory",
    }


def rerun(run: Run, stage: Any) -> Rerun:
    """Return what is needed to make a stage's figures again, from what it and the run have written down.

    The stage (a `pipeline.Stage`) must have begun. The command line is this process's; where that is not `pit-jax`,
    the one that does the same. Inputs are the checkpoints it reads, with the hashes of their manifests, and the
    tokenizer. The run's directory is called MODEL_DIR everywhere: a report is read elsewhere.
    """
    return _rerun(run, stage.name)


def _rerun(run: Run, stage: str) -> Rerun:
    manifest = files.read_json(run.stage_directory(stage) / MANIFEST)
    written = run.directory / CONFIG
    settings = {"stage": manifest["stage"], "run": files.read_json(run.directory / RUN)}
    return Rerun(
        command=_anywhere(_command(run), run.directory),
        seed=run.seed,
        versions=together.versions(),
        inputs={
            **{_anywhere(reference, run.directory): digest for reference, digest in manifest["inputs"].items()},
            "tokenizer": manifest["tokenizer"],
        },
        config=_anywhere(written.read_text() if written.exists() else "", run.directory),
        settings=_anywhere(json.dumps(settings, indent=1, ensure_ascii=False), run.directory),
    )


def _command(run: Run) -> str:
    program = pathlib.Path(sys.argv[0])
    if program.stem == "pit-jax" or program.parts[-2:] == ("pit_jax", "__main__.py"):
        return shlex.join(["pit-jax", *sys.argv[1:]])
    return shlex.join(["pit-jax", "pipeline", f"--gin_file={run.directory / CONFIG}"])


def _anywhere(text: str, directory: epath.Path) -> str:
    """Return text with MODEL_DIR for a run's directory, as it was given and in full."""
    given = os.fspath(directory)
    names = {given, os.path.abspath(given)} if files.is_local(given) else {given}
    # A name of one word, such as `runs`, may be any word of a text, and says nothing of this machine.
    for name in sorted((name for name in names if "/" in name), key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", "MODEL_DIR", text)
    return text


def write_report(run: Run, stage: str, comparisons: report.Report) -> None:
    """Complete the report of an evaluation stage with everything the run knows, and write it."""
    records = training_records(run)
    full = dataclasses.replace(
        comparisons,
        facts={**facts_of_run(run, stage), **comparisons.facts},
        notes=[*comparisons.notes, *records.notes()],
        warnings=[*comparisons.warnings, *records.warnings()],
        reward_models=records.reward_models(),
        supervised=records.supervised(),
        reinforced=records.reinforced(),
        rerun=comparisons.rerun or _rerun(run, stage),
    )
    page = report_writer.write(full, run.directory / "report")
    for warning in full.all_warnings():
        _LOG.warning("%s", warning)
    _LOG.info("report: %s", page)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "eval/" if record["kind"] == "eval" else ""
    return {key if key in ("step", "kind") else prefix + key: value for key, value in record.items()}
