"""The flags that say where TFDS and SeqIO find their data."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import seqio
import tensorflow as tf

from pit_jax.cli import arguments
from pit_jax.core.errors import DataError
from pit_jax.data import seqio_live
from pit_jax.data.seqio_runtime import use_folders
from pit_jax.data.seqio_tasks import register_preference_tasks

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys
from pit_jax.cli import arguments, stages
args = arguments.parse(["pipeline", "--gin_file=recipes/jsonl.gin", "--gin.MODEL_DIR='x'", "--gin.DATA_PATH='y'"])
stages.build_recipe(args)
assert not {"tensorflow", "seqio"} & set(sys.modules)
"""


def cache(directory: pathlib.Path, task: str, count: int) -> None:
    """Write a cache of records as `seqio_cache_tasks` does."""
    place = directory / task
    place.mkdir(parents=True)
    features = seqio.get_mixture_or_task(task).output_features
    info = {"num_shards": 1, "features": {name: {"shape": [], "dtype": "string"} for name in features}}
    (place / "info.train.json").write_text(json.dumps(info))
    (place / "stats.train.json").write_text(json.dumps({"examples": count}))
    with tf.io.TFRecordWriter(str(place / "train.tfrecord-00000-of-00001")) as writer:
        for n in range(count):
            values = {name: f"cached {name} {n}" for name in features} | {"fold": ""}
            writer.write(seqio.dict_to_tfexample(values).SerializeToString())
    (place / "COMPLETED").touch()


def test_a_task_with_a_cache_is_read_from_there(tmp_path: pathlib.Path) -> None:
    register_preference_tasks("flags", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    before = list(seqio_live.records_of_task("flags_records", "train", None))
    cache(tmp_path / "caches", "flags_records", 3)
    try:
        use_folders(None, [str(tmp_path / "caches")])
        after = list(seqio_live.records_of_task("flags_records", "train", None))
    finally:
        seqio.set_global_cache_dirs([])
    assert "p" in before[0].prompt and len(before) == 1
    assert [record.prompt for record in after] == [f"cached prompt {n}" for n in range(3)]


def test_tfds_looks_where_it_is_told(tmp_path: pathlib.Path) -> None:
    try:
        use_folders(str(tmp_path), [])
        assert seqio.LazyTfdsLoader("anything/x:1.0.0").data_dir == str(tmp_path)
    finally:
        seqio.set_tfds_data_dir_override(None)


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="names .*nowhere, which is no folder"):
        use_folders(None, [str(tmp_path / "nowhere")])


def test_flags_as_t5x_has_them() -> None:
    args = arguments.parse(["sft", "--tfds_data_dir=d", "--seqio_additional_cache_dirs=a,b"])
    assert (args.tfds_data_dir, args.seqio_additional_cache_dirs) == ("d", ("a", "b"))


def test_without_them_tensorflow_is_not_imported(tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
