"""An endless, seeded, restartable stream of examples, the same whatever the examples are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from pit_jax.core.errors import DataError, invalid
from pit_jax.data.views import Example

State = dict[str, int | str]


class Source(Protocol):
    """A stream of examples whose position can be saved and restored."""

    @property
    def fingerprint(self) -> str:
        """Hash of the examples."""
        ...

    def take(self, n: int) -> list[Example]:
        """Return the next n examples."""
        ...

    def give_back(self, n: int) -> None:
        """Go back by n examples, so that the next `take` starts with them."""
        ...

    def state(self) -> State:
        """Return the position, as JSON."""
        ...

    def restore(self, state: State) -> None:
        """Go to a position that `state` gave."""
        ...


class BlockProvider(Protocol):
    """A finite list of examples in a fixed order, read a stretch at a time.

    Stretches are asked for from front to back, over and over; only a restored position or `give_back` jumps.
    """

    @property
    def fingerprint(self) -> str:
        """Hash of the examples: equal for equal examples in the same order, whatever they are stored in."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def read(self, start: int, stop: int) -> Sequence[Example]:
        """Return examples start..stop-1."""
        ...


class Fingerprint:
    """The hash of a list of examples, fed one by one; every block provider uses this one."""

    def __init__(self) -> None:
        """Start with no examples."""
        self._digest = hashlib.blake2s(digest_size=8)

    def add(self, example: Example) -> None:
        """Append one example."""
        for name in sorted(example):
            ids = np.ascontiguousarray(example[name], "<i4")
            self._digest.update(f"{name}:{ids.size};".encode() + ids.tobytes())

    def value(self) -> str:
        """Return the hash of the examples so far."""
        return self._digest.hexdigest()


class ListBlocks:
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example]):
        """Keep the examples."""
        self._examples = examples
        digest = Fingerprint()
        for example in examples:
            digest.add(example)
        self.fingerprint = digest.value()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def read(self, start: int, stop: int) -> Sequence[Example]:
        """Return examples start..stop-1."""
        return self._examples[start:stop]


def block_order(seed: int, epoch: int, block: int, size: int) -> Int[np.ndarray, " n"]:
    """Return the order in which the `size` examples of one block are given out.

    It is the order of Philox's raw numbers, which NumPy promises never to change (it does not promise that of
    `Generator.permutation`).
    """
    key = hashlib.blake2s(f"{seed}/{epoch}/{block}".encode(), digest_size=16).digest()
    return np.argsort(np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size), kind="stable")


class ShuffledSource:
    """Examples of a block provider, for ever, each exactly once an epoch.

    The list is cut into blocks of `window` examples, which follow each other in order; inside a block the order
    is drawn from (seed, epoch, block). Which example is the n-th depends on n, the seed, the window and the list
    alone: not on who stores it, on batch sizes or on restarts. A window at least as long as the list shuffles all
    of it; 1 does not shuffle.

    Raises:
      DataError: there are no examples.
      ConfigError: the window is less than 1.
    """

    def __init__(self, provider: BlockProvider, *, window: int, seed: int):
        """Start at the first example of epoch 0."""
        if window < 1:
            raise invalid("ShuffledSource.window", window, "be at least 1", "1 does not shuffle; 10000 is usual.")
        if len(provider) == 0:
            raise DataError("The data set has no examples. See the counts of dropped records for why.")
        self._provider = provider
        self._length = len(provider)
        self._window = min(window, self._length)
        self._seed = seed
        self._position = 0
        self._blocks: dict[tuple[int, int], list[Example]] = {}

    @property
    def fingerprint(self) -> str:
        """Hash of the examples."""
        return self._provider.fingerprint

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        return self._length

    def take(self, n: int) -> list[Example]:
        """Return the next n examples."""
        taken: list[Example] = []
        while len(taken) < n:
            epoch, index = divmod(self._position, self._length)
            block, offset = divmod(index, self._window)
            part = self._load(epoch, block)[offset : offset + n - len(taken)]
            taken += part
            self._position += len(part)
        return taken

    def give_back(self, n: int) -> None:
        """Go back by n examples.

        Raises:
          ValueError: so many were never taken.
        """
        if not 0 <= n <= self._position:
            raise ValueError(f"cannot give back {n} of {self._position} examples taken")
        self._position -= n

    def state(self) -> State:
        """Return the position and what it is a position in, as JSON."""
        epoch, index = divmod(self._position, self._length)
        return {"epoch": epoch, "index": index, **self._identity()}

    def restore(self, state: State) -> None:
        """Go to a position that `state` gave; `take` continues as it would have then.

        Raises:
          DataError: the position is not one in these examples, in this order.
        """
        own = self._identity()
        changed = [
            f"{name} {state.get(name)!r} (here {value!r})" for name, value in own.items() if state.get(name) != value
        ]
        if changed:
            raise DataError(
                f"The saved position belongs to another stream of examples, with {', '.join(changed)}. Going on would "
                "skip or repeat examples: restore the data and settings, or start a new run."
            )
        epoch, index = int(state["epoch"]), int(state["index"])
        if epoch < 0 or not 0 <= index < self._length:
            raise DataError(
                f"The saved position {epoch}, {index} is outside of the data set's {self._length} examples."
            )
        self._position = epoch * self._length + index

    def _identity(self) -> State:
        return {
            "fingerprint": self.fingerprint,
            "length": self._length,
            "window": self._window,
            "seed": self._seed,
        }

    def _load(self, epoch: int, block: int) -> list[Example]:
        """Return the examples of a block in their order; the last two are kept, for `give_back` often crosses."""
        if (epoch, block) in self._blocks:
            return self._blocks[epoch, block]
        start = block * self._window
        stop = min(start + self._window, self._length)
        examples = self._provider.read(start, stop)
        if len(examples) != stop - start:
            raise DataError(f"The data set gave {len(examples)} examples for {start}..{stop - 1}: it has changed.")
        self._blocks = dict(list(self._blocks.items())[-1:])
        self._blocks[epoch, block] = [examples[i] for i in block_order(self._seed, epoch, block, stop - start)]
        return self._blocks[epoch, block]
