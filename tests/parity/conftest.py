"""The modules here import torch: they are collected only where `-m` asks for parity. At the end, their figures."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave everything out without `-m parity`, so that other runs need no torch and do not pay for its import."""
    marks = config.getoption("-m")
    return None if "parity" in marks and "not parity" not in marks else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests noted with `record_property`, a line for each of their parameters (model families)."""
    lines: dict[str, dict[str, object]] = {}
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.user_properties:
            lines.setdefault(report.nodeid.rpartition("[")[2].rstrip("]"), {}).update(report.user_properties)
    if lines:
        terminalreporter.section("figures")
    for name, found in lines.items():
        terminalreporter.line(f"{name:16}" + "  ".join(f"{key} {value}" for key, value in found.items()))
