"""From generated texts to answers: what parses gives r, everything else y, with a reason."""

from __future__ import annotations

import pytest

from pit_jax.decode.batches import Response
from pit_jax.srt.inference import outcomes, take_apart
from pit_jax.srt.text import SrtCodec, SrtText
from pit_jax.text.tokenizer import ByteTokenizer

from .formats import codec_of

TEXT = SrtText(targets=100, feedback="[f]", refinement="[r]", weakness="{weakness}", suggestion="{suggestion}")
CODEC = SrtCodec(TEXT, codec_of(ByteTokenizer(), inputs=20, targets=9))
NO_FEEDBACK = SrtCodec(SrtText(targets=100, refinement="[r]", parts=()), CODEC.run)


def apart(text: str, *, finished: bool = True, codec: SrtCodec = CODEC):
    return take_apart(codec, Response(tuple(ByteTokenizer().encode(text)), finished))


def said(response: Response | None) -> tuple[str, bool] | None:
    return None if response is None else (CODEC.run.text(response.ids), response.finished)


def test_a_whole_text_gives_its_refinement():
    found = apart("bad[f]so so[r]good")
    assert said(found.response) == ("bad", True) and said(found.refinement) == ("good", True)
    assert found.final is found.refinement and found.outcome == "parsed"
    assert found.feedback is not None and CODEC.run.text(found.feedback) == "so so"
    found = apart("bad[r]good", codec=NO_FEEDBACK)
    assert said(found.response) == ("bad", True) and said(found.final) == ("good", True) and found.feedback is None


@pytest.mark.parametrize(
    ("text", "finished", "outcome"),
    [
        ("bad", True, "no_marker"),
        ("bad[f]so so", True, "no_marker"),
        ("bad[r]good", True, "no_marker"),
        ("bad[f]so so[r]go", False, "unfinished"),
        ("bad[f]so so[r]123456789", True, "too_long"),
        ("bad[f]so so[r]", True, "empty"),
    ],
)
def test_everything_else_falls_back_to_the_response(text, finished, outcome):
    found = apart(text, finished=finished)
    assert found.outcome == outcome and found.refinement is None
    assert said(found.final) == ("bad" if outcome != "no_marker" or text != "bad[r]good" else text[:9], len(text) < 9
                                 or "[f]" in text)  # fmt: skip


def test_a_response_that_never_ended_is_cut_as_a_sample_is():
    assert said(apart("x" * 99, finished=False).final) == ("x" * 9, False)
    assert said(apart("x" * 30, finished=True).final) == ("x" * 9, False)
    assert said(apart("x" * 30 + "[f]f[r]r").response) == ("x" * 9, False)
    assert said(apart("12345678", finished=True).final) == ("12345678", True)


def test_outcomes_are_counted():
    found = [apart(text) for text in ("a[f]b[r]c", "a", "a[f]b[r]", "a[f]c[r]d")]
    assert outcomes(found) == {"parsed": 2, "empty": 1, "no_marker": 1}
    assert outcomes([]) == {"parsed": 0}
