"""Maximum likelihood of log-linear models of outcomes, many weighted samples at once.

Bradley-Terry, Davidson's ties and the length-controlled win rate are all of this kind, and their bootstrap fits the
same model to thousands of weightings of the same rows.
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float

from pit_jax.core.errors import DataError

_STEPS = 200
# Newton squares the distance at each step: after one this small, what is left is below rounding.
_TOLERANCE = 1e-6
# Numbers of a block of samples that are held in memory at once.
_BLOCK = 4_000_000


def fit(
    features: Float[np.ndarray, "n k p"], counts: Float[np.ndarray, "draws n k"], *, ridge: float
) -> Float[np.ndarray, "draws p"]:
    """Return the parameters that make the counted outcomes most likely.

        P(k | n) = softmax_k(features[n, k] . theta)
        maximise  sum_nk counts[n, k] log P(k | n) - ridge / 2 |theta|^2

    by Newton's method, halving a step until it does not make things worse: the function is concave.

    Args:
      features: of each outcome k of each row n.
      counts: how often each outcome was seen, fractions allowed, for each sample.
      ridge: of the penalty; above 0 the maximum always exists.

    Raises:
      DataError: the parameters are not determined by the counts and ridge is 0.
    """
    rows, kinds, size = features.shape
    model = _Model(features, ridge)
    block = max(1, _BLOCK // max(rows * kinds, size * size))
    starts = range(0, len(counts), block)
    # Outcomes before rows: sums over a few outcomes are then sums of long, contiguous lines.
    return np.concatenate([model.fit(counts[i : i + block].transpose(0, 2, 1).copy()) for i in starts])


class _Model:
    """Features of all rows, laid out for products of matrices."""

    def __init__(self, features: Float[np.ndarray, "n k p"], ridge: float) -> None:
        rows, self.kinds, self.size = features.shape
        self.flat = features.transpose(1, 0, 2).reshape(self.kinds * rows, self.size)
        self.ridge = ridge
        self.pairs = list(itertools.combinations(range(self.kinds), 2))
        differences = [features[:, k] - features[:, m] for k, m in self.pairs]
        self.squares = [(d[:, :, None] * d[:, None, :]).reshape(rows, self.size**2) for d in differences]

    def fit(self, counts: Float[np.ndarray, "draws k n"]) -> Float[np.ndarray, "draws p"]:
        theta = np.zeros((len(counts), self.size))
        value, log_p = self.log_likelihood(counts, theta)
        trials = counts.sum(axis=(1, 2))
        for _ in range(_STEPS):
            slope, curvature = self.derivatives(counts, log_p, theta)
            try:
                step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
            except np.linalg.LinAlgError as error:
                raise DataError("A log-linear model is not determined by its data. Set a ridge above 0.") from error
            if np.abs(step).max() < _TOLERANCE:
                return theta + step
            # Rounding moves the value by less than this where a step changes nothing.
            least = value - 1e-12 * (np.abs(value) + trials)
            while ((found := self.log_likelihood(counts, theta + step))[0] < least).any():
                step = np.where((found[0] < least)[:, None], step / 2, step)
            theta, (value, log_p) = theta + step, found
        raise DataError(f"A log-linear model has no finite maximum ({_STEPS} steps). Set a ridge above 0.")

    def log_likelihood(
        self, counts: Float[np.ndarray, "draws k n"], theta: Float[np.ndarray, "draws p"]
    ) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, "draws k n"]]:
        """Return the penalised log-likelihood, and the log-probability of each outcome."""
        logits = (theta @ self.flat.T).reshape(counts.shape)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return np.sum(counts * log_p, axis=(1, 2)) - self.ridge / 2 * np.sum(theta**2, axis=1), log_p

    def derivatives(
        self,
        counts: Float[np.ndarray, "draws k n"],
        log_p: Float[np.ndarray, "draws k n"],
        theta: Float[np.ndarray, "draws p"],
    ) -> tuple[Float[np.ndarray, "draws p"], Float[np.ndarray, "draws p p"]]:
        """Return the gradient, and minus the matrix of second derivatives.

        A row's covariance of features is sum_{k < m} p_k p_m (f_k - f_m)(f_k - f_m)', which is a product of matrices.
        """
        p = np.exp(log_p)
        trials = counts.sum(axis=1)
        slope = (counts - trials[:, None] * p).reshape(len(counts), -1) @ self.flat - self.ridge * theta
        curvature = np.zeros((len(counts), self.size**2))
        for (k, m), square in zip(self.pairs, self.squares, strict=True):
            curvature += (trials * p[:, k] * p[:, m]) @ square
        return slope, curvature.reshape(-1, self.size, self.size) + self.ridge * np.eye(self.size)
