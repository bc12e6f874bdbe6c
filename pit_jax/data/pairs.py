"""Preference pairs that a stage of a run has written: a file of its directory, checked to the last line."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from etils import epath

from pit_jax.core.errors import DataError
from pit_jax.data.readers import ReadConfig, ReadReport, read_jsonl
from pit_jax.data.schema import Record, content_hash
from pit_jax.data.views import DropReport, Example, make_examples
from pit_jax.text.codec import Codec

PAIRS = "pairs.jsonl"
"""Name of the file: objects {"prompt", "chosen", "rejected"} of texts, one a line; `group` and `id` are optional."""
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitPairs:
    """Examples {prompt, chosen, rejected} of a file of pairs, no prompt's group in both parts."""

    train: Sequence[Example]
    held_out: Sequence[Example]


def read_pairs(path: epath.Path) -> list[Record]:
    """Return the pairs of a file, in order; texts are taken as models read them, without a chat template.

    Raises:
      DataError: the file is missing, empty or damaged, or a line is no pair; line and field are named.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file. Name a stage that writes {PAIRS}, and run it first.")
    # All lines are read, so that the error can say how many are bad; none is left out.
    report = ReadReport()
    records = list(read_jsonl(path, ReadConfig(on_bad_record="skip"), report))
    if report.bad_count:
        more = f" ({report.bad_count - 1} more lines are bad.)" if report.bad_count > 1 else ""
        raise DataError(f"{report.bad[0]}{more} Mend the file, or delete its stage's directory to make it anew.")
    if not records:
        raise DataError(f"{path}: there is no pair in it. See the report of the stage that wrote it for why.")
    return records


def split_pairs(path: epath.Path, codec: Codec, *, held_out: float) -> SplitPairs:
    """Return the examples of a file of pairs, and of those the share `held_out` of the prompts' groups, at least one.

    Groups are taken in the order of their hashes, so the same file is always cut alike. A pair whose replies are too
    long for the codec, or equal as tokens, is dropped and counted in the log.

    Raises:
      DataError: a line is bad, or the pairs left are of less than two groups.
    """
    report = DropReport()
    kept: list[tuple[str, Example]] = []
    for record in read_pairs(path):
        kept += [(record.group, example) for example in make_examples("evaluate", [record], codec, report)]
    _LOG.info("%s: %s", path, report.summary())
    groups = sorted({group for group, _ in kept}, key=content_hash)
    if len(groups) < 2:
        raise DataError(
            f"{path} has usable pairs of {len(groups)} prompts ({report.summary()}), and needs 2: one is held out. "
            "Make more pairs, or raise TASK_FEATURE_LENGTHS if replies are too long."
        )
    count = min(max(1, math.floor(held_out * len(groups))), len(groups) - 1)
    apart = set(groups[:count])
    return SplitPairs(
        train=[example for group, example in kept if group not in apart],
        held_out=[example for group, example in kept if group in apart],
    )
