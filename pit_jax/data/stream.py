"""Examples that can only be read from front to back, as a block provider of `source.ShuffledSource`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from pit_jax.core.errors import DataError
from pit_jax.data.source import Fingerprint
from pit_jax.data.views import Example

# A few hundred bytes each.
_KEEP_EXAMPLES = 50_000


class StreamBlocks:
    """Examples of a stream that can be opened again and again, such as a live SeqIO task.

    The stream is read through once at the start, for its length and fingerprint; a short one is kept in memory. Of a
    longer one, reading goes on from where it is, and a restored position, or the next epoch, opens it again and skips
    to there. A cache (`data/cache.py`) spares all of this.
    """

    def __init__(self, open_stream: Callable[[], Iterator[Example]], *, keep: int = _KEEP_EXAMPLES):
        """Count and hash the examples.

        Args:
          open_stream: starts the stream; every time with the same examples.
          keep: the number of examples up to which they are kept in memory.
        """
        self._open = open_stream
        self._iterator: Iterator[Example] = iter(())
        self._next: int | None = None
        self._kept: list[Example] | None = []
        self._length = 0
        digest = Fingerprint()
        for example in open_stream():
            digest.add(example)
            self._length += 1
            if self._kept is not None:
                self._kept.append(example)
                if self._length > keep:
                    self._kept = None
        self.fingerprint = digest.value()

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._length

    def read(self, start: int, stop: int) -> Sequence[Example]:
        """Return examples start..stop-1.

        Raises:
          DataError: the stream has ended before them.
        """
        if self._kept is not None:
            return self._kept[start:stop]
        if self._next is None or start < self._next:
            self._iterator, self._next = self._open(), 0
        examples = list(itertools.islice(self._iterator, start - self._next, stop - self._next))
        if len(examples) != stop - start:
            raise DataError(f"The data ended before example {stop} of {self._length}: they have changed.")
        self._next = stop
        return examples
