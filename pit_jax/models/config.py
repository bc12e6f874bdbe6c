"""What the configs of both model families share."""

from __future__ import annotations

import dataclasses

from pit_jax.core.errors import ConfigError, invalid, nearest

ACTIVATIONS = ("silu", "gelu_tanh", "relu")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots", "dots_with_no_batch_dims")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields of every language model; frozen and hashable, so that equal configs share compiled programs.

    vocab_size, width, heads, head_dim, mlp: V, D, H, E, F.
    activation: of the feed-forward layer; `gated` multiplies it by a second projection.
    norm_eps: added to the mean square in RMS norms.
    role_embedding: add a learned vector for the role of each token: prompt, reference or response.
    tied: the output matrix is the embedding, transposed.
    dropout: probability of dropping an entry of the embeddings and of each sublayer's output in training.
    dtype: of activations and matrix products; softmax, norms and log-probabilities are float32 always.
    param_dtype: of the parameters.
    remat: what the backward pass computes again: none, full (all but the layers' inputs), dots (all but
      matrix products) or dots_with_no_batch_dims (all but products with parameters).
    scan_layers: one compiled layer in a loop (compiles fast) or unrolled (runs faster on CPU).
    logprob_chunk: vocabulary entries of which float32 logits exist at once in training.
    """

    vocab_size: int
    width: int
    heads: int
    head_dim: int
    mlp: int
    activation: str = "silu"
    gated: bool = True
    norm_eps: float = 1e-6
    role_embedding: bool = False
    tied: bool = True
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    logprob_chunk: int = 8192

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          ConfigError: a field is out of range, or not one of its possible values.
        """
        for name in ("vocab_size", "width", "heads", "head_dim", "mlp", "logprob_chunk"):
            self.check_at_least(name, 1)
        self._check_choice("activation", ACTIVATIONS)
        self._check_choice("dtype", DTYPES)
        self._check_choice("param_dtype", DTYPES)
        self._check_choice("remat", REMAT_POLICIES)
        if not self.norm_eps > 0:
            raise self.bad("norm_eps", "be positive", "1e-6 is usual.")
        if not 0 <= self.dropout < 1:
            raise self.bad("dropout", "lie in [0, 1)", "Use 0 to switch it off.")

    def check_at_least(self, name: str, least: int) -> None:
        """Raise ConfigError if an integer field is smaller than `least`."""
        if vars(self)[name] < least:
            raise self.bad(name, f"be at least {least}", "Give a larger number.")

    def bad(self, name: str, rule: str, fix: str) -> ConfigError:
        """Return the error for one of this config's fields."""
        return invalid(f"{type(self).__name__}.{name}", vars(self)[name], rule, fix)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = vars(self)[name]
        if value not in choices:
            raise self.bad(name, f"be one of {', '.join(choices)}", f"Use one of them.{nearest(value, choices)}")
