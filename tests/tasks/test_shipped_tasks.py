"""The shipped task modules: TFDS builders on rows in the published form, and their SeqIO tasks."""

import gzip
import importlib
import json
import unittest

import pytest

from pit_jax.core.errors import DataError
from pit_jax.data import seqio_builders
from pit_jax.data.open import DataSpec, open_examples, open_records
from pit_jax.data.schema import parse
from pit_jax.data.seqio_runtime import seqio
from pit_jax.data.synthetic import quality
from pit_jax.data.views import VIEWS
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

tfds = pytest.importorskip("tensorflow_datasets")
import tasks.hh_rlhf as hh_rlhf  # noqa: E402
import tasks.summarize_feedback as summarize_feedback  # noqa: E402

CODEC = Codec(ByteTokenizer(), Templates(), Lengths(inputs=200, targets=80))


def dialogue(number, reply):
    return f"\n\nHuman: Question {number}?\n\nAssistant: Which one?\n\nHuman: That one.\n\nAssistant: {reply} {number}."


def write_hh(directory):
    number = 0
    for subset in ("helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled"):
        for split, count in (("train", 3), ("test", 2)):
            file = directory / subset / f"{split}.jsonl.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(file, "wt") as lines:
                for _ in range(count):
                    row = {"chosen": dialogue(number, "A good answer"), "rejected": dialogue(number, "A bad answer")}
                    lines.write(json.dumps(row) + "\n")
                    number += 1


def comparison(number, split):
    return {
        "info": {"id": f"t3_{number // 2}", "post": f"Post {number // 2}.", "title": "Title", "subreddit": "advice"},
        "summaries": [
            {"text": f" first {number}", "policy": "sup4", "note": None},
            {"text": f" second {number}", "policy": "ref", "note": "n"},
        ],
        "choice": number % 2,
        "worker": "w",
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": 8},
    }


