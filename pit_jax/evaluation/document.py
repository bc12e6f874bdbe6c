"""Reports described once and written three times: as Markdown, as a self-contained HTML page, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

import numpy as np
from etils import epath

from pit_jax.core.errors import invalid
from pit_jax.evaluation import page
from pit_jax.io import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval, shown as `form` says; NaN where it is not known."""

    value: float
    ci95: tuple[float, float] | None = None
    form: str = "+.1f"

    @property
    def text(self) -> str:
        """The number, and its interval in brackets if there is one."""
        shown = number(self.value, self.form)
        if self.ci95 is None or math.isnan(self.value):
            return shown
        return f"{shown} [{number(self.ci95[0], self.form)}, {number(self.ci95[1], self.form)}]"


_MARKS = re.compile(
    r"[\\`*<|~$]"  # marks wherever they stand
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore within a word is none, and names of systems are full of them
    r"|](?=[(\[:])"  # what makes a link of brackets, of which intervals have many
    r"|&(?=#?\w+;)"  # a character's name
    r"|^(?:[>#]|[-+](?=\s|$)|\d+[.)](?=\s|$))"  # a quotation, a heading, a list
)
Cell = str | int | float | Estimate
"""What stands in a table; a float is shown with four significant digits."""


def number(value: float, form: str) -> str:
    """Return a number as text, a dash for NaN."""
    return "–" if math.isnan(value) else format(value, form)


def count(value: int | None) -> str:
    """Return a count as text, a dash where nobody counted."""
    return "–" if value is None else f"{value:,}"


def cell_text(cell: Cell) -> str:
    """Return what a reader sees of a cell."""
    if isinstance(cell, Estimate):
        return cell.text
    return number(cell, ".4g") if isinstance(cell, float) else str(cell)


class Block(Protocol):
    """A part of a section."""

    def markdown(self) -> str:
        """Return it as Markdown."""
        ...

    def html(self, directory: epath.Path) -> str:
        """Return it as HTML; `directory` holds the pictures."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Figures in rows. Every row has a cell for each entry of `header`; `note` says what the figures mean."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        """Check that all rows are as long as the header."""
        for index, row in enumerate(self.rows):
            if len(row) != len(self.header):
                field = f"Table({self.title!r}).rows[{index}]"
                raise invalid(field, tuple(row), f"have {len(self.header)} cells", "Give one for each column.")

    def markdown(self) -> str:
        """Return a table of GitHub's Markdown."""
        lines = ["| " + " | ".join(map(inline, self.header)) + " |", "|" + "---|" * len(self.header)]
        lines += ["| " + " | ".join(inline(cell_text(cell)) for cell in row) + " |" for row in self.rows]
        head = [f"**{inline(self.title)}**"] if self.title else []
        return "\n\n".join([*head, "\n".join(lines), *([prose(self.note)] if self.note else [])])

    def html(self, directory: epath.Path) -> str:
        """Return a table that can be scrolled sideways."""
        rows = [[cell_text(cell) for cell in row] for row in self.rows]
        return page.table(self.header, rows, caption=self.title, note=page.prose(self.note))

    def as_json(self) -> dict[str, Any]:
        """Return numbers as numbers; an estimate is {"value", "ci95"}."""
        rows = [[_cell_json(cell) for cell in row] for row in self.rows]
        return {"title": self.title, "header": list(self.header), "rows": rows, "note": self.note}


