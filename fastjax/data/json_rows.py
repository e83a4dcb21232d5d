"""Reads rows of JSON from a file, strictly, with the place of every fault.

Accepted: one object a line (blank lines skipped), one array of objects, or objects
spread over several lines; UTF-8, with or without a byte order mark, any line ends.
Refused: NaN and Infinity, keys that occur twice, values above 16 MB, other encodings.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fastjax.data.bad_rows import BadRows
from fastjax.data.opened_file import (
    MAX_VALUE_BYTES,
    decoded,
    lines,
    opened,
    whole,
    without_mark,
)
from fastjax.data.rows import Row
from fastjax.errors import DataError, printable

_SPACE = re.compile(r"[ \t\r\n]*")


class _RefusedValue(ValueError):
    """JSON that Python's parser would take and this reader does not."""


def read_json_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Yields the rows of one file.

    Raises:
      DataError: The file is unreadable or not UTF-8, or `bad_rows` is spent.
    """
    if _is_document(path):
        text = decoded(without_mark(whole(path), path), path, offset=0)
        yield from _document_rows(text, str(path), bad_rows)
    else:
        yield from _line_rows(path, bad_rows)


def _is_document(path: Path) -> bool:
    """Tells whether values span lines: an array, or pretty-printed objects."""
    with opened(path) as file:
        line = without_mark(file.readline(MAX_VALUE_BYTES + 1), path)
        while line and not line.strip():
            line = file.readline(MAX_VALUE_BYTES + 1)
        first = line.strip()
        if not first.startswith(b"{") or _is_whole(first):
            return first.startswith(b"[")
        text = line + file.read(MAX_VALUE_BYTES)
        return _is_whole_prefix(text.decode("utf-8", errors="replace"))


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole_prefix(text: str) -> bool:
    try:
        json.JSONDecoder().raw_decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError):
        return False
    return True


def _line_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    for line in lines(path):
        where = f"{path}:{line.number}"
        if line.is_too_long:
            bad_rows.refuse("the line is longer than 16 MB", where)
            continue
        text = line.text.rstrip("\r\n")
        if not text.strip():
            continue
        try:
            value = _STRICT.decode(text)
        except json.JSONDecodeError as error:
            near = _around(text, error.pos)
            what = f"not valid JSON: {error.msg}, at {near}"
            bad_rows.refuse(what, f"{where}:{error.pos + 1}")
        except (ValueError, RecursionError) as error:
            bad_rows.refuse(f"not valid JSON: {_reason(error)}", where)
        else:
            yield from _object_row(value, where, bad_rows)


def _document_rows(text: str, name: str, bad_rows: BadRows) -> Iterator[Row]:
    position = _skip_space(text, 0)
    is_array = text[position : position + 1] == "["
    position = _skip_space(text, position + is_array)
    line, counted = 1, 0
    closing = "]" if is_array else ""
    while text[position : position + 1] != closing:
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}:{line}"
        value, end = _document_value(text, position, name, where, bad_rows)
        if end - position > MAX_VALUE_BYTES:
            bad_rows.refuse("the row is longer than 16 MB", where)
        elif not isinstance(value, _RefusedValue):
            yield from _object_row(value, where, bad_rows)
        position = _skip_space(text, end)
        if is_array and text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif is_array and text[position : position + 1] != "]":
            raise _broken(text, position, name, "expected a comma or ]")
    rest = _skip_space(text, position + is_array)
    if rest < len(text):
        raise _broken(text, rest, name, "text after the end of the array")


def _document_value(
    text: str, position: int, name: str, where: str, bad_rows: BadRows
) -> tuple[object, int]:
    """Returns one value and its end; a `_RefusedValue` stands for a counted one."""
    try:
        return _STRICT.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _broken(text, error.pos, name, error.msg) from error
    except _RefusedValue as error:
        bad_rows.refuse(f"not valid JSON: {error}", where)
        return error, json.JSONDecoder().raw_decode(text, position)[1]
    except (ValueError, RecursionError) as error:
        raise _broken(text, position, name, _reason(error)) from error


def _object_row(value: object, where: str, bad_rows: BadRows) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(value, where)
    else:
        shown = printable(json.dumps(value), 60)
        bad_rows.refuse(f"a row must be an object with columns, not {shown}", where)


def _broken(text: str, position: int, name: str, reason: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return DataError(
        f"not valid JSON: {reason}, at {_around(text, position)}",
        where=f"{name}:{line}:{column}",
        fix="correct the file; rows of a file with one object a line can be skipped",
        code="FJ-DATA-JSON",
    )


def _around(text: str, position: int) -> str:
    near = text[max(0, position - 30) : position + 20]
    return printable(near, 80) or "the end"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return printable(error, 120)


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _RefusedValue(f"the key {printable(twice, 60)!r} occurs twice")
    return columns


def _no_constant(name: str) -> object:
    raise _RefusedValue(f"{name} is not a JSON number")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, strict=True
)
