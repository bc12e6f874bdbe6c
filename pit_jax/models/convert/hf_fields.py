"""Fields of a `config.json`, each asked for once: what nobody asked for and nobody knows to be harmless is an error."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pit_jax.core.errors import ConfigError, nearest

_NO_DEFAULT = object()

HARMLESS = frozenset(
    {
        # Where the file comes from, and what wrote it.
        *("architectures", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "finetuning_task"),
        *("model_max_length", "unsloth_version", "unsloth_fixed", "tokenizer_class", "prefix", "task_specific_params"),
        # How transformers computes, not what.
        *("use_cache", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "torchscript"),
        *(
            "cache_implementation",
            "pretraining_tp",
            "chunk_size_feed_forward",
            "gradient_checkpointing",
            "use_bfloat16",
        ),
        *("tf_legacy_loss", "output_attentions", "output_hidden_states", "output_scores", "return_dict"),
        *("return_dict_in_generate", "output_past", "keys_to_ignore_at_inference"),
        # Limits that no formula contains (rope scaling reads max_position_embeddings itself).
        *("max_position_embeddings", "max_sequence_length", "n_positions"),
        # How a model starts and is trained; dropout is the training run's own setting.
        *("initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "resid_pdrop"),
        *("embd_pdrop", "dropout_rate", "classifier_dropout"),
        # Special tokens: the tokenizer's and the generation config's affair.
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id"),
        # Labels of classifiers: the shape of the head says how many there are.
        *("id2label", "label2id", "num_labels", "problem_type"),
        # Settings of generation that older versions kept here.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    }
)
"""Fields that change nothing in what a decoder or T5 computes from tokens, in any family."""

PLAIN_ONLY: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (None, 1, 1.0),
    "auto_map": (None, {}),
}
"""Fields that are known, with the values under which they change nothing; others are not implemented."""


class Fields:
    """A table of settings that remembers which of them were asked for.

    Args:
      data: the table.
      where: the file, for errors.
      path: of the table in the file, such as "text_config."; empty for the file's own.
    """

    def __init__(self, data: Mapping[str, Any], where: str, path: str = "") -> None:
        self._data, self.where, self.path = data, where, path
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def take(self, name: str, default: Any = _NO_DEFAULT) -> Any:
        """Return a field, `default` where it is absent or null.

        Raises:
          ConfigError: it is absent and there is no default.
        """
        self._asked.add(name)
        value = self._data.get(name)
        if value is None:
            if default is _NO_DEFAULT:
                raise ConfigError(f"{self.where}: {self.path}{name} is missing. Copy the file anew, or add the field.")
            return default
        return value

    def nullable(self, name: str, default: Any) -> Any:
        """Return a positive number, None where it is null, `default` where it is absent."""
        return self.number(name, None if name in self else default)

    def integer(self, name: str, default: Any = _NO_DEFAULT) -> Any:
        """Return a whole number, or the default."""
        value = self.take(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.bad(name, "be a whole number", "Correct the file.")
        return value

    def number(self, name: str, default: Any = _NO_DEFAULT) -> Any:
        """Return a number as a float, or the default."""
        value = self.take(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(name, "be a number", "Correct the file.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, "be true or false", "Correct the file.")
        return value

    def choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """Return what a name stands for.

        Raises:
          ConfigError: it is not among the names.
        """
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            hint = nearest(str(value), choices)
            raise self.bad(name, f"be one of {', '.join(choices)}", f"Others are not implemented.{hint}")
        return choices[value]

    def table(self, name: str) -> Fields | None:
        """Return a table inside this one, None where it is absent or null."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.bad(name, "be a table", "Correct the file.")
        return Fields(value, self.where, f"{self.path}{name}.")

    def expect(self, name: str, *allowed: Any) -> None:
        """Check a field that may only have some values, or be absent.

        Raises:
          ConfigError: it has another one.
        """
        self._asked.add(name)
        if name in self._data and self._data[name] not in allowed:
            rule = f"be {' or '.join(_json(value) for value in allowed)}"
            raise self.bad(name, rule, "What else it could mean is not implemented.")

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Check that every field was asked for, or is harmless.

        Raises:
          ConfigError: one is neither, or has a value that is not implemented.
        """
        for name, allowed in PLAIN_ONLY.items():
            if name not in self._asked:
                self.expect(name, *allowed)
        known = self._asked | HARMLESS | set(harmless)
        for name, value in self._data.items():
            if name not in known:
                raise ConfigError(
                    f"{self.where}: field {self.path}{name} = {_json(value)} is unknown, so this may be another "
                    f"model than it seems.{nearest(name, known)} Remove the field if you are sure that it does not "
                    "change what the model computes."
                )

    def bad(self, name: str, rule: str, fix: str) -> ConfigError:
        """Return the error for one of the fields."""
        return ConfigError(f"{self.where}: {self.path}{name} = {_json(self._data.get(name))} must {rule}. {fix}")


def _json(value: Any) -> str:
    """Return a value as the file spells it."""
    return json.dumps(value)
