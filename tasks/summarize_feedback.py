"""OpenAI's comparisons of summaries of Reddit posts (TL;DR): a TFDS builder and the SeqIO tasks of it.

Stiennon et al., "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325. The published files
`batch<N>.json` hold one comparison a line:

    {"info": {"id", "post", "title", "subreddit"}, "summaries": [{"text", "policy", "note"}, {...}], "choice": 0 or 1,
     "worker", "batch", "split": "train" | "valid1" | "valid2", "extra": {"confidence"}}

Batches 3 to 10 were the training data of the paper's last models; the later ones, among them the only other file
of the series (22), are mostly evaluation. The comparisons of news articles (`cnndm*`) are not read. The paper selected
its models on the posts of `valid1` and reported on `valid2`: here these are the splits `validation` and `test`.

Download and prepare once:

    python -c "import tasks.summarize_feedback as t; t.SummarizeFeedback().download_and_prepare()"

On a machine without network put the files as `<manual_dir>/comparisons/batch<N>.json`. No checksums come with this
file: `tfds build tasks/summarize_feedback.py --register_checksums` records those of your download in
`tasks/checksums.tsv`, and from then on TFDS compares with them.

Tasks: `summarize_feedback_<view>`, tokenised as bytes. Recipes read the same records with their own tokenizer through
`summarize_feedback_records`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow_datasets as tfds
from etils import epath

from pit_jax.data.seqio_builders import fetch, json_lines
from pit_jax.data.seqio_tasks import register_preference_tasks

_URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
_FILES = tuple(f"batch{number}.json" for number in (*range(3, 21), 22))
_SPLITS = {"train": "train", "valid1": "validation", "valid2": "test"}
_CITATION = """@inproceedings{stiennon2020learning,
  title={Learning to summarize from human feedback},
  author={Stiennon, Nisan and others},
  booktitle={NeurIPS},
  year={2020}
}"""


class SummarizeFeedback(tfds.core.GeneratorBasedBuilder):
    """Posts with two summaries each and the number of the one that a person preferred."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The comparisons of Reddit posts as published."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Only needed without network: save the files batch<N>.json of
    https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons as
    <manual_dir>/comparisons/batch<N>.json.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        names = ("id", "post_id", "subreddit", "title", "post", "batch")
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {name: text for name in names}
                | {
                    "summaries": tfds.features.Sequence(text, length=2),
                    "policies": tfds.features.Sequence(text, length=2),
                    "choice": tfds.features.Scalar(np.int32),
                }
            ),
            homepage="https://github.com/openai/summarize-from-feedback",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = fetch(
            dl_manager,
            urls={name: f"{_URL}/{name}" for name in _FILES},
            manual={name: f"comparisons/{name}" for name in _FILES},
        )
        return {name: self._generate_examples(files, published) for published, name in _SPLITS.items()}

    def _generate_examples(self, files: Mapping[str, epath.Path], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, path in files.items():
            for number, row in enumerate(json_lines(path)):
                if row["split"] == split:
                    key = f"{name.removesuffix('.json')}/{number}"
                    yield key, {"id": key} | _fields(row)


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    info = row["info"]
    return {
        "post_id": info["id"],
        "subreddit": info.get("subreddit") or "",
        "title": info.get("title") or "",
        "post": info["post"],
        "summaries": [summary["text"] for summary in row["summaries"]],
        "policies": [summary["policy"] for summary in row["summaries"]],
        "choice": row["choice"],
        "batch": row.get("batch") or "",
    }


def to_preference(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a published comparison as a preference record; the prompt is laid out as in the paper.

    Records are grouped by post, so that no post is in two folds.
    """
    better = int(row["choice"])
    return {
        "id": row["id"],
        "group": row["post_id"],
        "prompt": f"SUBREDDIT: r/{row['subreddit']}\nTITLE: {row['title']}\nPOST: {row['post']}\nTL;DR:",
        "chosen": row["summaries"][better],
        "rejected": row["summaries"][1 - better],
    }


register_preference_tasks(
    "summarize_feedback",
    seqio.TfdsDataSource("summarize_feedback:1.0.0", splits=("train", "validation", "test")),
    convert=to_preference,
)
