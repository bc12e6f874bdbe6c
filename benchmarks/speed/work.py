"""The work that is measured, and how many operations and bytes it takes at least.

Counts are of the plain form: every row goes through the whole model by itself, nothing is shared between rows and
nothing is computed again. So doing less (sharing a prompt) or more (recomputing) shows in tokens a second, not in the
count.
"""

from __future__ import annotations

import dataclasses

from benchmarks.speed.shapes import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Rows of `prompt` tokens and `response` tokens each.

    kind: "sft" (one update on rows whose response tokens are targets), "gap" (one update of a gap model on `rows`
      records of a prompt and two responses, four passes each), "rollout" (sample a response for every row at
      temperature 1, none ends early) or "rl" (the same, then a reward model and an anchor of the same size, and one
      update).
    samples: rows that share a prompt ("rollout", "rl").
    at_once: rows of a batch of a rollout; 0: all.
    mean_length: a rollout's answers end after about so many tokens on average; 0: none ends before `response`.
    """

    kind: str
    rows: int
    prompt: int
    response: int
    samples: int = 1
    at_once: int = 0
    mean_length: int = 0

    def __post_init__(self) -> None:
        """Check the kind, and that the rows can be shared out."""
        if self.kind not in KINDS:
            raise SystemExit(f"work {self.kind!r} must be one of {', '.join(KINDS)}")
        for name in ("at_once", "mean_length"):
            if vars(self)[name] < 0:
                raise SystemExit(f"{name} {vars(self)[name]} must be >= 0; 0 leaves it out")
        if self.rows % self.samples:
            raise SystemExit(f"rows {self.rows} must be a multiple of the {self.samples} samples of a prompt")
        if self.rows % self.batch:
            raise SystemExit(f"rows {self.rows} must be a multiple of the {self.batch} of a batch")

    @property
    def batch(self) -> int:
        """Rows of a batch of a rollout."""
        return self.at_once or self.rows

    def ends(self, vocabulary: int) -> tuple[int, ...]:
        """Return the tokens that end an answer: a share of the vocabulary that random models draw as often."""
        return tuple(range(max(vocabulary // self.mean_length, 1))) if self.mean_length else ()

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Tokens by which throughput is counted: those that are made in a rollout, else all that a step goes through.

        (Where answers end early a record has what was made.)

        A record of a gap step has four passes, each with both responses in it.
        """
        if self.kind == "rollout":
            return self.rows * self.response
        if self.kind == "gap":
            return 4 * self.rows * (self.length + self.response)
        return self.rows * self.length

    @property
    def unit(self) -> str:
        """What `tokens` counts."""
        return "generated tokens/s" if self.kind == "rollout" else "tokens/s"


KINDS = ("sft", "gap", "rollout", "rl")

WORKS: dict[str, dict[str, Work]] = {
    "tiny": {
        "sft": Work(kind="sft", rows=4, prompt=1, response=31),
        "gap": Work(kind="gap", rows=2, prompt=16, response=8),
        "rollout": Work(kind="rollout", rows=4, prompt=16, response=8),
        "ending": Work(kind="rollout", rows=16, prompt=16, response=8, at_once=4, mean_length=3),
        "rl": Work(kind="rl", rows=4, prompt=16, response=8, samples=2),
    },
    "nano": {
        "sft": Work(kind="sft", rows=16, prompt=1, response=255),
        "gap": Work(kind="gap", rows=4, prompt=192, response=32),
        "rollout": Work(kind="rollout", rows=32, prompt=128, response=64),
        "ending": Work(kind="rollout", rows=128, prompt=128, response=64, at_once=32, mean_length=16),
        "rl": Work(kind="rl", rows=32, prompt=128, response=64, samples=2),
    },
    "125m": {
        "sft": Work(kind="sft", rows=32, prompt=1, response=1023),
        "gap": Work(kind="gap", rows=16, prompt=512, response=128),
        "rollout": Work(kind="rollout", rows=128, prompt=256, response=128),
        "ending": Work(kind="rollout", rows=512, prompt=256, response=128, at_once=128, mean_length=32),
        "rl": Work(kind="rl", rows=64, prompt=256, response=128, samples=2),
    },
    "llama-3.2-1b": {
        "sft": Work(kind="sft", rows=16, prompt=1, response=2047),
        "gap": Work(kind="gap", rows=4, prompt=1536, response=256),
        "rollout": Work(kind="rollout", rows=128, prompt=512, response=256),
        "ending": Work(kind="rollout", rows=512, prompt=512, response=256, at_once=128, mean_length=64),
        "rl": Work(kind="rl", rows=64, prompt=512, response=256, samples=2),
    },
}
"""What is measured by default, for each shape of `shapes.SHAPES`."""


