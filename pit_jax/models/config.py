"""What the configs of both model families share."""

from __future__ import annotations

import dataclasses

from pit_jax.core.errors import ConfigError, invalid, nearest
from pit_jax.models.lora import TARGETS, Lora
from pit_jax.ops.rotary import RopeScaling as RopeScaling

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots", "dots_with_no_batch_dims")
QUANTISED = ("int8",)
CACHE_DTYPES = ("int8",)
ATTENTION_FORMS = ("auto", "xla", "splash", "cudnn")

HOW_IT_RUNS = frozenset(
    {"dropout", "dtype", "param_dtype", "remat", "scan_layers", "logprob_chunk", "attention", "cache_dtype"}
)
"""Fields that say how a network is computed or trained, not which function it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields of every language model; frozen and hashable, so that equal configs share compiled programs.

    vocab_size, width, heads, head_dim, mlp: V, D, H, E, F.
    activation: of the feed-forward layer (gelu_tanh: the usual approximation, gelu: the exact form); `gated`
      multiplies it by a second projection.
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
    attention: "splash" (TPU) and "cudnn" (GPU) are flash kernels, whose memory is linear in the length; "xla" runs
      everywhere; "auto" is the kernel of the platform. What a kernel cannot do, relative position biases say, and
      decoding token by token are XLA's in any case (`models/attending.py`).
    cache_dtype: "int8" holds keys and values in decoding so, with a scale for each head and position; by default they
      have the dtype of activations. Log-probabilities of samples are then not quite those of training.
    lora: low-rank adapters of linear maps; their matrices are parameters beside the kernels.
    quantised: "int8" stores the frozen kernels of attention and feed-forward layers so, with a scale per output
      channel; only with `lora`.
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
    attention: str = "auto"
    cache_dtype: str | None = None
    lora: Lora | None = None
    quantised: str | None = None

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
        self._check_choice("attention", ATTENTION_FORMS)
        if self.cache_dtype is not None:
            self._check_choice("cache_dtype", CACHE_DTYPES)
        if not self.norm_eps > 0:
            raise self.bad("norm_eps", "be positive", "1e-6 is usual.")
        if not 0 <= self.dropout < 1:
            raise self.bad("dropout", "lie in [0, 1)", "Use 0 to switch it off.")
        if self.lora is not None and not any(self.adapts(name) for name in TARGETS):
            rule = "target a linear map of this model (gate: only with `gated`, head: only without `tied`)"
            raise invalid(f"{type(self).__name__}.lora.targets", self.lora.targets, rule, "Name one that it has.")
        if self.quantised is not None:
            self._check_choice("quantised", QUANTISED)
            if self.lora is None:
                raise self.bad("quantised", "be None without lora", "Only a base that is not trained can be quantised.")

    @property
    def prompt_width(self) -> int:
        """Width of the final states of prompts: D, except where an encoder has a width of its own."""
        return self.width

    def adapts(self, name: str) -> bool:
        """Return whether the linear map of this name, one of `lora.TARGETS`, is there and has an adapter."""
        there = {"gate": self.gated, "head": not self.tied}.get(name, True)
        return there and self.lora is not None and name in self.lora.targets

    def quantises(self, name: str) -> bool:
        """Return whether the kernel of the linear map of this name, one of `lora.TARGETS`, is stored as integers."""
        return self.quantised is not None and name != "head"

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
