"""Ids to text while they come: only what cannot change any more is sent, and nothing from a stop sequence on."""

from __future__ import annotations

from collections.abc import Sequence

from pit_jax.text.codec import Codec

_UNKNOWN = "\ufffd"


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the stop sequence that is complete first, and whether there is one.

    Which one that is does not depend on the pieces in which the text comes; of several that are complete at the same
    place the longest counts.
    """
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


class TextStream:
    """Turns the growing ids of one answer into pieces of text, whose sum is the whole text.

    Held back are bytes that are not yet a character, and what may be the beginning of a stop sequence.

    Args:
      codec: turns ids into text.
      stops: sequences that end the answer; they are not part of it.
    """

    def __init__(self, codec: Codec, stops: Sequence[str]) -> None:
        self._codec, self._stops = codec, tuple(stops)
        self._sent = ""
        self.stopped = False

    @property
    def sent(self) -> str:
        """All pieces together."""
        return self._sent

    def feed(self, ids: Sequence[int], *, last: bool = False) -> str:
        """Return the piece that has become certain; `last`: no ids follow."""
        return self.feed_text(self._codec.text(ids), last=last)

    def feed_text(self, text: str, *, last: bool = False) -> str:
        """Return the piece of a whole text that is not sent yet."""
        if self.stopped:
            return ""
        text, self.stopped = cut_at(text, self._stops)
        if not (last or self.stopped):
            text = self._certain(text)
            # Some tokenizers write a token differently once its successor is there: then the end settles it.
            if not text.startswith(self._sent):
                return ""
        piece = text[len(self._sent) :]
        self._sent += piece
        return piece

    def _certain(self, text: str) -> str:
        text = text.rstrip(_UNKNOWN)
        for held in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(len(stop) > held and text.endswith(stop[:held]) for stop in self._stops):
                return text[:-held]
        return text
