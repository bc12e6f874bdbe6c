"""Sizes of models by name, without any framework: our programs and those of other projects read the same ones."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings.

    compute: dtype of activations and matrix products; parameters in training are float32.
    preset: name of the same size in `pit_jax.models.presets`, None where it has none.
    """

    name: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    compute: str
    rope_base: float = 500_000.0
    norm_eps: float = 1e-5
    preset: str | None = None

    @property
    def layer_weights(self) -> int:
        """Entries of all matrices of all layers: 2 D H E + 2 D K E + 3 D F each."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def head_weights(self) -> int:
        """Entries V D of the output matrix, which is the embedding."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters, norms included."""
        return self.layer_weights + self.head_weights + (2 * self.layers + 1) * self.width

    @property
    def cache_entries(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def itemsize(self) -> int:
        """Bytes of a number as it is computed with."""
        return {"float32": 4, "bfloat16": 2}[self.compute]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny", vocabulary=512, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, compute="float32"
        ),
        Shape(
            name="nano", vocabulary=8192, width=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp=1024,
            compute="float32",
        ),
        Shape(
            name="125m", vocabulary=50_304, width=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp=2048,
            compute="bfloat16",
        ),
        Shape(
            name="llama-3.2-1b", vocabulary=128_256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192,
            compute="bfloat16", preset="llama-3.2-1b",
        ),
    )
}  # fmt: skip
