"""What a language model that judges is told: templates as text files, and how its verdict is read.

    ### system
    You are an impartial judge. ... "[[A]]" ... "[[B]]" ... "[[C]]" ...
    ### user
    {prompt} ... {first} ... {second}

The form of these files is that of `text/prompt_files.py`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from pit_jax.evaluation.pairwise import Question
from pit_jax.text.prompt_files import Shelf, TwoParts, two_parts

SHELF = Shelf(package="pit_jax.evaluation", folder="prompts", setting="LlmJudgeConfig.template")
OUTCOMES = {"a": 1.0, "b": -1.0, "c": 0.0, "tie": 0.0}
VERDICT_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "explanation": {"type": "string"},
                "verdict": {"type": "string", "enum": ["A", "B", "C"]},
            },
            "required": ["explanation", "verdict"],
            "additionalProperties": False,
        },
    },
}
"""`response_format` of servers that bind their output to a schema; the explanation comes before the verdict."""
MOST_BRACES = 1000
"""Braces of a reply at which a JSON object is looked for."""
_MARK = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)


def shipped() -> list[str]:
    """Return the names of the templates that come with pit_jax."""
    return SHELF.shipped()


def load(name: str) -> TwoParts:
    """Return a template by its name, or from a file ending in `.txt`.

    Raises:
      ConfigError: there is no such template, or its fields are wrong.
      DataError: the file is not UTF-8.
    """
    return two_parts(SHELF.read(name), Question._fields)


def read_verdict(text: str) -> float:
    """Return what a judge's reply says: +1 for A, -1 for B, 0 for C or a tie, nan if it says nothing of the kind.

    A JSON object with "verdict" counts before marks such as [[A]]; of several the last one, which follows the
    explanation. Reasoning and code fences around them do no harm.
    """
    words = [word for found in _objects(text) if (word := str(found.get("verdict")).strip(" []").lower()) in OUTCOMES]
    words = words or [word.lower() for word in _MARK.findall(text)]
    return OUTCOMES[words[-1]] if words else math.nan


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text, those inside of others left out."""
    found, start = [], text.find("{")
    # Bounded, because each try may read to the end of what is no JSON at all.
    for _ in range(MOST_BRACES):
        if start < 0:
            break
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except RecursionError:
            break
        except ValueError:
            end = start + 1
        else:
            found.append(value)
        start = text.find("{", end)
    return found
