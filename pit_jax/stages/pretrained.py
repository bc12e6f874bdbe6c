"""`load_pretrained`: a checkpoint's model, parameters and tokenizer in one object for everyday use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pit_jax.core.errors import ConfigError, DataError, invalid
from pit_jax.core.hub import locate
from pit_jax.core.rng import key_for
from pit_jax.core.types import Conditional, Params, Prompts
from pit_jax.decode.batches import row_keys
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models.convert import pretrained
from pit_jax.models.decoder_only import DecoderOnly
from pit_jax.models.heads import ScalarModel, ValueModel
from pit_jax.models.seq2seq import Seq2Seq
from pit_jax.models.trained import Network, has_head, language_model_of
from pit_jax.sharding.place import fetch
from pit_jax.stages.artifact import Artifact, find_stage
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
          DataError: ids are not rows of one length, or lie outside the vocabulary; a mask has another shape.
        """
        model, vocabulary = self.model, language_model_of(self.model).config.vocab_size
        kind = type(model).__name__
        if isinstance(model, Seq2Seq) != (decoder_input_ids is not None):
            rule = f"be {'given' if isinstance(model, Seq2Seq) else 'left out'} for a model of the kind {kind}"
            raise invalid("logits.decoder_input_ids", _shape(decoder_input_ids), rule, "Change the call.")
        if prefix is not None and not isinstance(model, DecoderOnly):
            rule = f"be left out for a model of the kind {kind}"
            raise invalid("logits.prefix", _shape(prefix), rule, "It is for decoder-only models.")
        tokens = _token_rows("input_ids", input_ids, vocabulary)
        everything = np.ones(tokens.shape, bool)
        mask = everything if attention_mask is None else _mask("attention_mask", attention_mask, tokens)
        if isinstance(model, ScalarModel):
            return _scores(self.params, tokens, mask, model)
        if isinstance(model, Seq2Seq):
            decoder = _token_rows("decoder_input_ids", decoder_input_ids, vocabulary)
            if len(decoder) != len(tokens):
                raise DataError(
                    f"decoder_input_ids has {len(decoder)} rows, and input_ids {len(tokens)}. Give as many."
                )
            return _decoder_logits(self.params, tokens, mask, decoder, model)
        assert isinstance(model, DecoderOnly)
        seen = None if prefix is None else _mask("prefix", prefix, tokens)
        return _logits(self.params, tokens, mask, seen, model)

    @overload
    def generate(
        self, prompts: str, attention_mask: None = None,
        *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ...,
        draft_tokens: int = ...,
    ) -> str: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Sequence[str], attention_mask: None = None,
        *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ...,
        draft_tokens: int = ...,
    ) -> list[str]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Any, attention_mask: Any = None,
        *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ...,
        draft_tokens: int = ...,
    ) -> list[list[int]]: ...  # fmt: skip
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
        draft_tokens: int = 0,
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
          draft_tokens: see `Sampling`; pays where continuations repeat their prompts.

        Raises:
          ConfigError: the model scores sequences, and writes none; or a setting is out of its range.
          DataError: there is no tokenizer for texts, a prompt is empty, or ids are not rows of the vocabulary's ids.
        """
        if has_head(self.model):
            raise ConfigError(f"A {type(self.model).__name__} scores sequences and writes none. Call logits().")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft_tokens=draft_tokens)
        if isinstance(prompts, str):
            return self._texts([prompts], max_new_tokens, sampling, seed)[0]
        if len(prompts) and isinstance(prompts[0], str):
            return self._texts(prompts, max_new_tokens, sampling, seed)
        rows = _rows(prompts, attention_mask, language_model_of(self.model).config.vocab_size)
        return self._ids(rows, max_new_tokens, sampling, seed)

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
        tokens, lengths = fetch(samples.tokens), fetch(samples.mask).sum(-1)
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
    stage = find_stage(path_or_name)
    if stage is not None:
        return _of_stage(*stage, config, dtype, mesh)
    directory = locate(path_or_name)
    network = pretrained.read_network(directory, config=config, dtype=dtype)
    tokenizer = find_tokenizer(directory)
    _check_vocabulary(directory, network, tokenizer)
    params = pretrained.load(directory, network, mesh)
    eos_ids = pretrained.eos_ids(directory) if tokenizer is None else tokenizer.eos_ids
    return Pretrained(network, params, tokenizer, eos_ids)


def _of_stage(
    artifact: Artifact, snapshot: str | None, config: Any, dtype: str | None, mesh: Mesh | None
) -> Pretrained:
    if config is not None or dtype is not None:
        raise ConfigError(
            f"{artifact.directory} is a stage of a run, which brings its own config and dtype. Leave both out, or "
            "convert it first with `pit-jax convert`."
        )
    tokenizer = find_tokenizer(artifact.directory / "tokenizer")
    eos_ids = () if tokenizer is None else tokenizer.eos_ids
    if isinstance(artifact.network, ValueModel):
        # Its scores of tokens were of use in training alone.
        return Pretrained(artifact.lm, artifact.trunk(snapshot, mesh), tokenizer, eos_ids)
    return Pretrained(artifact.network, artifact.params(snapshot, mesh), tokenizer, eos_ids)


def _check_vocabulary(directory: epath.Path, network: Network, tokenizer: Tokenizer | None) -> None:
    vocabulary = language_model_of(network).config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise DataError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model only {vocabulary}. "
            "They do not belong together: use the checkpoint's own tokenizer."
        )


def _rows(prompts: Any, attention_mask: Any, vocabulary: int) -> list[Ids]:
    """Return rows of ids without padding."""
    if attention_mask is not None:
        tokens = _token_rows("prompts", prompts, vocabulary)
        mask = _mask("attention_mask", attention_mask, tokens)
        return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    return [_token_rows(f"prompts[{number}]", [row], vocabulary)[0].tolist() for number, row in enumerate(prompts)]


def _token_rows(name: str, ids: Any, vocabulary: int) -> Int[np.ndarray, "B L"]:
    """Return rows of ids as an array; beyond the vocabulary, an embedding would answer with NaN."""
    try:
        tokens = np.asarray(ids)
    except ValueError:  # Rows of different lengths.
        tokens = np.zeros(0)
    if tokens.ndim != 2 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise DataError(f"{name} must be token ids in rows of one length, [[...], ...]. Pad them, and give their mask.")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise DataError(
            f"{name} has ids from {tokens.min()} to {tokens.max()}, and the model's vocabulary has {vocabulary}. "
            "Use the checkpoint's own tokenizer; pad with any id of it."
        )
    return tokens.astype(np.int32)


def _mask(name: str, mask: Any, tokens: Int[np.ndarray, "B L"]) -> Bool[np.ndarray, "B L"]:
    if np.shape(mask) != tokens.shape:
        raise DataError(f"{name} has the shape {_shape(mask)}, the ids have {tokens.shape}. Give one number for each.")
    return np.asarray(mask) > 0


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return an argument's shape, for errors."""
    return None if value is None else np.shape(value)


@functools.partial(jax.jit, static_argnames="model")
def _logits(params: Params, tokens: Array, mask: Array, prefix: Array | None, model: DecoderOnly) -> Array:
    return model.logits(params, tokens, mask, prefix)


@functools.partial(jax.jit, static_argnames="model")
def _decoder_logits(params: Params, tokens: Array, mask: Array, decoder: Array, model: Seq2Seq) -> Array:
    return model.logits(params, tokens, mask, decoder)


@functools.partial(jax.jit, static_argnames="model")
def _scores(params: Params, tokens: Array, mask: Array, model: ScalarModel) -> Array:
    """Return the scores of sequences without a prompt, for which there is one place of padding."""
    nothing = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    x = Conditional(
        prompt=nothing,
        prompt_segments=nothing,
        prompt_reference=nothing > 0,
        response=tokens,
        response_segments=mask.astype(jnp.int32),
    )
    return model.scores(params, x, 1)
