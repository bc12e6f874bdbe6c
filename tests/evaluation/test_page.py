"""Pieces of pages and of Markdown: texts come through as they are, in tables, lists, cards and blocks of code."""

import html
import json
import math
import re

import markdown_it
import numpy as np
import pytest
from etils import epath

from pit_jax.core.errors import ConfigError
from pit_jax.evaluation import cards, document, page
from pit_jax.evaluation.cards import Example, Opinion
from pit_jax.evaluation.document import Estimate, Folded, Plot, Prose, Rerun, Section, Table

EVIL = "</script><b>`x|y`</b> & * _a_ [l](http://u) $1$ ~~z~~"


def _as_text(marked):
    """Return what a reader sees of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", marked))


def test_numbers_and_estimates_as_text():
    assert Estimate(value=12.34, ci95=(1.0, 20.06)).text == "+12.3 [+1.0, +20.1]"
    assert Estimate(value=0.5, form=".2f").text == "0.50"
    assert Estimate(value=math.nan, ci95=(math.nan, math.nan)).text == "–"
    assert Estimate(value=1.0, ci95=(math.nan, 2.0), form=".0f").text == "1 [–, 2]"
    assert [document.cell_text(cell) for cell in ("a", 3, 0.123456, math.nan)] == ["a", "3", "0.1235", "–"]
    assert [document.count(value) for value in (None, 0, 12345)] == ["–", "0", "12,345"]


def test_a_table_in_all_forms():
    table = Table(title="T <1>", header=("name", "x"), rows=[("a|b", Estimate(value=1.0, ci95=(0.0, 2.0)))], note="`n`")
    assert table.markdown().splitlines() == [
        "**T \\<1>**", "", "| name | x |", "|---|---|", "| a\\|b | +1.0 [+0.0, +2.0] |", "", "`n`",
    ]  # fmt: skip
    found = table.html(epath.Path("."))
    assert "<caption>T &lt;1&gt;</caption>" in found
    assert '<td>a|b</td><td class="n">+1.0 [+0.0, +2.0]</td>' in found
    assert "<code>n</code>" in found
    assert table.as_json()["rows"] == [["a|b", {"value": 1.0, "ci95": (0.0, 2.0)}]]
    with pytest.raises(ConfigError, match=r"rows\[1\].*have 2 cells"):
        Table(header=("a", "b"), rows=[(1, 2), (1,)])


def test_columns_of_numbers_are_set_to_the_right():
    found = page.table(("system", "Delta", "kind"), [("7b", "+1.0 [0, 2]", "a"), ("x", "–", "3")])
    assert re.findall(r"<th scope=\"col\"( class=\"n\")?>", found) == ["", ' class="n"', ""]


def test_texts_come_through_markdown():
    reader = markdown_it.MarkdownIt("gfm-like", {"linkify": False})
    odd = [
        "# no heading",
        "> no quote",
        "- no list",
        "1. no list",
        "2) no list",
        "&lt;",
        "a_b_c __d__ e__f",
        "\\*",
        "+",
    ]
    for text in [EVIL, *odd]:
        assert _as_text(reader.render(document.inline(text))).strip() == text
    shown = reader.render(document.prose("`a|b` and <b> *c*"))
    assert shown.strip() == "<p><code>a|b</code> and &lt;b&gt; *c*</p>"
    (table,) = re.findall(r"<td>(.*?)</td>", reader.render(Table(header=("a",), rows=[(EVIL,)]).markdown()))
    assert _as_text(table) == EVIL


def test_a_fence_is_longer_than_those_within():
    text = "```\ninner\n````"
    assert document.fenced(text).splitlines()[0] == "`````text"
    assert document.fenced("plain") == "```text\nplain\n```"


def test_prose_as_html():
    assert page.prose("`a<b` & <c> `") == "<code>a&lt;b</code> &amp; &lt;c&gt; `"


def test_anchors_are_names_for_links():
    assert page.anchor("Run it again!") == "run-it-again"
    assert page.anchor("???") == "section"
    assert '<a href="#side-by-side">Side by side</a>' in page.contents(["Side by side"])


def test_plain_makes_json_of_anything():
    data = {"a": (1.0, math.nan), 2: [math.inf, {"b": -math.inf}], "c": "x", "d": None, "e": True}
    assert document.plain(data) == {"a": [1.0, None], "2": [None, {"b": None}], "c": "x", "d": None, "e": True}
    arrays = {"a": np.array([[1, 2]]), "b": np.float32(0.5), "c": np.array([np.nan]), "d": np.int64(3)}
    assert json.loads(json.dumps(document.plain(arrays))) == {"a": [[1, 2]], "b": 0.5, "c": [None], "d": 3}


def test_halves_of_characters_do_not_stop_a_report(tmp_path):
    sections = [Section(title="S", blocks=[Prose(text="a \ud83d b \u20ac")])]
    document.write("t", sections, {"x": "\ud83d \u20ac"}, epath.Path(tmp_path))
    assert "a ? b €" in (tmp_path / "report.md").read_text()
    assert "a ? b €" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == {"x": "? €"}


def test_plots_need_a_file_name():
    for name in ("a b.png", "../a.png", ".png", "a.jpg", ""):
        with pytest.raises(ConfigError, match="Plot.name"):
            Plot(name=name, caption="c", draw=lambda path: None)


def test_pictures_in_folded_blocks_are_drawn_too(tmp_path):
    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x04\x00\x00\x00\x01\x00"
    plot = Plot(name="a.png", caption="<c>", draw=lambda path: path.write_bytes(png))
    sections = [Section(title="S", blocks=[Folded(title="f", blocks=[plot, Prose(text="`p`")])])]
    document.write("t", sections, {}, epath.Path(tmp_path))
    found = (tmp_path / "report.html").read_text()
    assert '<figure class="wide"><img alt="&lt;c&gt;" width="1024" height="256"' in found
    assert "<details><summary>f</summary>" in found
    assert "![\\<c>](a.png)" in (tmp_path / "report.md").read_text()


def test_rerun_leaves_out_what_is_not_known():
    rerun = Rerun(command="c", seed=1, versions={"jax": "1"}, config="", inputs={"a": "h", "b": "i"})
    assert rerun.parts() == {"command": "c", "seed": "1", "versions": "jax: 1", "inputs": "a: h\nb: i"}
    assert page.copyable(rerun.parts()).count("<details") == 4
    assert rerun.as_json()["inputs"] == {"a": "h", "b": "i"}


def test_difference_marks_only_what_changed():
    before, after = cards.difference("the cat sat", "the dog sat <now>")
    assert before == "the <del>cat</del> sat"
    assert after == "the <ins>dog</ins> sat <ins>&lt;now&gt;</ins>"
    assert cards.difference("", "a b") == ("", "<ins>a b</ins>")
    assert cards.difference("same", "same") == ("same", "same")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a\n\nb  c", "a\n\nb  d\n* e"),
        ("x y z " * 300, "y z x " * 300),
        ("a " * 1500, "b " * 1500),
        ("word " * 2000 + "end", "word " * 2000 + "other end"),
        (EVIL, EVIL + " more"),
    ],
)
def test_difference_shows_both_texts_whole(old, new):
    before, after = cards.difference(old, new)
    assert _as_text(before) == old.strip()
    assert _as_text(after) == new.strip()
    kept = [re.sub(rf"<{tag}>.*?</{tag}>", "", text, flags=re.S) for tag, text in (("del", before), ("ins", after))]
    assert kept[0].split() == kept[1].split()


def _example(system="pit", outcome="win", **changes):
    fields = {"prompt": "p", "original": "a", "improved": "b", "opinions": (Opinion(judge="j", outcome=outcome),)}
    return Example(system=system, **{**fields, **changes})


def test_scores_stand_for_an_opinion():
    scored = Example(prompt="p", original="a", improved="b", score_original=0.5, score_improved=0.25)
    assert scored.said == (Opinion(judge="score", outcome="lose", detail="0.50 → 0.25"),)
    assert scored.outcome == "lose"
    assert Example(prompt="p", original="a", improved="b").outcome == "none"
    assert _example(score_original=1.0, score_improved=1.0).outcome == "win"
    with pytest.raises(ConfigError, match="Opinion.outcome = 'won' must be one of"):
        Opinion(judge="j", outcome="won")


def test_chosen_examples_are_of_every_system_and_outcome():
    many = [_example("pit", "win", prompt=str(i)) for i in range(50)]
    rare = [_example("pit", "lose"), _example("srt", "tie"), _example("srt", "none")]
    chosen = cards.select([*many, *rare], 10)
    assert [example.prompt for example in chosen] == ["0", "1", "2", "3", "4", "5", "6", "p", "p", "p"]
    assert cards.select(rare, 10) == rare


def test_cards_say_how_many_are_left_out():
    block = cards.Cards(examples=[_example(prompt=f"p{i}") for i in range(20)], most=5, most_lines=2)
    found = block.html(epath.Path("."))
    assert found.count('<article class="card win"') == 5
    assert "5 of 20 examples" in found
    lines = block.markdown().splitlines()
    assert lines[0].startswith("2 of 20 examples")
    assert lines[2:] == [
        "* *p0*", "  * original: a", "  * pit: b", "  * j: win",
        "* *p1*", "  * original: a", "  * pit: b", "  * j: win",
    ]  # fmt: skip
    assert "of 20" not in cards.Cards(examples=[_example()] * 20).html(epath.Path("."))


def test_no_examples_are_said_to_be_none():
    assert cards.Cards(examples=[]).html(epath.Path(".")) == "<p>No examples.</p>"


def test_filters_fit_the_examples():
    plain = cards.Cards(examples=[_example()]).html(epath.Path("."))
    assert 'id="show-none"' not in plain
    assert '<label hidden>by judge <select id="judge">' in plain
    second = Opinion(judge="k", outcome="none")
    several = cards.Cards(examples=[_example("a<b>"), _example(opinions=(second,))]).html(epath.Path("."))
    assert 'id="show-none"' in several
    assert '<label>by judge <select id="judge"><option value="0">j</option><option value="1">k</option>' in several
    assert '<option value="0">a&lt;b&gt;</option><option value="1">pit</option>' in several
    # The first judge has said nothing of the second card, the second nothing of the first.
    assert re.findall(r'class="card (\w+)" data-system="(\d)" data-outcomes="([\w ]+)"', several) == [
        ("win", "0", "win none"),
        ("none", "1", "none none"),
    ]


def test_examples_of_several_systems_begin_with_what_changed():
    prompts, original = ["p0", "p1", "p2"], ["a", "b", "c"]
    improved = {"pit": ["a", "x", "y"], "srt": ["z", "b", "c"]}
    exact = cards.opinions("exact", np.array([0.0, 1.0, -1.0]), ["1", "2", "3"])
    gpt = cards.opinions("gpt", np.array([np.nan, 1.0, 0.0]))
    found = cards.side_by_side(prompts, original, improved, {"pit": [exact, gpt]}, most=2)
    assert [(e.system, e.prompt, e.original, e.improved) for e in found] == [
        ("pit", "p1", "b", "x"), ("pit", "p2", "c", "y"), ("srt", "p0", "a", "z"), ("srt", "p1", "b", "b"),
    ]  # fmt: skip
    assert found[1].said == (Opinion(judge="exact", outcome="lose", detail="3"), Opinion(judge="gpt", outcome="tie"))
    assert [opinion.outcome for opinion in gpt] == ["none", "win", "tie"]
    assert found[2].said == () and found[2].outcome == "none"


def test_long_words_of_a_judge_open_on_a_click():
    long = Opinion(judge="<gpt>", outcome="win", detail="because <b> " * 20)
    found = cards.Cards(examples=[_example(opinions=(long,))]).html(epath.Path("."))
    assert '<li class="win">&lt;gpt&gt;: win</li>' in found
    assert "<details><summary>In the words of &lt;gpt&gt;</summary><p>because &lt;b&gt;" in found
