"""Rows of a pandas DataFrame, which need not be installed."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastjax.errors import DataError


def is_frame(source: object) -> bool:
    """Whether a source is a DataFrame, whose own iteration yields column names."""
    return hasattr(source, "itertuples") and hasattr(source, "columns")


def frame_rows(frame: Any) -> Iterator[dict[str, object]]:
    """Yields the rows of a DataFrame; NaN, NaT and NA are None.

    Raises:
      DataError: Two columns have one name.
    """
    names = [str(name) for name in frame.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"columns of one name: {', '.join(twice)}",
            fix="rename one of them in the DataFrame",
        )
    rows, missing = (
        each.itertuples(index=False, name=None) for each in (frame, frame.isna())
    )
    for values, absent in zip(rows, missing, strict=True):
        cells = (
            None if is_absent else _plain(value)
            for value, is_absent in zip(values, absent, strict=True)
        )
        yield dict(zip(names, cells, strict=True))


def _plain(value: object) -> object:
    """Returns a cell without NumPy's types, as which Parquet's lists are read."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return value.tolist()
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
