"""Object storage: everything but Orbax's own files goes through epath; here against a bucket in memory."""

from __future__ import annotations

import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem

from pit_jax.core.errors import CheckpointError
from pit_jax.io import files
from pit_jax.io.checkpoint import Checkpoints
from pit_jax.io.lock import LOCK, Lock
from pit_jax.io.writers import MetricWriter, read_metrics


class Bucket(MemoryFileSystem):
    """A file system in memory that answers to gs://."""

    store: dict = {}
    pseudo_dirs: list = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)  # else TensorFlow opens gs://
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket())
    return epath.Path("gs://bucket/runs/a")


def test_small_files(bucket):
    assert not files.is_local(bucket) and files.free_bytes(bucket) is None
    files.write_json(bucket / "deep" / "x.json", {"a": 1})
    files.write_json(bucket / "deep" / "x.json", {"a": 2})
    assert files.read_json(bucket / "deep" / "x.json") == {"a": 2}
    assert [entry.name for entry in (bucket / "deep").iterdir()] == ["x.json"]


def test_metrics_survive_a_restart(bucket):
    writer = MetricWriter(bucket, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": 1.0 / step})
    writer.close()
    again = MetricWriter(bucket, tensorboard=False)
    again.truncate_after(2)
    again.write(3, "train", {"loss": 7.0})
    again.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(bucket / "metrics.jsonl")] == [
        (1, 1.0), (2, 0.5), (3, 7.0)
    ]  # fmt: skip


def test_the_lock(bucket):
    lock = Lock(bucket, beat=0.05, stale=0.5)
    lock.acquire()
    with pytest.raises(CheckpointError, match="gs://bucket/runs/a is in use by process"):
        Lock(bucket, beat=0.05, stale=0.5).acquire()
    lock.check()
    lock.release()
    assert not (bucket / LOCK).exists()


def test_a_checkpoint_without_the_mark_of_completion_is_none(bucket):
    checkpoints = Checkpoints(bucket, keep=1)
    names = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "commit_success.txt")
    for step, present in ((3, names), (5, names), (7, names[:-1])):
        for name in present:
            path = checkpoints.path(step) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    assert checkpoints.steps() == [3, 5] and checkpoints.latest() == 5
    checkpoints._prune(1)
    assert checkpoints._all_steps() == [5, 7]
