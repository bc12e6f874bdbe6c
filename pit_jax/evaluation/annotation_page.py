"""The page on which a person compares responses: one HTML file that needs neither network nor server.

Texts enter as JSON in an inert block and reach the screen as text nodes only; the content-security policy names the
hashes of the page's own script and style, so nothing else can run even if a text found a way out of its block.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --accent: #1b6ca8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; min-height: 100vh; display: flex; flex-direction: column; }
header, footer { position: sticky; background: Canvas; padding: .6rem 1.2rem; z-index: 1; }
header { top: 0; border-bottom: 1px solid var(--line); }
footer { bottom: 0; border-top: 1px solid var(--line); }
footer { display: flex; gap: .6rem; flex-wrap: wrap; align-items: center; }
h1 { font-size: 1.1rem; margin: 0; } h2 { font-size: .85rem; margin: 0 0 .3rem; opacity: .75; font-weight: 600; }
progress { appearance: none; width: 100%; height: .4rem; border: 0; background: var(--line); }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
main { flex: 1; width: 100%; max-width: 84rem; margin: 0 auto; padding: 1rem 1.2rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
#prompt { background: var(--soft); border-radius: 8px; padding: .7rem .9rem; margin-bottom: 1rem; }
#answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
#answers section { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; min-width: 0; }
button { font: inherit; padding: .45rem .9rem; border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
button.vote { background: var(--accent); color: white; border-color: var(--accent); flex: 1 1 10rem; }
button:disabled { opacity: .4; cursor: default; }
kbd { font: .8em ui-monospace, monospace; border: 1px solid currentColor; border-radius: 3px; padding: 0 .3em; }
#warning { color: #b3261e; font-weight: 600; margin: 0; }
#done { text-align: center; padding: 3rem 0; }
[hidden] { display: none !important; }
@media (max-width: 46rem) { #answers { grid-template-columns: 1fr; } }
"""

_SCRIPT = r"""
"use strict";
const pack = JSON.parse(document.getElementById("pack").textContent);
const element = (id) => document.getElementById(id);
const places = new Map(pack.items.map((item, place) => [item.id, place]));
const slot = "pit_jax.votes." + pack.pack;
let votes = [];
let shownAt = performance.now();
let kept = true;
let saved = 0;

function load() {
  try {
    const known = new Set(["left", "right", "tie"]);
    const seen = new Set();
    for (const vote of JSON.parse(localStorage.getItem(slot) || "[]")) {
      if (places.has(vote.id) && known.has(vote.vote) && !seen.has(vote.id)) { seen.add(vote.id); votes.push(vote); }
    }
  } catch (error) { kept = false; }
}

function keep() {
  try { localStorage.setItem(slot, JSON.stringify(votes)); } catch (error) { kept = false; }
}

function next() {
  const given = new Set(votes.map((vote) => vote.id));
  return pack.items.find((item) => !given.has(item.id));
}

function show() {
  const item = next();
  const total = pack.items.length;
  element("bar").max = total;
  element("bar").value = votes.length;
  element("count").textContent = votes.length + " of " + total + " done";
  element("question").hidden = !item;
  element("done").hidden = Boolean(item);
  element("warning").hidden = kept;
  for (const button of document.querySelectorAll("button.vote")) button.disabled = !item;
  element("undo").disabled = votes.length === 0;
  element("json").disabled = element("csv").disabled = votes.length === 0;
  if (item) {
    element("prompt-text").textContent = item.prompt;
    element("left-text").textContent = item.left;
    element("right-text").textContent = item.right;
    window.scrollTo(0, 0);
    shownAt = performance.now();
  }
}

function choose(vote) {
  const item = next();
  if (!item) return;
  votes.push({ id: item.id, vote: vote, seconds: Math.round((performance.now() - shownAt) / 100) / 10 });
  keep();
  show();
}

function undo() {
  if (votes.length === 0) return;
  const last = votes.pop();
  // The item comes back at once: it goes to the front of those that are left.
  const [item] = pack.items.splice(pack.items.findIndex((other) => other.id === last.id), 1);
  const given = new Set(votes.map((vote) => vote.id));
  const place = pack.items.findIndex((other) => !given.has(other.id));
  pack.items.splice(place < 0 ? pack.items.length : place, 0, item);
  saved = 0;
  keep();
  show();
}

const texts = () => new Map(pack.items.map((item) => [item.id, item]));

function asJson() {
  const shown = texts();
  const rows = votes.map((vote) => ({ ...vote, ...shown.get(vote.id) }));
  return JSON.stringify({ format: pack.format, pack: pack.pack, annotator: pack.annotator, votes: rows }, null, 1);
}

function asCsv() {
  const shown = texts();
  const guard = (text) => (/^[=+\-@\t\r']/.test(text) ? "'" + text : text);
  const cell = (text) => '"' + guard(text).replaceAll('"', '""') + '"';
  const given = new Map(votes.map((vote) => [vote.id, vote.vote]));
  const line = (item) => [pack.annotator, item.id, item.prompt, item.left, item.right, given.get(item.id) || ""];
  const rows = [["annotator", "id", "prompt", "left", "right", "vote"], ...Array.from(shown.values(), line)];
  return "\ufeff" + rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function download(name, kind, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: kind }));
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  saved = votes.length;
}

const keys = { 1: "left", 2: "tie", 3: "right", ArrowLeft: "left", ArrowRight: "right", t: "tie", T: "tie" };
document.addEventListener("keydown", (event) => {
  const undoing = event.key === "u" || event.key === "U" || event.key === "Backspace";
  if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); undo(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (undoing) { event.preventDefault(); undo(); }
  else if (Object.hasOwn(keys, event.key)) { event.preventDefault(); choose(keys[event.key]); }
});
for (const button of document.querySelectorAll("button.vote")) {
  button.addEventListener("click", () => choose(button.dataset.vote));
}
element("undo").addEventListener("click", undo);
const file = "votes_" + pack.annotator;
element("json").addEventListener("click", () => download(file + ".json", "application/json", asJson()));
element("csv").addEventListener("click", () => download(file + ".csv", "text/csv", asCsv()));
window.addEventListener("beforeunload", (event) => { if (!kept && saved < votes.length) event.preventDefault(); });
load();
keep();
show();
"""

