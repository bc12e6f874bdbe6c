"""A nano run of bytes, made in seconds, for the tests of the server."""

from __future__ import annotations

import pathlib

from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.testing.byte_run import VOCABULARY, byte_run
from pit_jax.text.codec import Lengths

INPUTS, TARGETS = 160, 96


def make_run(directory: pathlib.Path) -> pathlib.Path:
    """Train a policy, an improver and a gap model for a step each."""
    model = DecoderOnlyConfig(
        vocab_size=VOCABULARY, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32, role_embedding=True
    )
    return byte_run(directory, model, Lengths(inputs=INPUTS, targets=TARGETS), learning_rate=1e-3)
