"""The modules here import torch: they are collected only where `-m` asks for parity."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave everything out without `-m parity`, so that other runs need no torch and do not pay for its import."""
    marks = config.getoption("-m")
    return None if "parity" in marks and "not parity" not in marks else True
