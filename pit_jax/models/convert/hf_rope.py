"""Rotary positions in a `config.json`: `rope_parameters` of transformers 5; `rope_theta` and `rope_scaling` of 4."""

from __future__ import annotations

import math

from pit_jax.models.config import RopeScaling
from pit_jax.models.convert.hf_fields import Fields

_KINDS = ("default", "linear", "llama3", "yarn")


def rotary(fields: Fields, default_base: float) -> tuple[float, RopeScaling | None]:
    """Return base and scaling of a model whose layers all have the same.

    Raises:
      ConfigError: the scaling is of a kind that is not implemented, or a field of it is unknown.
    """
    outer = fields.number("rope_theta", default_base)
    new, old = fields.table("rope_parameters"), fields.table("rope_scaling")
    table = old or new
    if table is None:
        return outer, None
    base, scaling = _read(table, fields, outer)
    if old is not None and new is not None:
        # Where both are there transformers goes by the older one; the base may be in either.
        base = new.number("rope_theta", base)
    return base, scaling


def rotary_by_layer(
    fields: Fields, default_base: float, default_local: float
) -> tuple[float, RopeScaling | None, float]:
    """Return base and scaling of layers that see everything, and the base of windowed ones (Gemma 3).

    Raises:
      ConfigError: as `rotary`, or windowed layers are scaled too.
    """
    outer = fields.number("rope_theta", default_base)
    local = fields.number("rope_local_base_freq", default_local)
    base, scaling = outer, None
    parts, old = fields.table("rope_parameters"), fields.table("rope_scaling")
    if parts is not None:
        full, near = parts.table("full_attention"), parts.table("sliding_attention")
        parts.finish()
        if full is not None:
            base, scaling = _read(full, fields, outer)
        if near is not None:
            local, scaled = _read(near, fields, local)
            if scaled is not None:
                raise near.bad("rope_type", "be default", "Scaling of windowed layers is not implemented.")
    if old is not None:
        base, scaling = _read(old, fields, base)
    return base, scaling, local


def _read(table: Fields, fields: Fields, outer: float) -> tuple[float, RopeScaling | None]:
    """Return base and scaling of one table of parameters."""
    base = table.number("rope_theta", outer)
    name = "rope_type" if "rope_type" in table else "type"
    kind = table.choice(name, {kind: kind for kind in _KINDS}, "default")
    table.take("type", None)
    scaling = None if kind == "default" else _scaling(table, kind, fields)
    table.finish()
    return base, scaling


def _scaling(table: Fields, kind: str, fields: Fields) -> RopeScaling:
    original = table.integer("original_max_position_embeddings", None)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=table.number("factor"))
    if original is None:
        original = fields.integer("max_position_embeddings")
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=table.number("factor"),
            low_freq_factor=table.number("low_freq_factor"),
            high_freq_factor=table.number("high_freq_factor"),
            original_max_positions=original,
        )
    table.expect("truncate", True, None)
    factor = table.number("factor", None)
    if factor is None:
        factor = fields.integer("max_position_embeddings") / original
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        attention_factor=_attention_factor(table, factor),
    )


def _attention_factor(table: Fields, factor: float) -> float | None:
    """Return the factor on attention that the table gives in either form (None: YaRN's own rule)."""
    given = table.number("attention_factor", None)
    above, below = table.number("mscale", None), table.number("mscale_all_dim", None)
    if given is not None or not above or not below:
        return given
    log = 0.1 * math.log(max(factor, 1.0))
    return (above * log + 1) / (below * log + 1)