def forward(shape: Shape, rows: int, length: int, targets: int) -> int:
    """Return the operations of one pass of `rows` causal rows, two for a multiply-add:

        rows (2 N_linear L + 2 V D L_head + 4 H E N L (L + 1) / 2)

    with N_linear the entries of the layers' matrices, L tokens a row, L_head of them under the output matrix, and
    query t meeting t keys in two products of H E each, in N layers.
    """
    linear = 2 * shape.layer_weights * length + 2 * shape.head_weights * targets
    return rows * (linear + 2 * shape.heads * shape.head_dim * shape.layers * length * (length + 1))


def training(shape: Shape, rows: int, length: int, targets: int) -> int:
    """Return the operations of an update: a backward pass has twice the products of the forward one."""
    return 3 * forward(shape, rows, length, targets)


def prefill(shape: Shape, work: Work) -> int:
    """Return the operations of reading the prompts, up to the logits of each one's last token."""
    return forward(shape, work.rows, work.prompt, 1)


def decoding(shape: Shape, work: Work) -> int:
    """Return the operations of the response's other tokens, each of which meets all tokens before it."""
    steps = work.response - 1
    met = sum(work.prompt + step for step in range(1, steps + 1))
    linear = steps * 2 * (shape.layer_weights + shape.head_weights)
    return work.rows * (linear + 4 * shape.heads * shape.head_dim * shape.layers * met)


def operations(shape: Shape, work: Work) -> int:
    """Return the operations of one step of the work."""
    if work.kind == "sft":
        return training(shape, work.rows, work.length, work.response)
    if work.kind == "gap":
        return training(shape, 4 * work.rows, work.length + work.response, 0)
    sampled = prefill(shape, work) + decoding(shape, work)
    if work.kind == "rollout":
        return sampled
    scored = forward(shape, work.rows, work.length, 0) + forward(shape, work.rows, work.length, work.response)
    return sampled + scored + training(shape, work.rows, work.length, work.response)


def decoding_bytes(shape: Shape, work: Work) -> int:
    """Return the fewest bytes that decoding reads: all weights once a step, and the keys and values that are live."""
    steps = work.response - 1
    live = sum(work.prompt + step for step in range(1, steps + 1))
    weights = steps * (shape.layer_weights + shape.head_weights)
    return shape.itemsize * (weights + work.rows * shape.cache_entries * live)


def updating_bytes(shape: Shape) -> int:
    """Return the fewest bytes of an update with AdamW in float32, activations left out.

    Weights are read in the forward and in the backward pass as they are computed with; a gradient is written and read;
    parameters and two moments are read and written.
    """
    return shape.parameters * (2 * shape.itemsize + 2 * 4 + 2 * 3 * 4)


def least_bytes(shape: Shape, work: Work) -> int:
    """Return the fewest bytes of memory that a step must move, activations left out."""
    weights = shape.itemsize * (shape.layer_weights + shape.head_weights)
    if work.kind in ("sft", "gap"):
        return updating_bytes(shape)
    sampled = weights + decoding_bytes(shape, work)
    return sampled if work.kind == "rollout" else sampled + 2 * weights + updating_bytes(shape)


def rollout_floor(shape: Shape, work: Work, *, matmul: float, bandwidth: float) -> tuple[float, float]:
    """Return the least seconds of (prefill, decoding): by operations a second, and by bytes a second."""
    slowest = max(decoding_bytes(shape, work) / bandwidth, decoding(shape, work) / matmul)
    return prefill(shape, work) / matmul, slowest
