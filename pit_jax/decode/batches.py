"""Any number of prompts through one compiled program: padding to fixed shapes, sampling, scoring."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from pit_jax.core.errors import DataError, invalid
from pit_jax.core.types import Conditional, Params, Prompts, Samples
from pit_jax.decode import refill
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.api import ConditionalLM
from pit_jax.sharding.place import fetch, in_turn, put_batch, row_parts
from pit_jax.text.codec import Codec, PromptRow, rows_to_prompts


class RewardModel(Protocol):
    """What gives a scalar to each response of a batch, such as `models.heads.ScalarModel`; hashable."""

    def scores(self, params: Params, x: Conditional, count: int) -> Float[Array, "B M"]:
        """Return the scores of the `count` examples that a row can hold."""
        ...


class Response(NamedTuple):
    """A response as token ids without its EOS, and whether it had one (it is cut off where it had not)."""

    ids: tuple[int, ...]
    finished: bool

    def closed(self, eos_id: int) -> tuple[int, ...]:
        """Return the tokens as models read them: `eos_id` ends a finished response, a cut one stays open."""
        return (*self.ids, eos_id) if self.finished else self.ids


def responses(samples: Samples) -> list[Response]:
    """Return the rows of `samples` as lists of ids, whichever EOS ended them."""
    tokens, lengths, finished = (np.asarray(x) for x in (samples.tokens, samples.mask.sum(-1), samples.finished))
    return [
        Response(tuple(int(token) for token in row[: length - bool(end)]), bool(end))
        for row, length, end in zip(tokens, lengths, finished, strict=True)
    ]


def as_reference(codec: Codec, answer: Response) -> tuple[int, ...]:
    """Return a response as the reference of an improver or gap prompt.

    Models can say anything: BOS, which a prompt has only once, is left out, and a response that was cut off
    at the last token loses what a reference has no room for (a place is kept for the EOS it does not have).
    """
    ids = tuple(token for token in answer.ids if token != codec.tokenizer.bos_id)
    return ids if answer.finished else ids[: codec.lengths.targets - 1]


def with_answers(prompts: Prompts, answers: Sequence[Sequence[int]], length: int, pad_id: int) -> Conditional:
    """Return prompts with their complete answers (EOS included), padded on the right to `length`, as NumPy arrays.

    Raises:
      DataError: an answer is longer than `length`.
    """
    lengths = np.array([len(answer) for answer in answers], np.int32)
    if len(answers) and lengths.max() > length:
        worst = int(lengths.argmax())
        fix = "Shorten it, or raise Lengths.targets."
        raise DataError(f"Response {worst} has {lengths[worst]} tokens and must have at most {length}. {fix}")
    mask = np.arange(length)[None, :] < lengths[:, None]
    tokens = np.full(mask.shape, pad_id, np.int32)
    tokens[mask] = [token for answer in answers for token in answer]
    return Conditional(
        prompt=prompts.tokens,
        prompt_segments=prompts.mask.astype(np.int32),
        prompt_reference=prompts.reference,
        response=tokens,  # pyright: ignore[reportArgumentType]
        response_segments=mask.astype(np.int32),  # pyright: ignore[reportArgumentType]
    )


def with_samples(prompts: Prompts, samples: Samples) -> Conditional:
    """Return prompts with what was sampled for them, token for token: what the policy gradient trains on."""
    return Conditional(
        prompt=prompts.tokens,
        prompt_segments=prompts.mask.astype(np.int32),
        prompt_reference=prompts.reference,
        response=samples.tokens,
        response_segments=samples.mask.astype(np.int32),
    )


def row_keys(key: Key[Array, ""], index: Int[np.ndarray, " N"]) -> Key[Array, " N"]:
    """Return one key for every row, from the number of the row alone."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(index, jnp.uint32))


