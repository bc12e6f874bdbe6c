"""Pieces of a self-contained HTML page: no network, no external file, readable with scripts switched off."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from html import escape

from pit_jax.evaluation.page_assets import SCRIPT, STYLE

_WIDE = 1000
"""Pixels from which a picture has the page's width to itself."""
_NUMBER = re.compile(r"[+\-–\d].*|")


def document(title: str, body: str) -> str:
    """Return a whole page; its content-security policy lets nothing run or load but its own script, style and pictures.

    Args:
      title: of the page, as text.
      body: HTML.
    """
    safe = escape(title)
    policy = (
        f"default-src 'none'; img-src data:; script-src '{_digest(SCRIPT)}'; style-src '{_digest(STYLE)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{safe}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{safe}</h1>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _digest(text: str) -> str:
    """Return the hash by which a content-security policy allows an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def anchor(title: str) -> str:
    """Return the name by which a link finds a section."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def contents(titles: Sequence[str]) -> str:
    """Return links to the sections with these titles."""
    links = "".join(f'<a href="#{anchor(title)}">{escape(title)}</a> ' for title in titles)
    return f'<nav aria-label="Contents">{links}</nav>'


def section(title: str, body: str) -> str:
    """Return a titled section; `body` is HTML."""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{body}</section>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", note: str = "") -> str:
    """Return a table that scrolls sideways where it is wider than the page, by keyboard too.

    Args:
      header: of the columns, as text.
      rows: cells as text. A column of numbers is set to the right.
      caption: shown above the table, as text.
      note: shown below it, as HTML.
    """
    kinds = [' class="n"' if all(_NUMBER.fullmatch(row[i]) for row in rows) else "" for i in range(len(header))]
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or "Table: " + ", ".join(header))
    below = f'<p class="note">{note}</p>' if note else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{above}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}"
    )


def definition_list(facts: Mapping[str, str]) -> str:
    """Return name-value pairs; `code` in back-quotes in the values."""
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{prose(value)}</dd>" for name, value in facts.items()) + "</dl>"
    )


def bullets(items: Sequence[str]) -> str:
    """Return a list of sentences, with `code` in back-quotes."""
    return "<ul>" + "".join(f"<li>{prose(item)}</li>" for item in items) + "</ul>"


def prose(text: str) -> str:
    """Return text as HTML, in which `code` in back-quotes is code."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"<code>{escape(part)}</code>" if index % 2 else escape(part) for index, part in enumerate(parts))


def figure(png: bytes, caption: str) -> str:
    """Return a picture with its caption."""
    data = base64.b64encode(png).decode("ascii")
    # The header of a PNG file says how large it is; a page that knows does not jump while it is read.
    width, height = struct.unpack(">II", png[16:24])
    wide = ' class="wide"' if width > _WIDE else ""
    return (
        f'<figure{wide}><img alt="{escape(caption)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{prose(caption)}</figcaption></figure>"
    )


def folded(title: str, body: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def copyable(parts: Mapping[str, str]) -> str:
    """Return texts that open on a click, the first open, by their titles, each with a button that copies it."""
    return "".join(
        f'<details{" open" if index == 0 else ""}><summary>{escape(name)}</summary><div class="copyable">'
        f'<button type="button" class="copy" hidden>Copy</button>'
        f'<pre tabindex="0" aria-label="{escape(name)}">{escape(text)}</pre></div></details>'
        for index, (name, text) in enumerate(parts.items())
    )
