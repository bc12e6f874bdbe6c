"""Any Hugging Face sequence-classification reward model as a judge; needs torch and transformers (extra `judge`).

The third-party judge of PIT (arXiv 2310.00898, section 4.1) is OpenAssistant/reward-model-deberta-v3-large-v2, which
reads the pair (question, answer) and gives one logit. Newer reward models (Skywork, ...) read a chat.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float

from pit_jax.core.errors import CheckpointError, ConfigError, invalid
from pit_jax.evaluation.pairwise import PairJudge, ScoreJudge
from pit_jax.io.progress import Progress
from pit_jax.text.chat import ChatFormat

_LOG = logging.getLogger(__name__)
FORMS = ("pair", "chat", "text")
DTYPES = ("float32", "bfloat16", "float16")
Encoding = dict[str, list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierJudgeConfig:
    """Settings of a sequence classifier as a judge.

    model: name on the hub, or directory. revision: commit, tag or branch. name: in tables; None takes the model's.
    form: how prompt and response are read: "pair" as two texts, "chat" by the tokenizer's chat template, "text" as one.
    margin: differences of scores up to this size are ties. label: class whose log-odds are the score where there are
      several; None takes the only logit, or class 1 of two.
    max_length: tokens read; None takes what the model was made for. batch_size: texts at once.
    device: "cpu", "cuda", "cuda:1", ...; None takes a GPU if torch sees one. dtype: of the weights.
    trust_remote_code: run Python code that comes with the model.
    """

    model: str = "OpenAssistant/reward-model-deberta-v3-large-v2"
    revision: str | None = None
    name: str | None = None
    form: Literal["pair", "chat", "text"] = "pair"
    margin: float = 0.0
    label: int | None = None
    max_length: int | None = None
    batch_size: int = 16
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the choices and ranges."""
        if self.form not in FORMS:
            raise invalid("ClassifierJudgeConfig.form", self.form, f"be one of {FORMS}", "Read the model's card.")
        if self.dtype not in DTYPES:
            raise invalid("ClassifierJudgeConfig.dtype", self.dtype, f"be one of {DTYPES}", "Choose one of them.")
        if not self.margin >= 0:
            raise invalid("ClassifierJudgeConfig.margin", self.margin, "be >= 0", "0 makes only equal scores ties.")
        for name in ("max_length", "batch_size"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise invalid(f"ClassifierJudgeConfig.{name}", value, "be at least 1", "Leave it out for the default.")

    def build(self, directory: epath.PathLike, *, progress: bool = True) -> PairJudge:
        """Load the model and return the judge; `directory`, where other judges keep what they paid for, is not used."""
        del directory
        return ScoreJudge(judge=ClassifierJudge(self, progress=progress), margin=self.margin)


class ClassifierJudge:
    """Scores responses by a sequence classifier; `truncated` counts those that were not read whole.

    score(x, y) = the only logit, or the log-odds of a class: l_k - log sum over j != k of exp(l_j).

    Raises:
      ConfigError: torch or transformers is missing, or `label` names no class.
      CheckpointError: the model cannot be loaded, or has no trained classification head.
    """

    def __init__(self, config: ClassifierJudgeConfig, *, progress: bool = True) -> None:
        self._config, self._progress = config, progress
        self._torch = _imported("torch")
        self._tokenizer, self._model = _load(config, self._torch)
        self._label = _label(config, self._model.config.num_labels, self._model.config.id2label)
        self._max_length = config.max_length or _longest(self._tokenizer, self._model)
        self._batch_size = _padding(self._tokenizer, self._model, config.batch_size)
        self.truncated = 0

    @property
    def name(self) -> str:
        """Name shown in tables and in report.json."""
        return self._config.name or self._config.model

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return one score per (prompt, response); says how many did not fit into `max_length`."""
        before = self.truncated
        encoded = [self._encode(x, y) for x, y in zip(prompts, responses, strict=True)]
        if cut := self.truncated - before:
            _LOG.warning(
                "judge %s: %d of %d texts have more than %d tokens and were cut", self.name, cut, len(encoded),
                self._max_length,
            )  # fmt: skip
        # Texts of one length together need the least padding; long ones first, so that too large a batch fails at once.
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        scores = np.zeros(len(encoded), np.float64)
        with Progress(f"judge {self.name}", len(encoded), start=0, enabled=self._progress) as progress:
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                scores[rows] = self._forward([encoded[i] for i in rows])
                progress.advance(start + len(rows))
        return scores

    def _forward(self, rows: list[Encoding]) -> Float[np.ndarray, " n"]:
        batch = self._tokenizer.pad(rows, padding=len(rows) > 1, return_tensors="pt").to(self._model.device)
        with self._torch.inference_mode():
            logits = self._model(**batch).logits.double()
        if logits.shape[-1] == 1:
            return logits[:, 0].cpu().numpy()
        others = [k for k in range(logits.shape[-1]) if k != self._label]
        return (logits[:, self._label] - logits[:, others].logsumexp(-1)).cpu().numpy()

    def _encode(self, prompt: str, response: str) -> Encoding:
        """Return the model's input for a response, of at most `max_length` tokens."""
        if self._config.form == "pair":
            return self._encode_pair(prompt, response)
        if self._config.form == "chat":
            # A template writes BOS and all marks itself.
            messages = [*_messages(prompt), {"role": "assistant", "content": response}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
            found = self._tokenizer(text, add_special_tokens=False)
        else:
            found = self._tokenizer(prompt + response)
        return {name: self._fit(ids) for name, ids in found.items()} if self._too_long(found) else dict(found)

    def _encode_pair(self, prompt: str, response: str) -> Encoding:
        whole = self._tokenizer(prompt, response)
        if not self._too_long(whole):
            return dict(whole)
        answer = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        room = self._max_length - self._tokenizer.num_special_tokens_to_add(pair=True) - len(answer)
        # The end of the prompt says what is to be answered, and the response is what is judged: both are kept.
        self._tokenizer.truncation_side = "left" if room > 0 else "right"
        rule = "only_first" if room > 0 else "longest_first"
        return dict(self._tokenizer(prompt, response, truncation=rule, max_length=self._max_length))

    def _too_long(self, encoding: Any) -> bool:
        long = len(encoding["input_ids"]) > self._max_length
        self.truncated += long
        return long

    def _fit(self, ids: list[int]) -> list[int]:
        """Return the first id, which may be BOS, and the last ones, where the response is."""
        return [ids[0], *ids[len(ids) - self._max_length + 1 :]]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"A judge from Hugging Face needs {name}, which cannot be imported ({error}). "
            "Install it with: pip install 'pit_jax[judge]'."
        ) from error


def _load(config: ClassifierJudgeConfig, torch: Any) -> tuple[Any, Any]:
    """Return the tokenizer and the model, ready to be run."""
    transformers = _imported("transformers")
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, **where)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            config.model, dtype=vars(torch)[config.dtype], output_loading_info=True, **where
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The judge {config.model!r} cannot be loaded: {error} Check ClassifierJudgeConfig.model."
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers and only warns: such a judge would throw dice.
        raise CheckpointError(
            f"The judge {config.model!r} has no trained weights for {', '.join(missing[:3])}. It is no reward model "
            "or classifier: choose one that was trained as such."
        )
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return tokenizer, model.to(device).eval()


