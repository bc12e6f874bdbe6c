"""Names on the Hugging Face hub where a path could stand."""

from __future__ import annotations

import os
import re

from etils import epath

from pit_jax.core.errors import CheckpointError

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "*.txt")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(place: str) -> bool:
    """Return whether a text could be `organisation/model`, and is no path of this machine."""
    return _NAME.fullmatch(place) is not None and not place.startswith(".") and not epath.Path(place).exists()


def locate(place: epath.PathLike) -> epath.Path:
    """Return a path as it is, or the directory into which the files of a hub name were got.

    Raises:
      CheckpointError: there is no such path, and no such model can be got from the hub.
    """
    name = os.fspath(place)
    path = epath.Path(name)
    if path.exists():
        return path
    if not is_hub_name(name):
        raise CheckpointError(f"{name} does not exist. Check the path.")
    try:
        import huggingface_hub  # noqa: PLC0415 (slow, and needed only here)
    except ImportError:
        raise CheckpointError(
            f"There is no directory {name}, and without the package huggingface_hub nothing can be got from the hub. "
            "Install it, or copy the files here."
        ) from None
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"There is no directory {name}, and the Hugging Face hub gives no such model: {reason} "
            "Check the name and the network, or copy the files here."
        ) from error
