"""The style and the script of report pages.

Outcomes (win, lose, tie) are filtered by style alone; the script adds judges, systems, search and copying. It reads
what is on the page and writes text and classes only.
"""

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --add: #2e8b5744; --cut: #d1495b3d;
  --win: #2e8b57; --lose: #d1495b; --tie: #888; --accent: #1b6ca8; --warn: #edae4926; }
@media (prefers-color-scheme: dark) { :root { --accent: #6cb6ee; --win: #4fbf80; --lose: #ec7584; --tie: #999; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
a { color: var(--accent); } nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0; font-size: .9rem; }
code, pre { font: .88em/1.45 ui-monospace, monospace; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; white-space: nowrap; }
th { vertical-align: bottom; } .n { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; }
.note { font-size: .88rem; opacity: .85; margin: .2rem 0 1rem; max-width: 60rem; }
figure { display: inline-block; margin: 1rem 1rem 0 0; vertical-align: top; width: 33rem; max-width: 100%; }
figure.wide { width: 100%; }
img { max-width: 100%; height: auto; background: white; border: 1px solid var(--line); border-radius: 4px; }
figcaption { font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
.warning { border: 1px solid #edae49; border-left-width: 4px; background: var(--warn); border-radius: 6px;
  padding: .5rem 1rem; margin: 1rem 0; }
.warning ul { margin: .2rem 0; padding-left: 1.2rem; }
fieldset { border: 1px solid var(--line); border-radius: 6px; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem;
  align-items: center; margin: .8rem 0; }
.scripted { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; }
input[type=search], select, button { font: inherit; padding: .15rem .4rem; max-width: 100%; }
input[type=search] { width: 16rem; }
.card { border: 1px solid var(--line); border-left: 4px solid var(--tie); border-radius: 6px; padding: .5rem .8rem;
  margin: .7rem 0; }
.card.win { border-left-color: var(--win); } .card.lose { border-left-color: var(--lose); }
.card h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .3rem; }
.card p, .card h3 { white-space: pre-wrap; overflow-wrap: anywhere; }
.card p { margin: .1rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair h4 { font-size: .8rem; font-weight: 600; margin: 0; opacity: .75; }
.said { display: flex; flex-wrap: wrap; gap: .3rem .5rem; list-style: none; margin: .4rem 0 0; padding: 0;
  font-size: .8rem; }
.said li { border: 1px solid var(--tie); border-radius: 1rem; padding: 0 .6rem; }
.said li.win { border-color: var(--win); } .said li.lose { border-color: var(--lose); }
ins, del { text-decoration: none; } ins { background: var(--add); } del { background: var(--cut); }
.card details { border: 0; padding: 0; font-size: .85rem; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .3rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
.copy { float: right; margin: .3rem; }
.copyable pre { overflow: auto; max-height: 24rem; background: var(--soft); padding: .6rem; border-radius: 4px; }
[hidden] { display: none !important; }
body:has(#show-win:not(:checked)) .card.win, body:has(#show-lose:not(:checked)) .card.lose,
body:has(#show-tie:not(:checked)) .card.tie, body:has(#show-none:not(:checked)) .card.none { display: none; }
@media (max-width: 44rem) {
  .pair, dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .3rem; } figure { margin-right: 0; }
}
@media print { nav, fieldset, button { display: none !important; } .card { break-inside: avoid; } }
"""

SCRIPT = r"""
"use strict";
const element = (id) => document.getElementById(id);
const cards = Array.from(document.querySelectorAll(".card"));
const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
const kinds = ["win", "lose", "tie", "none"];

function show() {
  const judge = Number(element("judge").value);
  const system = element("system").value;
  const words = element("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const outcomes = card.dataset.outcomes.split(" ");
    const given = new Set(outcomes.filter((outcome) => outcome !== "none"));
    card.classList.remove(...kinds);
    card.classList.add(outcomes[judge]);
    card.hidden = !((system === "" || card.dataset.system === system)
      && (!element("split").checked || given.size > 1)
      && words.every((word) => texts.get(card).includes(word)));
    const box = element("show-" + outcomes[judge]);
    if (!card.hidden && (!box || box.checked)) shown += 1;
  }
  element("count").textContent = shown + " of " + cards.length + " shown";
}

if (element("tools")) {
  element("tools").hidden = false;
  const inputs = ["judge", "system", "split", ...kinds.map((kind) => "show-" + kind)].map(element).filter(Boolean);
  for (const input of inputs) input.addEventListener("change", show);
  element("search").addEventListener("input", show);
  show();
}

for (const button of document.querySelectorAll("button.copy")) {
  const text = button.nextElementSibling;
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch (error) {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected: press Ctrl+C";
    }
  });
}
"""
