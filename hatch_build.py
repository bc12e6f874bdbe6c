"""Build hook: puts the checkout's gin/ and tasks/ into the wheel as pit_jax/_shipped/{gin,tasks}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = {"gin": "*.gin", "tasks": "*.py"}


class ShippedFiles(BuildHookInterface):
    """Adds the recipes and tasks to a real wheel; an editable install reads them from the checkout instead."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Register each file with its place in the wheel (`version` is "editable" or "standard")."""
        if version == "editable":
            return
        root = Path(self.root)
        for folder, pattern in SHIPPED.items():
            for file in sorted((root / folder).rglob(pattern)):
                build_data["force_include"][str(file)] = f"pit_jax/_shipped/{file.relative_to(root).as_posix()}"
