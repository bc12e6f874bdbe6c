"""The verbs `annotate` and `votes`: people compare two files of responses, and what they said."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import numpy as np
from etils import epath

from pit_jax.core.errors import DataError
from pit_jax.data.readers import ReadConfig, ReadReport, read_objects
from pit_jax.evaluation import alpaca
from pit_jax.evaluation.agreement import Agreement, Measure
from pit_jax.evaluation.annotation import Pack, write_pack
from pit_jax.evaluation.annotation_votes import read_votes
from pit_jax.evaluation.pairwise import outcomes, pair_up
from pit_jax.evaluation.summary import summarise


def annotate(args: argparse.Namespace) -> None:
    """`pit-jax annotate`: write a blinded page and table for each person, and the key."""
    candidate, baseline = read_responses(args.candidate), read_responses(args.baseline)
    questions = pair_up(candidate, baseline, names=(args.candidate, args.baseline))[: args.limit]
    optional = {name: text for name, text in (("title", args.title), ("instructions", args.instructions)) if text}
    pack = Pack(annotators=tuple(args.annotators), seed=args.seed, overlap=args.overlap, **optional)
    pages = write_pack(questions, pack, args.output, key=args.key)
    print(f"{len(questions)} questions. To hand out, with the .csv beside each for those who prefer a spreadsheet:")
    for page in pages:
        print(f"  {page}")
    print(f"To keep to yourself: {args.key}. Without it, votes cannot be read.")


def votes(args: argparse.Namespace) -> None:
    """`pit-jax votes`: what people said, how sure that is, and how far they agree."""
    people = read_votes(args.key, args.votes)
    questions = people.questions
    groups = [question.prompt for question in questions]
    difference = np.array([len(question.first) - len(question.second) for question in questions], np.float64)
    summary = summarise(outcomes(people.verdicts(questions)), difference, groups, seed=args.seed)
    agreed = people.agreement(groups, seed=args.seed)
    if args.json:
        measures = None if agreed is None else dataclasses.asdict(agreed)
        content = {
            "summary": dataclasses.asdict(summary),
            "agreement": measures,
            "people": people.describe(seed=args.seed),
        }
        json.dump(_without_nan(content), sys.stdout, indent=1)
        print()
        return
    print("\n".join([*summary.lines("candidate", "baseline"), *people.describe(seed=args.seed)]))
    if agreed is not None:
        print("\n".join(_agreement_lines(agreed)))


def _agreement_lines(agreed: Agreement) -> list[str]:
    together = [
        f"{measure.name}: {_with_interval(measure)} on {measure.items} questions."
        for measure in (agreed.raw, agreed.alpha, agreed.fleiss)
        if measure.items
    ]
    return together + [
        f"{pair.first} and {pair.second}: the same on {100 * pair.raw.value:.0f} % of {pair.raw.items} questions, "
        f"kappa {_with_interval(pair.kappa)}."
        for pair in agreed.pairs
        if pair.raw.items
    ]


def _with_interval(measure: Measure) -> str:
    return f"{measure.value:.2f} [{measure.ci95.low:.2f}, {measure.ci95.high:.2f}]"


def read_responses(path: str) -> list[tuple[str, str]]:
    """Return the prompts and responses of a file, in order.

    `FILE.json` is AlpacaEval's model_outputs.json. Any other is JSON Lines with `prompt` and `response`, such as those
    that `evaluate` leaves in a run; `FILE:NAME` takes the response from field NAME, such as `improved`.

    Raises:
      DataError: the file is missing, or a line lacks one of the two.
    """
    place, separator, field = path.rpartition(":")
    if not separator or "/" in field or epath.Path(path).exists():
        place, field = path, "response"
    if place.endswith(".json"):
        found = alpaca.read_outputs(place)
        return list(zip(found.instructions, found.outputs, strict=True))
    rows = []
    for line, raw in read_objects(place, ReadConfig(), ReadReport()):
        prompt, response = raw.get("prompt"), raw.get(field)
        for name, value in (("prompt", prompt), (field, response)):
            if not isinstance(value, str):
                raise DataError(f"{line.place}: field {name!r} must be a text, not {type(value).__name__}. Add it.")
        rows.append((prompt, response))
    if not rows:
        raise DataError(f"{place} has no line. Give a file with responses.")
    return rows


def _without_nan(data: object) -> object:
    """Return data for JSON: what is not defined (NaN) becomes null."""
    if isinstance(data, dict):
        return {name: _without_nan(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and np.isnan(data) else data
