"""Reads JSON objects from files that nobody vouches for."""

import json
from pathlib import Path
from typing import Any, NoReturn

from fastjax.errors import ModelError, printable


def read_json_object(path: Path, *, limit_bytes: int) -> dict[str, Any]:
    """Returns the JSON object of a file.

    Args:
      path: The file.
      limit_bytes: Refuses larger files before parsing them.

    Raises:
      ModelError: The file is missing, too large, not UTF-8, or not a JSON object
        with distinct keys and finite numbers.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelError(f"cannot read {path.name}: {reason}", where=str(path)) from (
            error
        )
    if len(raw) > limit_bytes:
        raise ModelError(
            f"{path.name} is larger than {limit_bytes} bytes", where=str(path)
        )
    return parse_json_object(raw, where=str(path))


def parse_json_object(raw: bytes, *, where: str) -> dict[str, Any]:
    """Returns the JSON object that `raw` spells; `where` goes into the error."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse
        )
    except RecursionError as error:
        raise ModelError("JSON is nested too deeply", where=where) from error
    except ValueError as error:
        raise ModelError(
            f"not valid JSON: {printable(error)}",
            where=where,
            fix="copy or download the file again, or correct it",
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"a JSON object is needed, this is {type(value).__name__}", where=where
        )
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {printable(twice)} appears twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
