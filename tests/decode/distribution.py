"""Samples against the probabilities of all responses there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pit_jax.core.types import Samples


def assert_distributed(samples: Samples, every: Sequence[tuple[int, ...]], exact: np.ndarray) -> None:
    """Compare how often each response comes with its probability; 5 standard errors apart is too far."""
    np.testing.assert_allclose(exact.sum(), 1.0, atol=1e-5)
    number = {row: index for index, row in enumerate(every)}
    tokens, lengths = np.asarray(samples.tokens), np.asarray(samples.mask).sum(-1)
    drawn = [number[tuple(int(t) for t in row[:n])] for row, n in zip(tokens, lengths, strict=True)]
    frequency = np.bincount(drawn, minlength=len(every)) / len(drawn)
    assert np.all(np.abs(frequency - exact) <= 5.0 * np.sqrt(exact * (1.0 - exact) / len(drawn)) + 1e-9)