def write_comparisons(directory):
    (directory / "comparisons").mkdir()
    for number, name in enumerate(summarize_feedback._FILES):
        rows = [comparison(2 * number, "train"), comparison(2 * number + 1, "train")]
        rows += [comparison(100 + number, "valid1")] if number < 4 else [comparison(200 + number, "valid2")]
        (directory / "comparisons" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(builder_class, directory, write, config=None):
    """Prepare a builder from its manual directory."""
    manual = directory / "manual"
    manual.mkdir()
    write(manual)
    builder = builder_class(data_dir=directory / "data", config=config)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    return builder


@pytest.fixture
def data_dir(tmp_path):
    """Let SeqIO's TFDS sources read from a directory of the test's own."""
    seqio.set_tfds_data_dir_override(str(tmp_path / "data"))
    yield tmp_path
    seqio.set_tfds_data_dir_override(None)


def hh_case(examples):
    """TFDS's own battery for builders, on rows in the published form."""

    class Case(tfds.testing.DatasetBuilderTestCase):
        DATASET_CLASS = hh_rlhf.HhRlhf
        BUILDER_CONFIG_NAMES_TO_TEST = ["base"]
        SPLITS = {"train": 6, "test": 4}
        EXAMPLE_DIR = str(examples)
        DL_DOWNLOAD_RESULT = {
            f"{subset}/{split}": f"downloads/{subset}-{split}"
            for subset in ("helpful-base", "harmless-base")
            for split in ("train", "test")
        }
        SKIP_CHECKSUMS = True

    return Case


def summary_case(examples):
    """TFDS's own battery for builders, on rows in the published form."""

    class Case(tfds.testing.DatasetBuilderTestCase):
        DATASET_CLASS = summarize_feedback.SummarizeFeedback
        SPLITS = {"train": 38, "validation": 4, "test": 15}
        EXAMPLE_DIR = str(examples)
        DL_DOWNLOAD_RESULT = {name: f"downloads/{name}" for name in summarize_feedback._FILES}
        SKIP_CHECKSUMS = True

    return Case


@pytest.mark.parametrize("make", [hh_case, summary_case])
def test_builders_pass_the_battery_of_tfds(make, tmp_path):
    # The battery takes the files for downloads: under other names than the manual directory's.
    (write_hh if make is hh_case else write_comparisons)(tmp_path)
    (tmp_path / "downloads").mkdir()
    for file in [*tmp_path.glob("*/*.gz"), *tmp_path.glob("comparisons/*")]:
        place = f"{file.parent.name}-{file.name.split('.')[0]}" if file.suffix == ".gz" else file.name
        file.rename(tmp_path / "downloads" / place)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(make(tmp_path))
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun >= 4
    assert not [text for _, text in result.errors + result.failures]


def test_hh_tasks_cut_dialogues_at_the_last_turn(data_dir):
    builder = prepared(hh_rlhf.HhRlhf, data_dir, write_hh, "all")
    assert {name: info.num_examples for name, info in builder.info.splits.items()} == {"train": 12, "test": 8}
    records = list(open_records(DataSpec(task="hh_rlhf", module="tasks.hh_rlhf"), "train"))
    assert len(records) == 12 and len({record.group for record in records}) == 12
    for record in records:
        number = int(record.chosen.split()[-1].rstrip("."))
        whole = {"chosen": dialogue(number, "A good answer"), "rejected": dialogue(number, "A bad answer")}
        assert dict(record.__dict__, id="") == dict(parse(whole).__dict__, id="")
        assert record.prompt.endswith("That one.\n\nAssistant:")
    assert len(open_examples(DataSpec(task="hh_rlhf"), view="evaluate", split="validation", codec=CODEC)) == 8


def test_summaries_become_preferences_grouped_by_post(data_dir):
    prepared(summarize_feedback.SummarizeFeedback, data_dir, write_comparisons)
    spec = DataSpec(task="summarize_feedback", module="tasks.summarize_feedback")
    counts = {split: len(list(open_records(spec, split))) for split in ("train", "validation", "test")}
    assert counts == {"train": 38, "validation": 4, "test": 15}
    for record in open_records(spec, "train"):
        number = int(record.chosen.split()[1])
        assert record.prompt == f"SUBREDDIT: r/advice\nTITLE: Title\nPOST: Post {number // 2}.\nTL;DR:"
        assert record.chosen == f"{('first', 'second')[number % 2]} {number}"
        assert record.rejected == f"{('second', 'first')[number % 2]} {number}"
        assert record.group == f"t3_{number // 2}"


def test_download_is_what_happens_without_all_manual_files(tmp_path):
    class Manager:
        manual_dir = tmp_path

        def download(self, urls):
            return {part: f"/cache/{url}" for part, url in urls.items()}

    urls, manual = {"a": "u1", "b": "u2"}, {"a": "a.gz", "b": "x/b.gz"}
    (tmp_path / "a.gz").touch()
    assert seqio_builders.fetch(Manager(), urls, manual)["b"].as_posix() == "/cache/u2"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "b.gz").touch()
    assert seqio_builders.fetch(Manager(), urls, manual)["b"] == tmp_path / "x" / "b.gz"


def test_synthetic_tasks_are_the_generators_records():
    importlib.import_module("tasks.synthetic")
    live = open_records(DataSpec(task="synthetic_easy"), "train")
    from pit_jax.data.synthetic import SyntheticConfig

    config = SyntheticConfig(difficulty="easy", num_records=200)
    direct = open_records(DataSpec(generator="pit_jax.data.synthetic:generate", config=config), "train")
    for _, one, other in zip(range(100), live, direct, strict=False):
        assert one == other
        assert 0 <= quality(one.prompt, one.rejected) <= 1


def test_jsonl_task_is_made_once_for_each_setting(tmp_path):
    jsonl = importlib.import_module("tasks.jsonl")
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{n}", "chosen": "c", "rejected": "r"}) + "\n" for n in range(60)))
    name = jsonl.task(str(file), "sft_improver", inputs=64, targets=16)
    assert jsonl.task(str(file), "sft_improver", inputs=64, targets=16) == name
    assert jsonl.task(str(file), "sft_policy", inputs=64, targets=16).removesuffix("policy") == name.removesuffix(
        "improver"
    )
    assert jsonl.task(str(file), "sft_improver", inputs=65, targets=16) != name
    with pytest.raises(DataError, match="sft_policy"):
        jsonl.task(str(file), "sft_polcy", inputs=64, targets=16)
    assert list(seqio.get_mixture_or_task(name).get_dataset(split="train", shuffle=False).as_numpy_iterator())


def test_template_registers_every_view_in_few_lines():
    template = importlib.import_module("tasks._template")
    assert {f"mine_{view}" for view in VIEWS} <= set(seqio.TaskRegistry.names())
    with open(template.__file__) as file:
        code = file.read().split('"""')[2]
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 15
