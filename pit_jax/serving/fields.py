"""Fields of a JSON object, read one by one: each has the right type and range, or the request is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pit_jax.core.errors import nearest
from pit_jax.serving.asked import Refusal


def read_object(body: bytes) -> dict[str, Any]:
    """Return a request's body as a JSON object.

    Raises:
      Refusal: it is none.
    """
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON: {error}"
        raise Refusal(400, f"The body {what}. Send one JSON object in UTF-8.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"The body is a JSON {type(value).__name__}, not an object.", code="invalid_json")
    return value


def bad(param: str, value: object, rule: str) -> Refusal:
    """Return the refusal of a field's value."""
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return Refusal(400, f"{param} = {shown} must {rule}.", param=param, code="invalid_value")


class Fields:
    """A JSON object whose fields are taken out; `null` is as good as absent.

    Args:
      values: the object.
      where: what stands before its fields' names in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where, self._known = where, set[str]()

    def take(self, name: str) -> Any:
        """Return a field's value as it is, None where it is absent."""
        self._known.add(name)
        return self._values.pop(name, None)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Return a whole number between two bounds."""
        value = self.take(name)
        if value is None:
            return default
        # In Python True is an int; in JSON it is none.
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise bad(self._where + name, value, f"be a whole number between {low} and {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a number between two bounds."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise bad(self._where + name, value, f"be a number between {low} and {high}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false, which is the default."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise bad(self._where + name, value, "be true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """Return a text."""
        value = self.take(name)
        return None if value is None else as_text(value, self._where + name)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return the texts of a list, or the one text that stands there instead of a list."""
        value = self.take(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not 1 <= len(values) <= most:
            raise bad(self._where + name, value, f"be a text or a list of 1 to {most} texts")
        return tuple(as_text(one, f"{self._where}{name}[{n}]") for n, one in enumerate(values))

    def choice(self, name: str, options: Sequence[str]) -> str | None:
        """Return one of some words."""
        value = self.take(name)
        if value is not None and value not in options:
            raise bad(self._where + name, value, f"be one of {', '.join(options)}")
        return value

    def group(self, name: str) -> Fields:
        """Return the fields of an object; it has none where it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise bad(self._where + name, value, "be an object")
        return Fields(value or {}, f"{self._where}{name}.")

    def neutral(self, name: str, values: Sequence[Any]) -> None:
        """Refuse a field that asks for something this server cannot do; its neutral values are welcome."""
        value = self.take(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in values):
            raise Refusal(
                400, f"{self._where}{name} is not supported by this server. Leave it out.",
                param=self._where + name, code="unsupported_parameter",
            )  # fmt: skip

    def end(self) -> None:
        """Refuse what was not taken: a field that is ignored would be answered wrongly without a word."""
        for name in self._values:
            message = f"{self._where}{name} is not a known field.{nearest(name, self._known)} Leave it out."
            raise Refusal(400, message, param=self._where + name, code="unknown_parameter")


def as_text(value: object, param: str) -> str:
    """Return a text that can be written as UTF-8: JSON can spell halves of characters, which no tokenizer reads."""
    if not isinstance(value, str):
        raise bad(param, value, "be a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad(param, "...", "hold no half of a surrogate pair") from None
    return value