def chunks(rows: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], int]]:
    """Yield (row numbers, how many are real) of fixed-size batches; the last repeats its first row as filler.

    A filler is a copy with the same key, so it ends when its original does and never delays a batch.
    """
    for start in range(0, rows, size):
        index = np.arange(start, start + size)
        yield np.where(index < rows, index, start), min(size, rows - start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """A language model with everything that fixes how it answers one kind of prompt.

    width: prompts are padded to this many tokens (`codec.width(kind)`).
    max_new: most tokens of a response, EOS included.
    batch_size: rows of the one compiled program.
    mesh: the devices that share the rows of a batch, of all processes; None for one device.
    portions: where there are more samples than a batch has rows, a batch's rows are replaced as they end, in so many
      portions (`decode.refill`); 0: each batch goes on until its last row ends. The samples are the same.
    """

    lm: ConditionalLM
    sampling: Sampling
    width: int
    max_new: int
    eos_ids: tuple[int, ...]
    pad_id: int
    batch_size: int
    mesh: Mesh | None = None
    portions: int = 0

    def __post_init__(self) -> None:
        """Check the batch size and its portions; the rest is checked where it is used."""
        if self.portions < 0:
            raise invalid("Sampler.portions", self.portions, "be at least 0", "Use 0 for whole batches.")
        if self.batch_size < 1:
            raise invalid("Sampler.batch_size", self.batch_size, "be at least 1", "Give the rows of one batch.")

    def prompts_at_once(self, samples: int) -> int:
        """Return how many prompts, with so many samples each, are a batch; 0 where one has too many for sharing it."""
        prompts = self.batch_size // samples
        return prompts if self.mesh is None else prompts - prompts % row_parts(self.mesh)

    def sample(self, params: Params, prompts: Prompts, keys: Key[Array, " N"]) -> Samples:
        """Return a sample for each of N keys as NumPy arrays, computed at most `batch_size` rows at a time.

        Each of X prompts has N / X keys, one after the other. It is read once for all of its samples, unless they are
        more than `batch_size`.

        Raises:
          DataError: the keys cannot be shared out among the prompts.
        """
        return _joined(self._drawn(params, prompts, keys))

    def begin(self, params: Params, prompts: Prompts, keys: Key[Array, " N"]) -> Callable[[], Samples]:
        """Start sampling, and return what waits for the samples and gives them; arguments and errors as of `sample`.

        Where `portions` are refilled the samples are there on return: the host decides who comes next.
        """
        return functools.partial(_joined, list(self._drawn(params, prompts, keys)))

    def _drawn(self, params: Params, prompts: Prompts, keys: Key[Array, " N"]) -> Iterator[tuple[Samples, int]]:
        """Yield the samples of each batch, perhaps still being computed, and how many of them are real."""
        count = len(prompts.tokens)
        if len(keys) % count:
            raise DataError(f"{len(keys)} keys cannot be shared out among {count} prompts. Give each as many.")
        samples = len(keys) // count
        size = self.prompts_at_once(samples)
        if size == 0:
            prompts = jax.tree.map(lambda leaf: np.repeat(leaf, samples, axis=0), prompts)
            count, samples, size = len(keys), 1, self.batch_size
        portion = self.portion(count, samples)
        if portion:
            yield self._refilled(params, prompts, keys, portion), len(keys)
            return
        keys = keys.reshape(count, samples)
        for index, real in chunks(count, size):
            batch, streams = jax.tree.map(lambda leaf, index=index: leaf[index], (prompts, keys))
            batch, streams = _place((batch, streams.reshape(-1)), self.mesh)
            drawn = generate(
                self.lm,
                params,
                batch,
                streams,
                self.sampling,
                max_new=self.max_new,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
            )
            yield in_turn(drawn), real * samples

    def portion(self, count: int, samples: int) -> int:
        """Return how many of `count` prompts take the places of rows that have ended; 0 where a batch stays whole."""
        if not self.portions or count * samples <= self.batch_size:
            return 0
        parts = 1 if self.mesh is None else row_parts(self.mesh)
        # So many rows at least, and so many more that the devices can share the prompts evenly.
        prompts = -(-max(1, self.batch_size // self.portions // samples) // parts) * parts
        return prompts if prompts * samples <= self.batch_size else 0

    @property
    def refilling(self) -> refill.Program:
        """What decides which programs are compiled where rows are replaced."""
        return refill.Program.of(
            self.sampling,
            lm=self.lm,
            rows=self.batch_size,
            max_new=self.max_new,
            eos_ids=tuple(self.eos_ids),
            pad_id=self.pad_id,
        )

    def _refilled(self, params: Params, prompts: Prompts, keys: Key[Array, " N"], portion: int) -> Samples:
        place = functools.partial(_place, mesh=self.mesh)
        return refill.sample(params, prompts, keys, self.sampling.temperature, self.refilling, portion, place)

    def answer(self, params: Params, rows: Sequence[PromptRow], keys: Key[Array, " N"]) -> list[Response]:
        """Return a sampled response for each key, N / X successive ones for each of X prompt rows; none for none."""
        if not rows:
            return []
        return responses(self.sample(params, rows_to_prompts(rows, self.width, self.pad_id), keys))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A reward model with the fixed shapes it is run at.

    width: prompts are padded to this many tokens; length: responses, EOS included.
    batch_size: prompts of the one compiled program. samples: responses of each; with several, the model computes a
      prompt once for them all (`Conditional`).
    mesh: the devices that share the rows of a batch, None for one device.
    """

    model: RewardModel
    width: int
    length: int
    eos_id: int
    pad_id: int
    batch_size: int
    samples: int = 1
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name, value in (("batch_size", self.batch_size), ("samples", self.samples)):
            if value < 1:
                raise invalid(f"Scorer.{name}", value, "be at least 1", "Give a larger number.")

    def score(self, params: Params, rows: Sequence[PromptRow], answers: Sequence[Response]) -> Float[np.ndarray, " N"]:
        """Return the model's scalar for each prompt row with its response.

        With prompts of the policy's kind this is R_P(x, y); with gap prompts, which hold y_ref, it is
        r_gap(y, y_ref | x). A finished response is read with its EOS, as in training; one that was cut off
        has none. An empty finished response is its EOS alone.

        Raises:
          DataError: the rows are no multiple of `samples`, of which successive ones must have the same prompt.
        """
        return self.begin(params, rows, answers)()

    def begin(
        self, params: Params, rows: Sequence[PromptRow], answers: Sequence[Response]
    ) -> Callable[[], Float[np.ndarray, " N"]]:
        """Start scoring, and return what waits for the scores and gives them; arguments and errors as of `score`."""
        if len(rows) % self.samples:
            raise DataError(f"{len(rows)} prompts are not {self.samples} for each. Repeat each prompt as often.")
        closed = [answer.closed(self.eos_id) for answer in answers]
        parts: list[tuple[Int[np.ndarray, " n"], jax.Array]] = []
        for index, real in chunks(len(rows) // self.samples, self.batch_size):
            members = (index[:, None] * self.samples + np.arange(self.samples)[None, :]).reshape(-1)
            prompts = rows_to_prompts([rows[i * self.samples] for i in index], self.width, self.pad_id)
            batch = with_answers(prompts, [closed[i] for i in members], self.length, self.pad_id)
            scored = in_turn(batch_scores(params, _place(batch, self.mesh), self.model))
            parts.append((members[: real * self.samples], scored))

        def wait() -> Float[np.ndarray, " N"]:
            scores = np.zeros(len(rows), np.float32)
            for members, part in parts:
                scores[members] = fetch(part)[: len(members)]
            return scores

        return wait


def _joined(parts: Iterable[tuple[Samples, int]]) -> Samples:
    """Return the real samples of batches as NumPy arrays; waits for each before it asks for the next."""
    fetched = [jax.tree.map(lambda leaf, real=real: leaf[:real], fetch(samples)) for samples, real in parts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *fetched)


def _place(batch: Any, mesh: Mesh | None) -> Any:
    return batch if mesh is None else put_batch(batch, mesh, row_axis=0)


@functools.partial(jax.jit, static_argnames="model")
def batch_scores(params: Params, batch: Conditional, model: RewardModel) -> Float[Array, " B"]:
    """Return the score of the one example of each row: the program of `Scorer`."""
    return model.scores(params, batch, 1)[:, 0]
