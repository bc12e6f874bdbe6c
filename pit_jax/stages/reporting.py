"""What a run's report says beside the comparisons: curves, reward models, sizes, cost and warnings."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pit_jax.core.tree import parameter_count
from pit_jax.evaluation import report
from pit_jax.io import files
from pit_jax.io.writers import read_metrics
from pit_jax.stages.artifact import MANIFEST, RESPONSES, RESULT, finished_stages
from pit_jax.stages.run import Run

_LOG = logging.getLogger(__name__)
ENOUGH = 0.93
"""Held-out accuracy of a reward model below which RL tends to find its holes (measured on the synthetic set)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecords:
    """Manifests, results and metric records of the finished stages of a run, in the order they were finished."""

    manifests: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]

    def of(self, *verbs: str) -> dict[str, Sequence[Mapping[str, Any]]]:
        """Return the metric records of the stages with one of these verbs, held-out values under `eval/`."""
        return {
            name: [_flat(record) for record in self.metrics[name]]
            for name, manifest in self.manifests.items()
            if manifest["verb"] in verbs and self.metrics[name]
        }

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
        """Return the cost of every stage, and warnings about reward models that are too weak for RL."""
        cost = ", ".join(f"{name} {self.tokens(name) / 1e6:.1f}" for name in self.metrics if self.metrics[name])
        notes = [f"Tokens trained on, in millions: {cost}."] if cost else []
        for name, result in self.reward_models().items():
            clean = {key: value for key, value in result["accuracy"].items() if "baseline" not in key}
            chosen = {key: value for key, value in clean.items() if "clean" in key and value["n"]} or clean
            worst = min(chosen, key=lambda key: chosen[key]["value"])
            if chosen[worst]["value"] < ENOUGH:
                notes.append(
                    f"Warning: {name} is right on {chosen[worst]['value']:.3f} of held-out records for {worst}, below "
                    f"{ENOUGH}; RL may exploit its mistakes. Train it (and SFT before it) longer, or on more data."
                )
        return notes


def training_records(run: Run) -> TrainingRecords:
    """Read what the finished stages of a run have left."""
    found = finished_stages(run.directory)
    metrics = {path.name: path / "metrics.jsonl" for path in found}
    return TrainingRecords(
        manifests={path.name: files.read_json(path / MANIFEST) for path in found},
        results={path.name: files.read_json(path / RESULT) for path in found},
        metrics={name: read_metrics(path) if path.exists() else [] for name, path in metrics.items()},
    )


def write_report(run: Run, stage: str, comparisons: report.Report) -> None:
    """Complete the report of an evaluation stage with everything the run knows, and write it."""
    records = training_records(run)
    experiment = run.experiment
    facts = {
        "model": f"{type(experiment.model).__name__}, {parameter_count(run.lm.abstract()):,} parameters",
        "tokenizer": f"{run.tokenizer.vocab_size} pieces",
        "lengths": f"prompt {run.codec.lengths.inputs}, response {run.codec.lengths.targets}, "
        f"prompt with reference {run.codec.width('improver')} tokens",
        "seed": str(run.seed),
        "configuration": "config.gin in the run's directory (run again: pit-jax pipeline --gin_file=THAT_FILE)",
        "responses": f"{stage}/{RESPONSES} in the run's directory",
    }
    full = dataclasses.replace(
        comparisons,
        facts=facts,
        notes=[*comparisons.notes, *records.notes()],
        reward_models=records.reward_models(),
        supervised=records.of("lm", "sft", "reward"),
        reinforced=records.of("rl"),
    )
    page = report.write(full, run.directory / "report")
    for warning in (note for note in full.notes if note.startswith("Warning")):
        _LOG.warning(warning)
    _LOG.info("report: %s", page)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "eval/" if record["kind"] == "eval" else ""
    return {key if key in ("step", "kind") else prefix + key: value for key, value in record.items()}
