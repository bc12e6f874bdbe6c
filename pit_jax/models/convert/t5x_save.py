"""From our parameters to a checkpoint that T5X can start from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from pit_jax.core.tree import size_in_bytes
from pit_jax.core.types import Params
from pit_jax.io.files import require_free
from pit_jax.io.t5x_write import write_t5x
from pit_jax.models.convert import stream, t5x_layout
from pit_jax.models.convert.t5x_config import BUCKETS, MAX_DISTANCE, spec_from_config
from pit_jax.models.convert.t5x_load import DESCRIPTION, Network


def save_t5x(
    directory: str | os.PathLike[str],
    network: Network,
    params: Params,
    *,
    step: int,
    layout: str = "orbax",
    scanned: bool = False,
) -> epath.Path:
    """Write `directory/checkpoint_STEP` for T5X, and beside the parameters a description of the network.

    There is no optimiser state in it: T5X restores it as it is for inference and evaluation; for training it needs
    `fallback_to_scratch` and an `assignment_map` that leaves out `state/param_states` (docs/t5x.md).

    Args:
      directory: of the model, on a local disk.
      network: EncoderDecoder or DecoderOnly.
      params: its parameters, on any mesh; one tensor at a time comes to the host.
      step: at which T5X goes on counting.
      layout: "orbax", T5X's default, or "legacy".
      scanned: stack the layers, as the scalable T5 does by default; only with `relative_per_layer`.

    Returns:
      The directory of the step.

    Raises:
      ConfigError: T5X has no such network; the setting is named.
      CheckpointError: the checkpoint exists already, or the disk is full or fails; nothing is left behind.
    """
    config = network.config
    spec = spec_from_config(config, scanned=scanned)
    if spec["relpos"] != {"num_buckets": BUCKETS, "max_distance": MAX_DISTANCE}:
        rule = f"be {BUCKETS}, with relative_max_distance = {MAX_DISTANCE}, for T5X"
        raise config.bad("relative_buckets", rule, "They are numbers in T5X's code. Keep it as a pit_jax checkpoint.")
    require_free(directory, size_in_bytes(params))
    variant = t5x_layout.Variant(scan_axis=1 if scanned else None, flat=spec["config"].get("scan_layers") is None)
    tensors = t5x_layout.tensors(config, variant)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for tensor, value in stream.unload(params, tensors):
            yield tensor.name, value

    return write_t5x(directory, arrays(), step=step, layout=layout, beside={DESCRIPTION: spec})
