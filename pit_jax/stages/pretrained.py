"""`load_pretrained`: a checkpoint's model, parameters and tokenizer in one object for everyday use."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pit_jax.core.errors import ConfigError, DataError, invalid
from pit_jax.core.rng import key_for
from pit_jax.core.types import Conditional, Params, Prompts
from pit_jax.decode.batches import row_keys
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.convert import pretrained
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.encoder_decoder import EncoderDecoder
from pit_jax.models.heads import ScalarModel
from pit_jax.models.trained import Network, language_model_of
from pit_jax.stages.artifact import MANIFEST, Artifact, split_reference
from pit_jax.text.codec import PromptRow, rows_to_prompts
from pit_jax.text.tokenizer import Tokenizer, find_tokenizer

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its parameters and its tokenizer; `model, params, tokenizer = ...` takes it apart.

    model: a `ConditionalLM`, or a `ScalarModel` for a checkpoint `...ForSequenceClassification`.
    tokenizer: None where the checkpoint has none.
    eos_ids: what ends an answer.
    """

    model: Network
    params: Params
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer))

    def logits(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        prefix: Any = None,
    ) -> Float[Array, "B L V"]:
        """Return the float32 logits of whole sequences.

        Args:
          input_ids: `[B, L]`, padded on the left or the right.
          attention_mask: `[B, L]`, 1 where there is a token; all by default.
          decoder_input_ids: `[B, T]`, what an encoder-decoder's decoder reads; the logits are then `[B, T, V]`.
          prefix: `[B, L]`, 1 where a decoder-only model attends in both directions (prefix-LM).

        A `ScalarModel` gives its scores, `[B, 1]`.

        Raises:
          ConfigError: the arguments are not those of this kind of model.
        """
        tokens = jnp.asarray(input_ids, jnp.int32)
        mask = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) > 0
        model, encodes = self.model, isinstance(language_model_of(self.model), EncoderDecoder)
        if isinstance(model, ScalarModel):
            return _scores(self.params, tokens, mask, model)
        if encodes != (decoder_input_ids is not None):
            rule = "be given for an encoder-decoder" if encodes else "be left out for a decoder-only model"
            raise invalid("logits.decoder_input_ids", decoder_input_ids, rule, "Change the call.")
        if isinstance(model, EncoderDecoder):
            if prefix is not None:
                fix = "Its encoder attends in both directions anyway."
                raise invalid("logits.prefix", prefix, "be left out for an encoder-decoder", fix)
            return _decoder_logits(self.params, tokens, mask, jnp.asarray(decoder_input_ids, jnp.int32), model)
        assert isinstance(model, DecoderOnly)
        seen = None if prefix is None else jnp.asarray(prefix) > 0
        return _logits(self.params, tokens, mask, seen, model)

    @overload
    def generate(self, prompts: str, attention_mask: None = None, **settings: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], attention_mask: None = None, **settings: Any) -> list[str]: ...
    @overload
    def generate(self, prompts: Any, attention_mask: Any = None, **settings: Any) -> list[list[int]]: ...
    def generate(
        self,
        prompts: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Return continuations of prompts: texts for texts, lists of ids (with the EOS, if there was one) for ids.

        Texts are encoded as they are, with the tokenizer's BOS before them if it has one and the text does not begin
        with it.

        Args:
          prompts: a text, texts, rows of ids, or an array `[B, L]`.
          attention_mask: for an array, 1 where there is a token.
          max_new_tokens: most tokens of a continuation.
          temperature: 0 is greedy.
          top_k: see `decode.sampling.Sampling`.
          top_p: the same.
          seed: of the samples; row b depends on (seed, b) alone.

        Raises:
          DataError: there is no tokenizer for texts, or a prompt is empty.
        """
        if isinstance(prompts, str):
            return self._texts(
                [prompts], max_new_tokens, Sampling(temperature=temperature, top_k=top_k, top_p=top_p), seed
            )[0]
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        if len(prompts) and isinstance(prompts[0], str):
            return self._texts(prompts, max_new_tokens, sampling, seed)
        return self._ids(_rows(prompts, attention_mask), max_new_tokens, sampling, seed)

    def _texts(self, texts: Sequence[str], max_new: int, sampling: Sampling, seed: int) -> list[str]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise DataError("The checkpoint has no tokenizer, so prompts must be rows of token ids.")
        rows = [tokenizer.encode(text) for text in texts]
        bos = tokenizer.bos_id
        rows = [row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows]
        return [tokenizer.decode(row) for row in self._ids(rows, max_new, sampling, seed)]

    def _ids(self, rows: Sequence[Ids], max_new: int, sampling: Sampling, seed: int) -> list[list[int]]:
        if not rows:
            return []
        empty = [number for number, row in enumerate(rows) if not len(row)]
        if empty:
            raise DataError(f"Prompt {empty[0]} has no token. Give at least one.")
        prompts: Prompts = rows_to_prompts([PromptRow(tuple(row), (0, 0)) for row in rows], max(map(len, rows)), 0)
        lm = language_model_of(self.model)
        samples = generate(
            lm,
            self.params,
            prompts,
            row_keys(key_for(seed, "generate"), np.arange(len(rows))),
            sampling,
            max_new=max_new,
            # Without any EOS, an id that is never drawn: generation then ends at `max_new`.
            eos_ids=self.eos_ids or (lm.config.vocab_size,),
            pad_id=0,
        )
        tokens, lengths = np.asarray(samples.tokens), np.asarray(samples.mask).sum(-1)
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def load_pretrained(
    path_or_name: epath.PathLike,
    config: epath.PathLike | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Return a checkpoint's model, parameters and tokenizer.

    Args:
      path_or_name: directory of a Hugging Face or T5X checkpoint, a name on the Hugging Face hub, or a stage of a run
        (`RUN/STAGE` or `RUN/STAGE:SNAPSHOT`).
      config: JSON file (or its content) that describes the network where the checkpoint itself does not: T5X.
      dtype: "float32" or "bfloat16", of parameters and activations; by default that of the files.
      mesh: devices to load onto, by the rules of `sharding.rules`; None is the default device.

    Raises:
      CheckpointError, ConfigError, DataError: the directory is not what it should be; nothing was loaded then.
    """
    place, snapshot = _split(path_or_name)
    if (epath.Path(place) / MANIFEST).exists():
        return _of_stage(Artifact(place), snapshot, config, dtype, mesh)
    directory = pretrained.locate(path_or_name)
    network = pretrained.read_network(directory, config=config, dtype=dtype)
    tokenizer = find_tokenizer(directory)
    _check_vocabulary(directory, network, tokenizer)
    params = pretrained.load(directory, network, mesh)
    eos_ids = pretrained.eos_ids(directory) if tokenizer is None else tokenizer.eos_ids
    return Pretrained(network, params, tokenizer, eos_ids)


def _split(path_or_name: epath.PathLike) -> tuple[str, str | None]:
    place = os.fspath(path_or_name)
    return (place, None) if epath.Path(place).exists() else split_reference(place)


def _of_stage(
    artifact: Artifact, snapshot: str | None, config: Any, dtype: str | None, mesh: Mesh | None
) -> Pretrained:
    if config is not None or dtype is not None:
        raise ConfigError(
            f"{artifact.directory} is a stage of a run, which brings its own config and dtype. Leave both out, or "
            "convert it first with `pit-jax convert`."
        )
    tokenizer = find_tokenizer(artifact.directory / "tokenizer")
    params = artifact.params(snapshot, mesh)
    return Pretrained(artifact.network, params, tokenizer, () if tokenizer is None else tokenizer.eos_ids)


def _check_vocabulary(directory: epath.Path, network: Network, tokenizer: Tokenizer | None) -> None:
    vocabulary = language_model_of(network).config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise DataError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model only {vocabulary}. "
            "They do not belong together: use the checkpoint's own tokenizer."
        )


def _rows(prompts: Any, attention_mask: Any) -> list[Ids]:
    """Return rows of ids without padding."""
    if attention_mask is None:
        return [[int(token) for token in row] for row in prompts]
    tokens, mask = np.asarray(prompts), np.asarray(attention_mask) > 0
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


@functools.partial(jax.jit, static_argnames="model")
def _logits(params: Params, tokens: Array, mask: Array, prefix: Array | None, model: DecoderOnly) -> Array:
    return model.logits(params, tokens, mask, prefix)


@functools.partial(jax.jit, static_argnames="model")
def _decoder_logits(params: Params, tokens: Array, mask: Array, decoder: Array, model: EncoderDecoder) -> Array:
    return model.logits(params, tokens, mask, decoder)


@functools.partial(jax.jit, static_argnames="model")
def _scores(params: Params, tokens: Array, mask: Array, model: ScalarModel) -> Array:
    """Return the scores of sequences without a prompt."""
    nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    x = Conditional(
        prompt=nothing,
        prompt_segments=nothing,
        prompt_reference=nothing > 0,
        response=tokens,
        response_segments=mask.astype(jnp.int32),
    )
    return model.scores(params, x, 1)
