"""Which of a network's parameters are trained: all of them, or its adapters and its head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from pit_jax.core.types import Params
from pit_jax.models import lora
from pit_jax.models.api import ConditionalLM
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.sharding import rules

Network = ConditionalLM | ScalarModel | ValueModel


def has_head(network: Network) -> bool:
    """Return whether a network is a language model with a scalar head: its parameters are then trunk and head."""
    return isinstance(network, ScalarModel | ValueModel)


def language_model_of(network: Network) -> ConditionalLM:
    """Return the language model inside a network."""
    return network.lm if isinstance(network, ScalarModel | ValueModel) else network


def reconfigured(network: Network, **fields: Any) -> Network:
    """Return a network with some fields of its language model's config replaced.

    Raises:
      ConfigError: a value is out of range.
    """
    if isinstance(network, ScalarModel | ValueModel):
        return dataclasses.replace(network, lm=reconfigured(network.lm, **fields))
    # Every language model is made of its config alone.
    return type(network)(dataclasses.replace(network.config, **fields))  # pyright: ignore[reportCallIssue]


def abstract_params(network: Network, mesh: Mesh | None) -> Params:
    """Return shapes of a network's parameters, cut over `mesh` by the rules in force (None: the default device)."""
    shapes = network.abstract()
    if mesh is None:
        return shapes
    shardings = rules.specs(network.axes(), shapes, rules.in_force(), mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def divide(network: Network, params: Params) -> tuple[Params | None, Params]:
    """Return (frozen, trained) parts of a network's parameters, or of a tree of the same shape.

    Without adapters everything is trained and the first part is None. With them the trunk's base is frozen; the
    adapters and a scalar head are trained. `lora.join(frozen, trained)` is the whole again; nothing is copied.
    """
    if language_model_of(network).config.lora is None:
        return None, params
    if not has_head(network):
        return lora.split(params)
    base, adapters = lora.split(params["trunk"])
    return {"trunk": base}, {"trunk": adapters, "head": params["head"]}


def whole(frozen: Params | None, trained: Params) -> Params:
    """Return the parameters that `divide` took apart."""
    return trained if frozen is None else lora.join(frozen, trained)
