"""pit_jax trains models that improve their own answers (PIT), from preference data to a report, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pit_jax.data.seqio_tasks import register_preference_tasks
    from pit_jax.stages.pretrained import load_pretrained

__version__ = "0.1.0"

# Importing jax takes over a second, so `import pit_jax` imports nothing; names are looked up at first use (PEP 562).
_LAZY = {
    "load_pretrained": "pit_jax.stages.pretrained",
    "register_preference_tasks": "pit_jax.data.seqio_tasks",
}

__all__ = ["__version__", "load_pretrained", "register_preference_tasks"]


def __getattr__(name: str) -> Any:
    """Import the module a public name lives in, the first time it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pit_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
