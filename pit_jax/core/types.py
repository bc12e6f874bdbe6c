"""The few data structures that cross module boundaries, and the letters for their dimensions.

    B batch rows     S prompt positions     T response positions     D model width
    H query heads    K key/value heads      E head width             F mlp width
    V vocabulary     N layers               G samples per prompt     M packed examples per row
    L S + T          A micro-batches        X prompts, of B = X * G rows

The same letters are used in annotations, einsum strings and docstrings everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
"""Nested plain dictionaries of arrays: what crosses every boundary instead of Flax objects."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rest:
    """The ends of prompts that begin alike: F successive rows continue the same row of `Conditional.prompt`."""

    tokens: Int[Array, "*A Y U"]
    segments: Int[Array, "*A Y U"]
    reference: Bool[Array, "*A Y U"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional:
    """Prompts with their responses: everything a conditional language model is trained or scored on.

    A row holds one example (segment ids are then the padding mask: 1 where there is a token, 0 at padding),
    or several packed ones, numbered 1..M in both halves of the row; a segment's prompt and response share
    its number. Padding is on the right. PIT's `(x, y_ref)` is simply a longer prompt, in which
    `prompt_reference` marks the tokens of `y_ref`. Every response token is trained on, its EOS included.

    Prompts may be shared: X prompts with B = X * G responses, of which successive G have the same prompt, are what
    B rows with that prompt G times are, and models compute it once (`models/sharing.py`). Shared rows are not packed.
    With a `rest`, `prompt` is what Y = X * F prompts begin with, such as x in the F = 2 prompts (x, y_l) and (x, y_w)
    of a record; B is then Y * G.
    """

    prompt: Int[Array, "*A X S"]
    prompt_segments: Int[Array, "*A X S"]
    prompt_reference: Bool[Array, "*A X S"]
    response: Int[Array, "*A B T"]
    response_segments: Int[Array, "*A B T"]
    rest: Rest | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Responses to be scored and the preference records that compare them.

    `index[p, b]` points to the score of pass p of record b in the flattened `[rows, M]` table of scores:
    `row * M + segment - 1`. Passes are (chosen, rejected) for Bradley-Terry, and
    (wl, ww, ll, lw) = (candidate, reference) for the gap model. `weight` is 0 for filler records.
    `length[p, b]` is the number of response tokens, for length statistics.
    """

    inputs: Conditional
    index: Int[Array, "*A P B"]
    weight: Float[Array, "*A B"]
    length: Int[Array, "*A P B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts to be answered; one prompt a row, padded on the right."""

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    reference: Bool[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Sampled responses. `mask` covers every generated token, EOS included; tokens after it are padding.

    passes: passes of the model that each took after the prompt's, where tokens were drafted; None where they were not,
    and each token but the first took one.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logp: Float[Array, "B T"]
    finished: Bool[Array, " B"]
    passes: Int[Array, " B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """Sampled responses with what the policy gradient needs; one example a row (never packed), prompts may be shared.

    logp_sampler: log-probabilities under the parameters that sampled, recorded by the sampler.
    logp_old: the same by the training graph.
    logp_anchor: by the frozen SFT model (the KL anchor) for the same prompt.
    advantage: per token; `returns` and `values_old` are used by PPO's value loss only.
    """

    inputs: Conditional
    logp_sampler: Float[Array, "*A B T"]
    logp_old: Float[Array, "*A B T"]
    logp_anchor: Float[Array, "*A B T"]
    advantage: Float[Array, "*A B T"]
    returns: Float[Array, "*A B T"]
    values_old: Float[Array, "*A B T"]


class TokenScores(NamedTuple):
    """What the language-model head says of each target token, never as `[B, T, V]` in float32.

    logp: log-probability of the target; log_z: log of the softmax normaliser; entropy of the distribution
    in nats (no gradient); correct: 1.0 where the target is the most likely token (no gradient).
    """

    logp: Float[Array, "..."]
    log_z: Float[Array, "..."]
    entropy: Float[Array, "..."]
    correct: Float[Array, "..."]


class Hidden(NamedTuple):
    """Final hidden states (after the last norm) at the prompt's and at the response's positions.

    Shared prompts are there once (Y = B / G) where they do not see their responses. Those with a rest are whole, in the
    columns of `ops.shared.joined`.
    """

    prompt: Float[Array, "Y S D"]
    response: Float[Array, "B T D"]
