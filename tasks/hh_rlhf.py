"""Anthropic's human preferences about helpfulness and harmlessness: a TFDS builder and the SeqIO tasks of it.

Bai et al., "Training a Helpful and Harmless Assistant with RLHF", https://arxiv.org/abs/2204.05862 (MIT licence).
A record is two whole dialogues, `chosen` and `rejected`, which share everything up to the last assistant turn.
The dialogues were written to probe a model: some of them are offensive.

Download and prepare once (about 160,000 training records in the configuration `all`):

    python -c "import tasks.hh_rlhf as t; t.HhRlhf(config='all').download_and_prepare()"

On a machine without network put the files as `<manual_dir>/<subset>/<split>.jsonl.gz`. No checksums come with this
file: `tfds build tasks/hh_rlhf.py --register_checksums` records those of your download in `tasks/checksums.tsv`, and
from then on TFDS compares with them.

Tasks: `hh_rlhf_<view>`, with the published test split as `validation`, tokenised as bytes. Recipes read the same
records with their own tokenizer through `hh_rlhf_records`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow_datasets as tfds
from etils import epath

from pit_jax.data.seqio_builders import fetch, json_lines
from pit_jax.data.seqio_tasks import register_preference_tasks

_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
_SUBSETS = ("helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled")
_CITATION = """@article{bai2022training,
  title={Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback},
  author={Bai, Yuntao and others},
  journal={arXiv preprint arXiv:2204.05862},
  year={2022}
}"""


class HhRlhf(tfds.core.GeneratorBasedBuilder):
    """Pairs of dialogues that differ in the assistant's last turn."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files as published."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="all", description="All four subsets."),
        tfds.core.BuilderConfig(name="base", description="The subsets helpful-base and harmless-base."),
        *(tfds.core.BuilderConfig(name=name.replace("-", "_"), description=f"Only {name}.") for name in _SUBSETS),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Only needed without network: save https://huggingface.co/datasets/Anthropic/hh-rlhf as
    <manual_dir>/<subset>/<split>.jsonl.gz.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"id": text, "subset": text, "chosen": text, "rejected": text}),
            homepage="https://huggingface.co/datasets/Anthropic/hh-rlhf",
            citation=_CITATION,
        )

    def _subsets(self) -> list[str]:
        name = self.builder_config.name if self.builder_config else "all"
        return list({"all": _SUBSETS, "base": _SUBSETS[:2]}.get(name, (name.replace("_", "-"),)))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        parts = {f"{subset}/{split}": (subset, split) for split in ("train", "test") for subset in self._subsets()}
        files = fetch(
            dl_manager,
            urls={part: f"{_URL}/{part}.jsonl.gz" for part in parts},
            manual={part: f"{part}.jsonl.gz" for part in parts},
        )
        return {
            split: self._generate_examples({part: files[part] for part in parts if parts[part][1] == split})
            for split in ("train", "test")
        }

    def _generate_examples(self, files: dict[str, epath.Path]) -> Iterator[tuple[str, dict[str, str]]]:
        for part, path in files.items():
            for number, row in enumerate(json_lines(path)):
                key = f"{part}/{number}"
                yield key, {"id": key, "subset": part.split("/")[0]} | {k: row[k] for k in ("chosen", "rejected")}


register_preference_tasks(
    "hh_rlhf", seqio.TfdsDataSource("hh_rlhf/all:1.0.0", splits={"train": "train", "validation": "test"})
)
