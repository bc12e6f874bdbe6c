"""Finding gin files: one rule for `--gin_file` and for `include` inside a file."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

from pit_jax.cli import shipped
from pit_jax.core.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """Where gin files are looked for: the current directory, the search paths in order, what pit_jax ships."""

    search_paths: tuple[str, ...] = ()

    def places(self) -> list[str]:
        """Return the folders in the order they are searched."""
        return ["", *self.search_paths, str(shipped.gin_directory())]

    def exists(self, name: str) -> bool:
        """Tell whether `find` would succeed."""
        return self._lookup(name) is not None

    def find(self, name: str, asked_by: str) -> str:
        """Return the path of a gin file.

        Args:
          name: a path, or a name relative to one of `places`.
          asked_by: the flag, or the place of the include statement, for the message.

        Raises:
          ConfigError: no place has it; the closest names that exist are given.
        """
        path = self._lookup(name)
        if path is not None:
            return path
        searched = ", ".join(repr(place or os.getcwd()) for place in self.places())
        raise ConfigError(
            f"gin file {name!r} ({asked_by}) does not exist.{nearest(name, self._known())} "
            f"Searched: {searched}. Give a path, or add a folder with --gin_search_paths=DIR."
        )

    def open(self, name: str) -> io.StringIO:
        """Return a file's text as a stream that has a name, as gin's parser wants it."""
        stream = io.StringIO(self.read(self.find(name, "include")))
        stream.name = name  # type: ignore[attr-defined]
        return stream

    def read(self, path: str) -> str:
        """Return the text of a found file."""
        if "://" in path:
            from etils import epath  # Remote file systems are rare here, and the import is not free.

            return epath.Path(path).read_text()
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"gin file {path!r} cannot be read: {error}.") from error

    def _lookup(self, name: str) -> str | None:
        if "://" in name:
            from etils import epath

            return name if epath.Path(name).exists() else None
        candidates = [os.path.join(place, os.path.expanduser(name)) for place in self.places()]
        return next((path for path in candidates if os.path.isfile(path)), None)

    def _known(self) -> list[str]:
        known = []
        for place in self.places():
            folder = Path(place or ".")
            known += [path.relative_to(folder).as_posix() for path in folder.glob("*.gin")]
            known += [path.relative_to(folder).as_posix() for path in folder.glob("*/*.gin")]
        return known
