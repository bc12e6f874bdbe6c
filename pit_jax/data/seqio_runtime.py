"""The one place that imports TensorFlow and SeqIO: quietly, and without letting them take the accelerators."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

from pit_jax.core.errors import DataError, PitError


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep what native code writes to standard error to itself, unless an exception makes it worth reading.

    TensorFlow logs before its logging has started, which no setting of it silences.
    """
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _without_chatter():
    import seqio
    import tensorflow as tf

    # TensorFlow only reads data here; the devices and their memory belong to JAX. Once TensorFlow has started (because
    # the program used it before), the setting can no longer be changed, and is no longer ours to change.
    for _kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], _kind)

__all__ = ["marked", "seqio", "tf", "unmarked", "use_folders"]


def use_folders(tfds_data_dir: str | None, cache_dirs: Sequence[str]) -> None:
    """Say where TFDS keeps its data sets (None: as it was), and where else SeqIO may find caches of tasks.

    Raises:
      DataError: there is no such folder for caches.
    """
    missing = [folder for folder in cache_dirs if not tf.io.gfile.isdir(folder)]
    if missing:
        raise DataError(f"--seqio_additional_cache_dirs names {missing[0]}, which is no folder. Correct the path.")
    if tfds_data_dir is not None:
        seqio.set_tfds_data_dir_override(tfds_data_dir)
    seqio.add_global_cache_dirs(cache_dirs)


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Mark the text of an error that Python code raises inside of a `tf.data` pipeline, of which only text survives."""
    try:
        yield
    except PitError as error:
        raise RuntimeError(f"<pit_jax>{error}</pit_jax>") from error


@contextlib.contextmanager
def unmarked() -> Iterator[None]:
    """Around the reading of a dataset: raise a marked error as what it was, without TensorFlow's wrapping."""
    try:
        yield
    except tf.errors.OpError as error:
        found = re.search(r"<pit_jax>(.*?)</pit_jax>", error.message, re.DOTALL)
        if found is None:
            raise
        raise DataError(found[1]) from None