def _cell_json(cell: Cell) -> Any:
    return {"value": cell.value, "ci95": cell.ci95} if isinstance(cell, Estimate) else cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture: `draw` writes it as a PNG file to the path it is given, as `functools.partial(plots.forest, rows)`."""

    name: str
    caption: str
    draw: Callable[[epath.Path], None]

    def __post_init__(self) -> None:
        """Check the name, which is a file's."""
        if not re.fullmatch(r"[\w-][\w.-]*\.png", self.name):
            rule = "be the name of a PNG file made of letters, digits, '_', '-' and '.'"
            raise invalid("Plot.name", self.name, rule, "Such as 'delta.png'.")

    def markdown(self) -> str:
        """Return a link to the file."""
        return f"![{inline(self.caption)}]({self.name})\n\n{prose(self.caption)}"

    def html(self, directory: epath.Path) -> str:
        """Return the picture itself."""
        return page.figure((directory / self.name).read_bytes(), self.caption)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prose:
    """A paragraph; `code` in back-quotes."""

    text: str

    def markdown(self) -> str:
        """Return a paragraph."""
        return prose(self.text)

    def html(self, directory: epath.Path) -> str:
        """Return a paragraph."""
        return f"<p>{page.prose(self.text)}</p>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list of sentences; `code` in back-quotes."""

    items: Sequence[str]

    def markdown(self) -> str:
        """Return a list."""
        return "\n".join(f"* {prose(item)}" for item in self.items)

    def html(self, directory: epath.Path) -> str:
        """Return a list."""
        return page.bullets(self.items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warnings:
    """What makes figures doubtful, in a box."""

    items: Sequence[str]

    def markdown(self) -> str:
        """Return a quoted list."""
        return "\n".join(f"> * **Warning:** {prose(item)}" for item in self.items)

    def html(self, directory: epath.Path) -> str:
        """Return a box."""
        return f'<div class="warning" role="note"><strong>Warnings</strong>{page.bullets(self.items)}</div>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Names with values."""

    items: Mapping[str, str]

    def markdown(self) -> str:
        """Return a list."""
        return "\n".join(f"* **{inline(name)}:** {prose(value)}" for name, value in self.items.items())

    def html(self, directory: epath.Path) -> str:
        """Return a list of definitions."""
        return page.definition_list(self.items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded:
    """Blocks that open on a click."""

    title: str
    blocks: Sequence[Block]

    def markdown(self) -> str:
        """Return blocks that open on a click where the reader's viewer knows how."""
        body = "\n\n".join(block.markdown() for block in self.blocks)
        return f"<details><summary>{escape(self.title)}</summary>\n\n{body}\n\n</details>"

    def html(self, directory: epath.Path) -> str:
        """Return blocks that open on a click."""
        return page.folded(self.title, "".join(block.html(directory) for block in self.blocks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerun:
    """Everything needed to make the same figures again.

    command: the command line. seed: of the run. versions: package -> version. inputs: what was read (checkpoints,
    data) -> hash or fingerprint. config: the configuration as text. settings: those of the stage itself, as text.
    """

    command: str
    seed: int
    versions: Mapping[str, str]
    inputs: Mapping[str, str]
    config: str
    settings: str = ""

    def parts(self) -> dict[str, str]:
        """Return the texts to be shown and copied, by their titles; empty ones are left out."""
        found = {
            "command": self.command,
            "seed": str(self.seed),
            "versions": _lines(self.versions),
            "inputs": _lines(self.inputs),
            "configuration": self.config.strip("\n"),
            "settings of this stage": self.settings.strip("\n"),
        }
        return {name: text for name, text in found.items() if text}

    def markdown(self) -> str:
        """Return blocks that open on a click where the reader's viewer knows how."""
        return "\n\n".join(
            f"<details><summary>{name}</summary>\n\n{fenced(text)}\n\n</details>" for name, text in self.parts().items()
        )

    def html(self, directory: epath.Path) -> str:
        """Return blocks that open on a click, with a button each to copy the text."""
        return page.copyable(self.parts())

    def as_json(self) -> dict[str, Any]:
        """Return its fields."""
        return dataclasses.asdict(self)


def _lines(items: Mapping[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in items.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: Sequence[Block]


def write(title: str, sections: Sequence[Section], data: Mapping[str, Any], directory: epath.Path) -> epath.Path:
    """Write the pictures, report.md, report.html and, last, report.json; return the page's path.

    Args:
      title: of the report.
      sections: what it shows.
      data: the content of report.json; numbers that are not finite become null.
      directory: is made where it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for plot in _plots([block for section in sections for block in section.blocks]):
        plot.draw(directory / plot.name)
    text = json.dumps(plain(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    written = {"md": markdown(title, sections), "html": html(title, sections, directory), "json": text}
    for kind, content in written.items():
        # Replies of endpoints may hold halves of surrogate pairs, which no file can.
        files.write_text(directory / f"report.{kind}", content.encode("utf-8", "replace").decode("utf-8"))
    return directory / "report.html"


def _plots(blocks: Sequence[Block]) -> list[Plot]:
    found: list[Plot] = []
    for block in blocks:
        if isinstance(block, Folded):
            found += _plots(block.blocks)
        elif isinstance(block, Plot):
            found.append(block)
    return found


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return a report as Markdown; pictures are linked by their file names."""
    parts = [f"# {inline(title)}"]
    for section in sections:
        parts += [f"## {inline(section.title)}", *(block.markdown() for block in section.blocks)]
    return "\n\n".join(filter(None, parts)) + "\n"


def html(title: str, sections: Sequence[Section], directory: epath.Path) -> str:
    """Return a report as one page that needs nothing but itself."""
    parts = [
        page.section(section.title, "".join(block.html(directory) for block in section.blocks)) for section in sections
    ]
    return page.document(title, page.contents([section.title for section in sections]) + "".join(parts))


def plain(data: Any) -> Any:
    """Return data as JSON can hold them: NumPy's as Python's, and null for numbers that are not finite."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, np.ndarray | np.generic):
        return plain(data.tolist())
    return None if isinstance(data, float) and not math.isfinite(data) else data


def short(text: str, most: int = 80) -> str:
    """Return text as one line of at most `most` letters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def inline(text: str) -> str:
    """Return text as one line of Markdown that shows every character as it is."""
    return _escaped(" ".join(text.split()))


def prose(text: str) -> str:
    """Return text as one line of Markdown, in which `code` in back-quotes is code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text: str) -> str:
    return _MARKS.sub(lambda found: f"{found.group()[:-1]}\\{found.group()[-1]}", text)


def fenced(text: str) -> str:
    """Return a block of code; its fence is longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
