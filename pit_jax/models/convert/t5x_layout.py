"""Where T5X keeps each parameter: names, shapes and axes of its three networks, with layers apart or stacked.

T5                decoder/layers_3/mlp/wi_0/kernel (D, F); attention kernels (D, H E) and (H E, D)
scalable T5       the same with (D, H, E), (H, E, D), and a relative bias in every layer
scalable, scanned decoder/decoder/mlp/wi_0/kernel (D, N, F): all layers of a stack along one axis
decoder-only      as T5, with everything below decoder/
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from pit_jax.models.convert.layout import Tensor
from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoderConfig

T5Config = EncoderDecoderConfig | DecoderOnlyConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a checkpoint lays out layers.

    scan_axis: the axis along which the layers of a stack lie, None where each has tensors of its own.
    flat: heads and their width are one axis of attention kernels.
    """

    scan_axis: int | None
    flat: bool


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One parameter of a layer: T5X's name, ours, our shape, and the order of T5X's axes that gives ours."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    flat: tuple[int, ...]
    order: tuple[int, ...]


def tensors(config: T5Config, variant: Variant) -> list[Tensor]:
    """Return all parameters of a network as T5X stores them."""
    return list(_tensors(config, variant))


def variant_of(config: T5Config, shapes: Mapping[str, tuple[int, ...]]) -> Variant:
    """Return the variant that the names and shapes in a checkpoint are of."""
    scale = shapes.get("decoder/decoder/pre_mlp_layer_norm/scale")
    if scale is not None:
        first = isinstance(config, EncoderDecoderConfig) and scale == (config.decoder_layers, config.width)
        # Width = layers leaves the axis open; T5X's default is 1.
        return Variant(scan_axis=0 if first and scale[0] != scale[1] else 1, flat=False)
    query = shapes.get("decoder/layers_0/self_attention/query/kernel", ())
    return Variant(scan_axis=None, flat=len(query) != 3)


def _tensors(config: T5Config, variant: Variant) -> Iterator[Tensor]:
    vocab, width = config.vocab_size, config.width
    if isinstance(config, DecoderOnlyConfig):
        yield _whole("decoder/token_embedder/embedding", "embedding/token", (vocab, width))
        yield from _stack(config, variant, "decoder", "", config.layers)
    else:
        yield _whole("token_embedder/embedding", "embedding/token", (vocab, width))
        yield from _stack(config, variant, "encoder", "encoder/", config.encoder_layers)
        yield from _stack(config, variant, "decoder", "decoder/", config.decoder_layers)
    if not config.tied:
        yield _whole("decoder/logits_dense/kernel", "head", (width, vocab))


def _stack(config: T5Config, variant: Variant, theirs: str, ours: str, layers: int) -> Iterator[Tensor]:
    """Yield the tensors of one stack of layers."""
    bias = _relative_bias(config)
    if isinstance(config, EncoderDecoderConfig) and config.relative_per_layer:
        weights = [*_weights(config, theirs, cross=theirs == "decoder"), bias]
    else:
        weights = _weights(config, theirs, cross=theirs == "decoder" and ours != "")
        yield Tensor(
            name=f"{theirs}/{bias.theirs}", path=f"{ours}{bias.ours}", shape=bias.flat, split=bias.flat, order=(1, 0)
        )
    for weight in weights:
        path = f"{ours}layers/{weight.ours}"
        if variant.scan_axis is not None:
            yield _scanned(weight, f"{theirs}/{theirs}/{weight.theirs}", path, layers, variant.scan_axis)
            continue
        for layer in range(layers):
            yield Tensor(
                name=f"{theirs}/layers_{layer}/{weight.theirs}",
                path=path,
                shape=weight.flat if variant.flat else weight.shape,
                split=weight.shape,
                order=weight.order,
                layer=layer,
            )
    yield _whole(f"{theirs}/{theirs}_norm/scale", f"{ours}final_norm/scale", (config.width,))


def _scanned(weight: _Weight, name: str, path: str, layers: int, axis: int) -> Tensor:
    shape = (*weight.shape[:axis], layers, *weight.shape[axis:])
    order = (axis, *(old + (old >= axis) for old in weight.order))
    return Tensor(name=name, path=path, shape=shape, split=shape, order=order)


def _weights(config: T5Config, stack: str, *, cross: bool) -> list[_Weight]:
    """Return the parameters of one layer but the relative bias."""
    width, mlp = config.width, config.mlp
    kind = "attention" if stack == "encoder" else "self_attention"
    found = [_norm(f"pre_{kind}_layer_norm", "attention_norms", width), *_attention(config, kind, "attention")]
    if cross:
        found.append(_norm("pre_cross_attention_layer_norm", "cross_norms", width))
        found += _attention(config, "encoder_decoder_attention", "cross")
    found.append(_norm("pre_mlp_layer_norm", "mlp_norms", width))
    inputs = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    found += [_plain(f"mlp/{theirs}/kernel", f"mlp/{ours}/kernel", (width, mlp)) for theirs, ours in inputs.items()]
    return [*found, _plain("mlp/wo/kernel", "mlp/down/kernel", (mlp, width))]


def _attention(config: T5Config, theirs: str, ours: str) -> list[_Weight]:
    shape = (config.width, config.heads, config.head_dim)
    inner = math.prod(shape[1:])
    found = [
        _Weight(f"{theirs}/{name}/kernel", f"{ours}/{name}/kernel", shape, (config.width, inner), (0, 1, 2))
        for name in ("query", "key", "value")
    ]
    out = (*shape[1:], config.width)
    return [*found, _Weight(f"{theirs}/out/kernel", f"{ours}/out/kernel", out, (inner, config.width), (0, 1, 2))]


def _relative_bias(config: T5Config) -> _Weight:
    shape = (config.heads, config.relative_buckets)
    return _Weight("relpos_bias/rel_embedding", "relative_bias/table", shape, shape, (1, 0))


def _norm(theirs: str, ours: str, width: int) -> _Weight:
    return _plain(f"{theirs}/scale", f"{ours}/before/scale", (width,))


def _plain(theirs: str, ours: str, shape: tuple[int, ...]) -> _Weight:
    return _Weight(theirs, ours, shape, shape, tuple(range(len(shape))))


def _whole(name: str, path: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name=name, path=path, shape=shape, split=shape, order=tuple(range(len(shape))))
