"""Checks that configuration dataclasses share."""

import dataclasses
import math
from typing import Any

from fastjax.errors import ConfigError

Number = float | int
"""Written either way, kept as a float."""


def keep_floats(part: Any) -> None:
    """Turns whole numbers in fields of the type `Number` into floats."""
    for field in dataclasses.fields(part):
        if field.type is Number:
            # Frozen, but not yet seen by anyone.
            object.__setattr__(part, field.name, float(getattr(part, field.name)))


def require(part: object, **rules: tuple[bool, str]) -> None:
    """Raises one error for all fields whose values break their rule."""
    broken = [
        f"{name}={getattr(part, name)!r} must be {rule}"
        for name, (is_good, rule) in rules.items()
        if not is_good
    ]
    if broken:
        raise ConfigError.of(broken)


def is_positive(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return math.isfinite(value) and value > 0
