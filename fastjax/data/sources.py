"""Examples from files, folders, globs, Python lists and data set objects."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fastjax.config import DataFormat
from fastjax.data.bad_rows import BadRows
from fastjax.data.conversation import kind_of
from fastjax.data.examples import Example
from fastjax.data.files import data_files, read_rows
from fastjax.data.formats import ExampleReader
from fastjax.data.frame_rows import frame_rows, is_frame
from fastjax.data.hub import hub_rows, is_hub_name
from fastjax.data.report import counted
from fastjax.data.rows import Row
from fastjax.errors import DataError

Source = str | Path | Iterable[object]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How the rows of a source become examples.

    Attributes:
      split: Which files of a folder, or rows of a hub data set, are read.
      data_format: Name of the format, or "auto".
      text_field: Column of the format "text", which "auto" then is.
      column_map: Columns to rename first, as "old=new".
      most_rows: Rows that are read, from the start; a hub set is then streamed. 0 reads
        all.
    """

    split: str = "train"
    data_format: DataFormat = "auto"
    text_field: str | None = None
    column_map: tuple[str, ...] = ()
    most_rows: int = 0


class ExampleStream(Iterable[Example]):
    """Examples of a source, read and checked row by row as they are asked for.

    Args:
      source: A file, glob, folder or hub name, several of them, or an iterable of
        dicts, such as a list or a `datasets.Dataset`, or a pandas DataFrame.
      options: How it is read.
      bad_rows: Counts the broken ones.

    Raises:
      DataError: There is no such file, or nothing of a kind that is read.
    """

    def __init__(self, source: Source, options: ReadOptions, bad_rows: BadRows) -> None:
        self._source, self._bad_rows = source, bad_rows
        self._reader = ExampleReader(
            options.data_format,
            text_field=options.text_field,
            column_map=options.column_map,
        )
        most = options.most_rows
        rows = _rows(source, options.split, bad_rows, streaming=most > 0)
        self._rows = itertools.islice(rows, most) if most else rows

    def __iter__(self) -> Iterator[Example]:
        """Yields the examples, once.

        Raises:
          DataError: A row cannot be used, or there is none; says where.
        """
        is_empty = True
        for example in self._reader.read(self._rows, self._bad_rows):
            is_empty = False
            yield example
        if is_empty and not self._bad_rows.is_spent:
            broken, empty = self._bad_rows.count, self._reader.empty_rows
            raise DataError(
                "there is nothing to train on: no row, or only null and empty ones",
                where=f"{_named(self._source)}: {empty} empty rows, {broken} broken",
                fix="check that it is the right file and split; each row needs text, "
                "such as a prompt and a completion",
                code="FJ-DATA-EMPTY",
            )

    @property
    def data_format(self) -> str:
        """Name of the format; known after the first row."""
        return "" if self._reader.format is None else self._reader.format.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the rows so far, one sentence each."""
        notes = list(self._reader.notes)
        if count := self._reader.empty_rows:
            notes.append(counted(count, "rows left out: null or empty"))
        return tuple(notes)


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
    source: Source, options: ReadOptions | None = None, *, skip_bad_rows: int = 0
) -> ExampleSet:
    """Reads and validates every row of `source`.

    Args:
      source: As of `ExampleStream`.
      options: How it is read.
      skip_bad_rows: Broken rows that are tolerated and counted.

    Raises:
      DataError: Nothing to read, or a row that cannot be used; says where.
    """
    bad_rows = BadRows(skip_bad_rows)
    stream = ExampleStream(source, options or ReadOptions(), bad_rows)
    examples = list(stream)
    notes = (*stream.notes, *bad_rows.notes)
    return ExampleSet(examples=examples, data_format=stream.data_format, notes=notes)


def source_files(source: Source, *, split: str) -> list[Path] | None:
    """Returns the files of a source; None when it is anything but files.

    Raises:
      DataError: There is no such file, or nothing of a kind that is read.
    """
    if isinstance(source, str) and is_hub_name(source):
        return None
    if isinstance(source, str | Path):
        return data_files(source, split=split)
    is_list = isinstance(source, list | tuple) and bool(source)
    if is_list and all(isinstance(item, Path) for item in source):
        paths = [item for item in source if isinstance(item, Path)]
        return [file for path in paths for file in data_files(path, split=split)]
    return None


def _rows(
    source: Source, split: str, bad_rows: BadRows, *, streaming: bool
) -> Iterator[Row]:
    if isinstance(source, str) and is_hub_name(source):
        rows = hub_rows(source, split=split, streaming=streaming)
        return _object_rows(rows, bad_rows)
    if isinstance(source, str | Path):
        files = data_files(source, split=split)
        return itertools.chain.from_iterable(read_rows(f, bad_rows) for f in files)
    if isinstance(source, Mapping):
        raise DataError(
            f"a mapping of data sets is not one data set: {list(map(str, source))}",
            fix="give one of them, such as dataset['train']",
        )
    if is_frame(source):
        return _object_rows(frame_rows(source), bad_rows)
    items = iter(source)
    first = next(items, None)
    items = itertools.chain([] if first is None else [first], items)
    if isinstance(first, str | Path):
        parts = (
            _rows(_path(item), split, bad_rows, streaming=streaming) for item in items
        )
        return itertools.chain.from_iterable(parts)
    return _object_rows(items, bad_rows)


def _object_rows(items: Iterable[object], bad_rows: BadRows) -> Iterator[Row]:
    for number, item in enumerate(items, start=1):
        where = f"row {number}"
        if isinstance(item, Mapping):
            yield Row({str(name): value for name, value in item.items()}, where)
        else:
            what = f"a row must be a dict of columns, not {kind_of(item)}"
            bad_rows.refuse(what, where)


def _path(item: object) -> str | Path:
    if isinstance(item, str | Path):
        return item
    raise DataError(f"a list of files holds a {type(item).__name__}", where=repr(item))


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
