"""Typed reading of config.json: every refusal names key, value and what is allowed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastjax.errors import ModelError, printable


class ConfigFields:
    """Values of a JSON object with the defaults of its family behind them.

    Attributes:
      values: The object.
      where: The file, for errors.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        where: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps the object; nothing is checked yet."""
        self.values, self.where = values, where
        self._defaults = defaults or {}

    def get(self, key: str) -> Any:
        """Returns a value of any type; missing ones take the default, or are errors."""
        if key in self.values:
            return self.values[key]
        if key in self._defaults:
            return self._defaults[key]
        raise ModelError(f"{key} is missing", where=self.where)

    def error(self, key: str, rule: str) -> ModelError:
        """Returns the error for a value that breaks a rule."""
        shown = printable(repr(self.get(key)))
        return ModelError(f"{key}={shown} must be {rule}", where=self.where)

    def integer(self, key: str, *, minimum: int = 1) -> int:
        """Returns an integer in [minimum, 2**31)."""
        value = self.get(key)
        if type(value) is not int or not minimum <= value < 2**31:
            raise self.error(key, f"an integer of at least {minimum}, below 2**31")
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        """Returns an integer, or None where the file says null."""
        return None if self.get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str) -> float:
        """Returns a positive finite number."""
        value = self.get(key)
        is_number = type(value) is float or (type(value) is int and value < 2**53)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.error(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Returns a positive finite number, or None where the file says null."""
        return None if self.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Returns a list of positive finite numbers."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self.error(key, "a list of positive numbers")
        items = [
            ConfigFields({key: item}, where=self.where).number(key) for item in value
        ]
        return tuple(items)

    def flag(self, key: str) -> bool:
        """Returns true or false."""
        value = self.get(key)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """Returns one of the allowed strings."""
        value = self.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of: {', '.join(allowed)}")
        return value

    def section(self, key: str) -> "ConfigFields | None":
        """Returns a nested object, or None where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigFields(value, where=f"{self.where}, {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Returns token ids: none, one or several; -1 means none."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [value]
        ids = [i for i in ids if i is not None and i != -1]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise self.error(key, "token ids")
        return tuple(ids)