def _label(config: ClassifierJudgeConfig, count: int, names: dict[int, str]) -> int:
    if config.label is None and count > 2:
        fix = f"Set it to one of {names}: the class whose probability says how good a response is."
        raise invalid("ClassifierJudgeConfig.label", None, f"be set for a model of {count} classes", fix)
    label = min(1, count - 1) if config.label is None else config.label
    if not 0 <= label < count:
        raise invalid("ClassifierJudgeConfig.label", label, f"be a class of the model: {names}", "Choose one of them.")
    return label


def _longest(tokenizer: Any, model: Any) -> int:
    """Return the most tokens that tokenizer and model are made for."""
    positions = model.config.to_dict().get("max_position_embeddings")
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def _padding(tokenizer: Any, model: Any, batch_size: int) -> int:
    """Return how many texts can be read at once: one where there is no padding token.

    Models that read the score at the last token find it by the padding token; another token in its place would move it.
    """
    if tokenizer.pad_token_id is None or model.config.pad_token_id is None:
        _LOG.warning("judge %s has no padding token, so texts are read one by one", model.config.name_or_path)
        return 1
    tokenizer.padding_side = "right"
    return batch_size


def _messages(prompt: str) -> Iterator[dict[str, str]]:
    """Return a prompt as messages: a dialogue's turns, or one message of the user's."""
    for message in ChatFormat().messages(prompt) or [{"role": "user", "content": prompt}]:
        yield dict(message)
