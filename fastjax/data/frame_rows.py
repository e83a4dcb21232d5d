"""Rows of a pandas DataFrame, which need not be installed."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np


def is_frame(source: object) -> bool:
    """Whether a source is a DataFrame, whose own iteration yields column names."""
    return hasattr(source, "itertuples") and hasattr(source, "columns")


def frame_rows(frame: Any) -> Iterator[dict[str, object]]:
    """Yields the rows of a DataFrame; what it holds as NaN is missing."""
    names = [str(name) for name in frame.columns]
    for values in frame.itertuples(index=False, name=None):
        yield dict(zip(names, map(_plain, values), strict=True))


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value
