"""What a critic that is a language model is told: templates as text files (see `text/prompt_files.py`).

### system
You are a strict and helpful critic. ...
### user
{prompt} ... {response} ...
"""

from __future__ import annotations

from pit_jax.text.prompt_files import Shelf, TwoParts, two_parts

FIELDS = ("prompt", "response")
SHELF = Shelf(package="pit_jax.srt", folder="prompts", setting="EndpointCriticConfig.critique, .score")


def shipped() -> list[str]:
    """Return the names of the templates that come with pit_jax."""
    return SHELF.shipped()


def load(name: str) -> TwoParts:
    """Return a template by its name, or from a file ending in `.txt`.

    Raises:
      ConfigError: there is no such template, or its fields are wrong.
      DataError: the file is not UTF-8.
    """
    return two_parts(SHELF.read(name), FIELDS)
