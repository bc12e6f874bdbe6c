"""What the TFDS builders of `tasks/` share."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

_GZIP = b"\x1f\x8b"


def fetch(
    dl_manager: tfds.download.DownloadManager, urls: Mapping[str, str], manual: Mapping[str, str]
) -> dict[str, epath.Path]:
    """Return the file of each part: from TFDS's manual directory if all are there, else downloaded.

    They are not unpacked: TFDS unpacks files of one name (`train.jsonl.gz` of two subsets) into one place.

    Args:
      dl_manager: TFDS's.
      urls: where each part is published.
      manual: the path of each part below the manual directory.
    """
    files = _manual(dl_manager, manual) or dl_manager.download(dict(urls))
    return {part: epath.Path(os.fspath(path)) for part, path in files.items()}


def json_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, plain or gzip (downloads lose their names' endings)."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(path.open("rb"))
        packed = stream.read(len(_GZIP)) == _GZIP
        stream.seek(0)
        yield from map(json.loads, stack.enter_context(gzip.open(stream)) if packed else stream)


def _manual(dl_manager: tfds.download.DownloadManager, names: Mapping[str, str]) -> dict[str, epath.Path]:
    try:
        directory = epath.Path(dl_manager.manual_dir)
    except AssertionError:  # how TFDS says that there is no such directory
        return {}
    files = {part: directory / name for part, name in names.items()}
    return files if all(path.exists() for path in files.values()) else {}
