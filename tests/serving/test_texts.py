"""Pieces of text: their sum is the whole, and nothing of a stop sequence is ever in one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pit_jax.serving.text import TextStream, cut_at
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

CODEC = Codec(ByteTokenizer(), Templates(), Lengths(inputs=64, targets=64))
TEXTS = some.text(alphabet="ab€ß\ufffd ", max_size=12)


@settings(deadline=None, max_examples=200)
@given(
    text=TEXTS,
    stops=some.lists(some.text(alphabet="ab€", min_size=1, max_size=4), max_size=3),
    piece=some.integers(1, 5),
)
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, stops: list[str], piece: int) -> None:
    ids = CODEC.tokenizer.encode(text)
    stream = TextStream(CODEC, stops)
    pieces = [stream.feed(ids[:end]) for end in range(0, len(ids), piece)]
    pieces.append(stream.feed(ids, last=True))
    assert "".join(pieces) == stream.sent == cut_at(text, stops)[0]
    assert stream.stopped == any(stop in text for stop in stops)
    assert not any(stop in stream.sent for stop in stops)
    assert stream.feed(ids, last=True) == ""


def test_text_comes_as_soon_as_it_is_certain() -> None:
    stream = TextStream(CODEC, ["end now"])
    sent = [stream.feed(CODEC.tokenizer.encode(text)) for text in ("go ", "go en", "go end n", "go end no!")]
    assert sent == ["go ", "", "", "end no!"]


class Rewriting(ByteTokenizer):
    """Writes a space before a full stop only until something follows it."""

    def decode(self, ids: list[int]) -> str:
        text = super().decode(ids)
        return text.replace(" .", ".") if text.endswith("!") else text


def test_a_tokenizer_that_changes_its_mind_is_waited_for() -> None:
    codec = Codec(Rewriting(), Templates(), Lengths(inputs=64, targets=64))
    stream = TextStream(codec, [])
    sent = [stream.feed(codec.tokenizer.encode(text)) for text in ("a", "a .", "a .!", "a .!b")]
    assert sent[:2] == ["a", " ."] and sent[2] == "" and sent[3] == "!b"


@pytest.mark.parametrize(
    ("text", "stops", "cut"), [("abc", ["c", "b"], "a"), ("abc", [], "abc"), ("ab", ["abc"], "ab")]
)
def test_the_first_stop_cuts(text: str, stops: list[str], cut: str) -> None:
    assert cut_at(text, stops)[0] == cut
