"""Reads rows of Parquet and Arrow files, a thousand at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastjax.data.bad_rows import BadRows
from fastjax.data.opened_file import arrow
from fastjax.data.rows import Row
from fastjax.errors import DataError, printable

_ROWS_A_BATCH = 1000


def read_parquet_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Yields the rows of a Parquet file.

    Raises:
      DataError: It is none, or is broken.
    """
    del bad_rows  # A broken row breaks the file.
    arrow()
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_A_BATCH)

    yield from _rows(batches(), path, "Parquet")


def read_arrow_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Yields the rows of an Arrow file, of the file format or of the stream format.

    Raises:
      DataError: It is neither, or is broken.
    """
    del bad_rows
    arrow()
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                with pyarrow.ipc.open_file(source) as file:
                    places = range(file.num_record_batches)
                    yield from (file.get_batch(place) for place in places)
            else:
                source.seek(0)
                with pyarrow.ipc.open_stream(source) as stream:
                    yield from stream

    yield from _rows(batches(), path, "Arrow")


def _rows(batches: Iterator[Any], path: Path, kind: str) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for first in range(0, batch.num_rows, _ROWS_A_BATCH):
                for columns in batch.slice(first, _ROWS_A_BATCH).to_pylist():
                    number += 1
                    yield Row(columns, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the file is not whole {kind} data: {printable(error)}",
            where=f"{path}:row {number + 1}" if number else str(path),
            fix="write it again, or convert it to .jsonl",
            code="FJ-DATA-READ",
        ) from error
