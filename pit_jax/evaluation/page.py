"""Pieces of a self-contained HTML page: no network, no external file, readable with scripts switched off."""

from __future__ import annotations

import difflib
import html
from collections.abc import Mapping, Sequence

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --add: #2e8b5733; --cut: #d1495b33; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .88rem;
  font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 1rem 1rem 0 0; vertical-align: top; max-width: 100%; }
img { max-width: 100%; background: white; border: 1px solid var(--line); }
figcaption { font-size: .85rem; max-width: 44rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .7rem 0;
  white-space: pre-wrap; }
.card b { font-weight: 600; } ins { background: var(--add); text-decoration: none; } del { background: var(--cut); }
.win { border-left: 4px solid #2e8b57; } .lose { border-left: 4px solid #d1495b; } .tie { border-left: 4px solid #999; }
label { margin-right: 1rem; }
body:has(#show-win:not(:checked)) .card.win, body:has(#show-lose:not(:checked)) .card.lose,
body:has(#show-tie:not(:checked)) .card.tie { display: none; }
"""


def document(title: str, body: str) -> str:
    """Return a whole page."""
    safe = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{safe}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{safe}</h1>{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a titled section; `body` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; cells are text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def definition_list(facts: Mapping[str, str]) -> str:
    """Return name-value pairs."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def filters(outcomes: Sequence[str]) -> str:
    """Return check boxes that show or hide cards by outcome (pure CSS)."""
    return "".join(f'<label><input type="checkbox" id="show-{name}" checked> {name}</label>' for name in outcomes)


def side_by_side(prompt: str, original: tuple[str, float], improved: tuple[str, float], outcome: str) -> str:
    """Return a card with both responses and their word-by-word difference marked."""
    before, after = difference(original[0], improved[0])
    return (
        f'<div class="card {outcome}"><b>{html.escape(prompt.strip())}</b>\n'
        f"original ({original[1]:.2f}): {before}\nimproved ({improved[1]:.2f}, {outcome}): {after}</div>"
    )


def difference(old: str, new: str) -> tuple[str, str]:
    """Return both texts as HTML with words only in the old one struck out and words only in the new one marked."""
    left, right = old.split(), new.split()
    before, after = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(a=left, b=right, autojunk=False).get_opcodes():
        cut, put = html.escape(" ".join(left[i:j])), html.escape(" ".join(right[k:m]))
        before.append(cut if kind == "equal" else f"<del>{cut}</del>" if cut else "")
        after.append(put if kind == "equal" else f"<ins>{put}</ins>" if put else "")
    return " ".join(filter(None, before)), " ".join(filter(None, after))
