"""Reads rows of comma- or tab-separated files, strictly, with the line of every fault.

The first line names the columns. The separator of a `.csv` is the one of `, ; |` and
tab that the first line holds most. Values are strings. Refused: rows with another
number of fields, text after a closing quote, column names that are empty or occur
twice, fields above 16 MB.
"""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from fastjax.data.bad_rows import BadRows
from fastjax.data.opened_file import MAX_VALUE_BYTES, lines
from fastjax.data.rows import Row
from fastjax.errors import DataError, printable

_SEPARATORS = ",;\t|"


def read_csv_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Yields the rows of one file.

    Raises:
      DataError: The file is unreadable, its first line names no columns, or `bad_rows`
        is spent.
    """
    texts = _texts(path, bad_rows)
    first = next(texts, "")
    is_tabbed = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    separator = "\t" if is_tabbed else max(_SEPARATORS, key=first.count)
    reader = csv.reader(
        itertools.chain([first], texts), delimiter=separator, strict=True
    )
    try:
        names = _next_fields(reader)
    except csv.Error as error:
        raise _no_names(f"the first line is not valid CSV: {error}", path) from error
    _require_names(names, path)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = _next_fields(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad_rows.refuse(f"not valid CSV: {printable(error)}", where)
            continue
        if not fields:
            continue
        if len(fields) != len(names):
            what = f"the row has {len(fields)} fields, the first line {len(names)}"
            bad_rows.refuse(f"{what}; the separator is {separator!r}", where)
            continue
        columns: dict[str, object] = dict(zip(names, fields, strict=True))
        yield Row(columns, where)


def _next_fields(reader: Iterator[list[str]]) -> list[str]:
    """Returns the next fields; raises StopIteration at the end."""
    before = csv.field_size_limit(MAX_VALUE_BYTES)  # One for the whole process.
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _texts(path: Path, bad_rows: BadRows) -> Iterator[str]:
    for line in lines(path):
        if line.is_too_long:
            where = f"{path}:{line.number}"
            bad_rows.refuse("the line is longer than 16 MB", where)
        else:
            yield line.text


def _require_names(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(name.strip() for name in names):
        what = f"the column {printable(twice[0], 40)!r} occurs twice" if twice else ""
        raise _no_names(what or "a column has no name", path)


def _no_names(what: str, path: Path) -> DataError:
    fix = "the first line must name every column once"
    return DataError(what, where=f"{path}:1", fix=fix, code="FJ-DATA-CSV")
