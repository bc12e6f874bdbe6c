"""What a person looks at before training: examples as text with their masks visible, and the state of a raw file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pit_jax.data.collate import Pass, comparison_passes, sft_pass
from pit_jax.data.readers import Paths, ReadConfig, ReadReport, read_jsonl
from pit_jax.data.schema import Record
from pit_jax.data.views import DropReport, Example, make_examples
from pit_jax.text.codec import Codec, PromptRow
from pit_jax.text.hf_tokenizer import HuggingFaceTokenizer

_STYLES = {"prompt": "dim", "reference": "yellow", "trained": "bold green", "special": "magenta"}
_BRACKETS = {"prompt": ("", ""), "reference": ("{{", "}}"), "trained": ("[[", "]]"), "special": ("", "")}
LEGEND = "{{reference}} [[trained on or scored]]"
# Below this word overlap two replies have little in common but function words.
_RELATED = 0.3
_PERCENTILES = (50, 90, 99, 100)


class Span(NamedTuple):
    """A stretch of a row: its text, and whether it is prompt, reference, trained or special (BOS, EOS)."""

    text: str
    role: str


def pass_spans(part: Pass, codec: Codec) -> list[Span]:
    """Return a prompt and its response, cut where the reference and the response start and end."""
    ids, (start, stop) = part.prompt.ids, part.prompt.reference
    spans: list[Span] = []
    for stretch, role in (
        (ids[:start], "prompt"),
        (ids[start:stop], "reference"),
        (ids[stop:], "prompt"),
        (part.response, "trained"),
    ):
        spans += _decoded(stretch, role, codec)
    return spans


def _decoded(ids: Sequence[int], role: str, codec: Codec) -> list[Span]:
    """Decode a stretch, with BOS, EOS and the marks of a chat template, which have no text, written out."""
    tokenizer = codec.tokenizer
    names: dict[int | None, str] = {tokenizer.bos_id: "<bos>"} | dict.fromkeys(codec.eos_ids, "<eos>")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        names |= tokenizer.special_tokens()
    spans: list[Span] = []
    start = 0
    for at, token in enumerate((*ids, None)):
        if token is not None and token not in names:
            continue
        if at > start:
            spans.append(Span(tokenizer.decode(ids[start:at]), role))
        if token is not None:
            spans.append(Span(names[token], role if role == "trained" else "special"))
        start = at + 1
    return spans


def example_passes(view: str, example: Example, codec: Codec) -> dict[str, Pass]:
    """Return what goes through a model for one example, by name.

    Prompts whose responses are sampled later (views rl and evaluate) are shown for the policy, and for the improver
    with either reply as the reference; they have no response yet.
    """
    if view == "reward_bt":
        return dict(zip(("chosen", "rejected"), comparison_passes(example, codec, view), strict=True))
    if view == "reward_gap":
        names = ("chosen against rejected", "chosen against chosen", "rejected against rejected")
        return dict(zip((*names, "rejected against chosen"), comparison_passes(example, codec, view), strict=True))
    if view in ("rl", "evaluate"):
        prompt = example["prompt"].tolist()
        rows: dict[str, PromptRow] = {"policy": codec.policy_prompt(prompt)}
        for name in ("rejected", "chosen"):
            rows[f"improver, reference {name}"] = codec.improver_prompt(prompt, example[name].tolist())
        return {name: Pass(row, ()) for name, row in rows.items()}
    return {view: sft_pass(example)}


def render(spans: Sequence[Span], *, colour: bool) -> Text:
    """Return spans as one text, marked by colour, or by brackets where there is none."""
    text = Text()
    for n, (content, role) in enumerate(spans):
        if colour:
            text.append(content, style=_STYLES[role])
            continue
        opening, closing = _BRACKETS[role]
        first = n == 0 or spans[n - 1].role != role
        last = n + 1 == len(spans) or spans[n + 1].role != role
        text.append((opening if first else "") + content + (closing if last else ""))
    return text


def show_examples(view: str, examples: Iterable[Example], codec: Codec, console: Console) -> None:
    """Print examples of a view: prompt, reference and trained tokens apart, BOS and EOS visible, with token counts."""
    if not console.is_terminal:
        console.print(f"marks: {LEGEND}", markup=False, highlight=False)
    for number, example in enumerate(examples):
        for name, part in example_passes(view, example, codec).items():
            start, stop = part.prompt.reference
            counts = f"{len(part.prompt.ids)} prompt tokens ({stop - start} reference), {len(part.response)} trained"
            console.print(f"--- {view} {number} | {name} | {counts}", style="bold", markup=False, highlight=False)
            shown = render(pass_spans(part, codec), colour=console.is_terminal)
            console.print(shown, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceCheck:
    """What a raw preference file holds.

    Attributes:
      read: counts of lines and records, with the bad ones.
      drops: for each view, what would be dropped and why; empty without a codec.
      groups: number of different groups.
      lengths: for prompt, chosen and rejected, the percentiles 50, 90, 99 and 100 of their length in `unit`.
      longer_wins: share of records, ties half, whose chosen reply is the longer one: what a reward model reaches by
        looking at lengths alone.
      similarity: median word-level similarity of the two replies, 0 (nothing in common) to 1 (equal).
      related: share of records with a similarity of at least 0.3.
    """

    read: ReadReport
    drops: Mapping[str, DropReport]
    groups: int
    unit: str
    lengths: Mapping[str, tuple[float, ...]]
    longer_wins: float
    similarity: float
    related: float

    def advice(self) -> list[str]:
        """Return what the figures suggest to do; empty if nothing."""
        advice = []
        if self.read.records == 0:
            return ["There is no usable record."]
        if self.related < 0.5:
            advice.append(
                f"Only {self.related:.0%} of the pairs are related (similarity of {_RELATED} or more). An improver "
                "learns from replies that correct each other; with independent replies it learns to ignore its "
                "reference. Prefer pairs whose chosen reply is an edit of the rejected one, or filter by similarity."
            )
        if abs(self.longer_wins - 0.5) > 0.1:
            word = "longer" if self.longer_wins > 0.5 else "shorter"
            share = max(self.longer_wins, 1 - self.longer_wins)
            advice.append(f"The {word} reply wins {share:.0%} of the time: compare every accuracy with that.")
        if self.read.contradictions:
            advice.append(f"{self.read.contradictions} records contradict others: no model can be right about both.")
        if self.groups < self.read.records / 10:
            advice.append(f"{self.read.records} records share {self.groups} groups: folds will be uneven.")
        for view, report in self.drops.items():
            if report.dropped.total() > 0.05 * self.read.records:
                advice.append(f"{view} {report.summary()}. Raise Lengths.targets if replies are too long.")
        return advice


def similarity(first: str, second: str) -> float:
    """Return 2 x (words in matching runs) / (words of both): 1 for equal texts, 0 without a common word."""
    return difflib.SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()


def check_preferences(
    paths: Paths, config: ReadConfig, *, codec: Codec | None, views: Sequence[str], similarity_sample: int = 2000
) -> PreferenceCheck:
    """Read preference files and measure them.

    Args:
      paths: files or globs.
      config: how they are read.
      codec: measures lengths in tokens and finds what each view would drop; without one lengths are words.
      views: names of the views whose drops are counted.
      similarity_sample: the edit similarity, which is slow, is measured on about so many records, evenly spread.
    Raises:
      DataError: as of `read_jsonl`.
    """
    report = ReadReport()
    records = list(read_jsonl(paths, config, report))
    drops = {view: _drops(view, records, codec) for view in views} if codec else {}
    lengths = {name: _lengths(records, name, codec) for name in ("prompt", "chosen", "rejected")}
    step = max(1, len(records) // similarity_sample)
    similar = np.array([similarity(record.chosen, record.rejected) for record in records[::step]])
    chosen, rejected = lengths["chosen"], lengths["rejected"]
    some = len(records) > 0
    return PreferenceCheck(
        read=report,
        drops=drops,
        groups=len({record.group for record in records}),
        unit="tokens" if codec else "words",
        lengths={
            name: tuple(float(value) for value in np.percentile(values, _PERCENTILES)) if some else ()
            for name, values in lengths.items()
        },
        longer_wins=float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected))) if some else 0.5,
        similarity=float(np.median(similar)) if some else 0.0,
        related=float(np.mean(similar >= _RELATED)) if some else 0.0,
    )


def _drops(view: str, records: Sequence[Record], codec: Codec) -> DropReport:
    report = DropReport()
    for _ in make_examples(view, records, codec, report):
        pass
    return report


def _lengths(records: Sequence[Record], field: str, codec: Codec | None) -> np.ndarray:
    texts = (
        {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}[field] for record in records
    )
    return np.array([len(codec.tokenizer.encode(text) if codec else text.split()) for text in texts], np.int64)


def show_check(check: PreferenceCheck, console: Console) -> None:
    """Print the figures of a check, the first bad lines, and the advice."""
    table = Table(title=check.read.summary(), title_justify="left")
    table.add_column("")
    for percentile in _PERCENTILES:
        table.add_column("max" if percentile == 100 else f"p{percentile}", justify="right")
    for name, values in check.lengths.items():
        table.add_row(f"{name} ({check.unit})", *(f"{value:.0f}" for value in values))
    console.print(table)
    console.print(f"groups: {check.groups}", highlight=False)
    console.print(f"longer reply wins: {check.longer_wins:.1%}", highlight=False)
    console.print(
        f"similarity of the replies: median {check.similarity:.2f}; {check.related:.0%} are related", highlight=False
    )
    for view, report in check.drops.items():
        console.print(f"{view}: {report.summary()}", highlight=False)
    for message in check.read.bad:
        console.print(f"bad: {message}", markup=False, highlight=False, soft_wrap=True)
    if check.read.bad_count > len(check.read.bad):
        console.print(f"... and {check.read.bad_count - len(check.read.bad)} more bad lines", highlight=False)
    for advice in check.advice():
        console.print(f"advice: {advice}", markup=False, highlight=False, soft_wrap=True)
