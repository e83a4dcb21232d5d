"""Examples from files, folders, globs, Python lists and data set objects."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fastjax.config import DataFormat
from fastjax.data.bad_rows import BadRows
from fastjax.data.examples import Example
from fastjax.data.files import data_files
from fastjax.data.formats import ExampleReader
from fastjax.data.hub import hub_rows, is_hub_name
from fastjax.data.json_rows import Row, read_json_rows
from fastjax.errors import DataError

Source = str | Path | Iterable[object]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSet:
    """Examples and how they were read.

    Attributes:
      data_format: Name of the format.
      notes: What a user should know, one sentence each.
    """

    examples: list[Example]
    data_format: str
    notes: tuple[str, ...] = ()


def load_examples(
    source: Source,
    *,
    split: str = "train",
    data_format: DataFormat = "auto",
    text_field: str = "text",
    column_map: tuple[str, ...] = (),
    skip_bad_rows: int = 0,
) -> ExampleSet:
    """Reads and validates every row of `source`.

    Args:
      source: A file, glob, folder or hub name, several of them, or an iterable of
        dicts, such as a list or a `datasets.Dataset`.
      split: Which files of a folder are read.
      text_field: Column of the format "text".
      column_map: Columns to rename first, as "old=new".
      skip_bad_rows: Broken rows that are tolerated and counted.

    Raises:
      DataError: Nothing to read, or a row that cannot be used; says where.
    """
    bad_rows = BadRows(skip_bad_rows)
    reader = ExampleReader(data_format, text_field=text_field, column_map=column_map)
    examples = list(reader.read(_rows(source, split, bad_rows), bad_rows))
    if not examples:
        raise DataError(
            "there is nothing to train on: no row, or only null and empty ones",
            where=_named(source),
            fix=f"{reader.empty_rows} empty rows, {len(bad_rows.errors)} broken ones",
            code="FJ-DATA-EMPTY",
        )
    assert reader.format is not None
    notes = list(reader.notes)
    if reader.empty_rows:
        notes.append(f"{reader.empty_rows} rows left out: null or empty")
    if bad_rows.errors:
        first = bad_rows.errors[0]
        count = len(bad_rows.errors)
        notes.append(
            f"{count} broken rows left out, first: {first.what} ({first.where})"
        )
    return ExampleSet(
        examples=examples, data_format=reader.format.name, notes=tuple(notes)
    )


def _rows(source: Source, split: str, bad_rows: BadRows) -> Iterator[Row]:
    if isinstance(source, str) and is_hub_name(source):
        return _object_rows(hub_rows(source, split=split), bad_rows)
    if isinstance(source, str | Path):
        files = data_files(source, split=split)
        return itertools.chain.from_iterable(read_json_rows(f, bad_rows) for f in files)
    if isinstance(source, Mapping):
        raise DataError(
            f"a mapping of data sets is not one data set: {list(map(str, source))}",
            fix="give one of them, such as dataset['train']",
        )
    items = iter(source)
    first = next(items, None)
    items = itertools.chain([] if first is None else [first], items)
    if isinstance(first, str | Path):
        parts = (_rows(_path(item), split, bad_rows) for item in items)
        return itertools.chain.from_iterable(parts)
    return _object_rows(items, bad_rows)


def _object_rows(items: Iterable[object], bad_rows: BadRows) -> Iterator[Row]:
    for number, item in enumerate(items, start=1):
        where = f"row {number}"
        if isinstance(item, Mapping):
            yield Row({str(name): value for name, value in item.items()}, where)
        else:
            kind = type(item).__name__
            bad_rows.refuse(f"a row must be a dict of columns, not a {kind}", where)


def _path(item: object) -> str | Path:
    if isinstance(item, str | Path):
        return item
    raise DataError(f"a list of files holds a {type(item).__name__}", where=repr(item))


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