_BODY = """
<noscript><p>This page needs JavaScript. It loads nothing from the network.</p></noscript>
<header>
  <h1>{title}</h1>
  <p class="text">{instructions}</p>
  <progress id="bar" value="0" max="1" aria-label="Progress"></progress>
  <span id="count" role="status" aria-live="polite"></span>
  <p id="warning" role="alert" hidden>This browser does not keep your votes. Download them before you leave.</p>
</header>
<main>
  <div id="question">
    <div id="prompt"><h2>Prompt</h2><p class="text" id="prompt-text" dir="auto"></p></div>
    <div id="answers">
      <section aria-label="Left response"><h2>Left</h2><p class="text" id="left-text" dir="auto"></p></section>
      <section aria-label="Right response"><h2>Right</h2><p class="text" id="right-text" dir="auto"></p></section>
    </div>
  </div>
  <div id="done" hidden><p><strong>All done. Thank you!</strong></p>
    <p>Now press "Download JSON" below, and send that file back.</p></div>
</main>
<footer>
  <button class="vote" data-vote="left">Left is better <kbd>1</kbd> <kbd>&larr;</kbd></button>
  <button class="vote" data-vote="tie">Equally good <kbd>2</kbd> <kbd>T</kbd></button>
  <button class="vote" data-vote="right">Right is better <kbd>3</kbd> <kbd>&rarr;</kbd></button>
  <button id="undo">Undo <kbd>U</kbd></button>
  <button id="json">Download JSON</button>
  <button id="csv">Download CSV</button>
</footer>
"""


def page(title: str, instructions: str, pack: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
      title, instructions: shown at the top.
      pack: `format`, `pack` (hash of the items), `annotator`, and `items`: `id`, `prompt`, `left`, `right` each.
    """
    # Escaped, "<" can neither close the block nor open a comment in it; JSON reads it back as it was.
    data = json.dumps(pack).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    policy = f"default-src 'none'; script-src '{_digest(_SCRIPT)}'; style-src '{_digest(_STYLE)}'; base-uri 'none'"
    body = _BODY.format(title=html.escape(title), instructions=html.escape(instructions))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{body}"
        f'<script type="application/json" id="pack">{data}</script><script>{_SCRIPT}</script></body></html>\n'
    )


def _digest(text: str) -> str:
    """Return the hash by which a content-security policy allows an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
