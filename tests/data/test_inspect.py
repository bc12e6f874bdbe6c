import io
import json

import pytest
from rich.console import Console

from pit_jax.data.collate import sft_pass
from pit_jax.data.inspect import check_preferences, pass_spans, show_check, show_examples, similarity
from pit_jax.data.readers import ReadConfig
from pit_jax.data.schema import Document, Record
from pit_jax.data.views import VIEWS, DropReport, lm_examples, make_examples
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer, SentencePieceTraining, train_sentencepiece

CODEC = Codec(
    ByteTokenizer(),
    Templates(improver="{prompt}|{reference}>", gap="{prompt}~{reference}<"),
    Lengths(inputs=20, targets=9),
)
RECORD = Record(id="", group="", prompt="ask", chosen="[good]", rejected="bad")


def shown(view, colour=False, codec=CODEC):
    console = Console(file=io.StringIO(), force_terminal=colour, width=200, color_system="standard" if colour else None)
    show_examples(view, make_examples(view, [RECORD], codec, DropReport()), codec, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("view", "lines"),
    [
        ("sft_policy", ["ask[[[good]<eos>]]", "3 prompt tokens (0 reference), 7 trained"]),
        ("sft_improver", ["ask|{{bad}}>[[[good]<eos>]]", "8 prompt tokens (3 reference), 7 trained"]),
        ("reward_bt", ["ask[[[good]<eos>]]", "ask[[bad<eos>]]"]),
        (
            "reward_gap",
            [
                "ask~{{bad}}<[[[good]<eos>]]",
                "ask~{{[good]}}<[[[good]<eos>]]",
                "ask~{{bad}}<[[bad<eos>]]",
                "ask~{{[good]}}<[[bad<eos>]]",
            ],
        ),
        ("rl", ["ask\n", "ask|{{bad}}>\n", "ask|{{[good]}}>\n"]),
        ("evaluate", ["ask|{{bad}}>\n"]),
    ],
)
def test_masks_are_visible_as_brackets_when_piped(view, lines):
    output = shown(view)
    for line in lines:
        assert line in output
    assert "\x1b" not in output


def test_masks_are_visible_as_colour_at_a_terminal():
    output = shown("sft_improver", colour=True)
    assert "\x1b[33mbad\x1b[0m" in output
    assert "\x1b[1;32m<eos>\x1b[0m" in output
    assert "{{" not in output


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_can_be_shown(view):
    assert "ask" in shown(view)


def test_documents_are_shown_with_their_context(tmp_path):
    examples = list(lm_examples(Document(id="", group="", text="abcdefghijk"), CODEC))
    spans = [pass_spans(sft_pass(example), CODEC) for example in examples]
    assert [(span.text, span.role) for span in spans[0]] == [("<eos>", "special"), ("abcdefghi", "trained")]
    assert spans[1][-1].text == "<eos>"


def test_bos_is_shown(tmp_path):
    config = SentencePieceTraining(vocab_size=300, bos=True)
    tokenizer = train_sentencepiece([f"one two {n}" for n in range(300)], config, tmp_path)
    codec = Codec(tokenizer, Templates(), Lengths(inputs=20, targets=20))
    assert "<bos>ask[[" in shown("sft_policy", codec=codec)


def test_similarity_is_that_of_words():
    assert similarity("a b c d", "a b c d") == 1
    assert similarity("a b c d", "a x c d") == 0.75
    assert similarity("a b", "c d") == 0


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_check_measures_a_file(tmp_path):
    rows = [{"prompt": "p", "chosen": "one two three", "rejected": "one two"}] * 3
    rows += [{"prompt": "q r", "chosen": "same size", "rejected": "other words"}]
    path = write(tmp_path / "a.jsonl", *rows, "broken\n")
    check = check_preferences(path, ReadConfig(on_bad_record="skip"), codec=None, views=())
    assert (check.read.records, check.read.bad_count, check.read.duplicates, check.groups) == (4, 1, 2, 2)
    assert (check.unit, check.lengths["chosen"][-1], check.lengths["prompt"][-1]) == ("words", 3.0, 2.0)
    assert check.longer_wins == (3 + 0.5) / 4
    assert check.similarity == 0.8
    assert check.related == 0.75
    assert any("longer reply wins 88%" in advice for advice in check.advice())


def test_check_counts_drops_and_advises(tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": "one", "rejected": "two"} for n in range(10)]
    rows += [
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "x" * 99, "rejected": "y"},
    ]
    check = check_preferences(
        write(tmp_path / "a.jsonl", *rows), ReadConfig(), codec=CODEC, views=["sft_policy", "reward_gap"]
    )
    assert check.unit == "tokens"
    assert check.drops["sft_policy"].dropped == {"too_long_chosen": 1}
    assert check.drops["reward_gap"].dropped == {"too_long_chosen": 1, "identical_replies": 1}
    advice = " ".join(check.advice())
    assert "pairs are related" in advice
    assert "Raise Lengths.targets" in advice


def test_check_is_printed_with_bad_lines_by_place(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, "broken\n", "[red]\n")
    console = Console(file=io.StringIO(), width=200)
    show_check(check_preferences(path, ReadConfig(on_bad_record="skip"), codec=CODEC, views=["rl"]), console)
    output = console.file.getvalue()
    assert f"bad: {path}:2: is not JSON" in output
    assert "rl: kept 1 of 1" in output
    assert "p50" in output


def test_check_of_a_file_without_a_usable_record_says_so(tmp_path):
    path = write(tmp_path / "a.jsonl", "broken\n")
    check = check_preferences(path, ReadConfig(on_bad_record="skip"), codec=CODEC, views=["rl"])
    assert check.advice() == ["There is no usable record."]
    show_check(check, Console(file=io.StringIO()))
