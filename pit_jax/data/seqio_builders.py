"""What the TFDS builders of `tasks/` share."""

from __future__ import annotations

import os
from collections.abc import Mapping

import tensorflow_datasets as tfds
from etils import epath


def fetch(
    dl_manager: tfds.download.DownloadManager, urls: Mapping[str, str], manual: Mapping[str, str]
) -> dict[str, epath.Path]:
    """Return the (unpacked) file of each part: from TFDS's manual directory if all are there, else downloaded.

    urls: where each part is published. manual: the path of each part below the manual directory.
    """
    paths = _manual(dl_manager, manual)
    files = dl_manager.extract(paths) if paths else dl_manager.download_and_extract(dict(urls))
    return {part: epath.Path(os.fspath(path)) for part, path in files.items()}


def _manual(dl_manager: tfds.download.DownloadManager, names: Mapping[str, str]) -> dict[str, epath.Path]:
    try:
        directory = epath.Path(dl_manager.manual_dir)
    except AssertionError:  # how TFDS says that there is no such directory
        return {}
    files = {part: directory / name for part, name in names.items()}
    return files if all(path.exists() for path in files.values()) else {}
