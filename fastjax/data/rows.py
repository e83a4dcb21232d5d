"""What every reader of files gives: rows of columns, and where they come from."""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
      where: File and line, or number, for messages.
      is_start: Nothing of the same text comes before it.
      is_end: Nothing of the same text comes after it.
    """

    columns: dict[str, object]
    where: str
    is_start: bool = True
    is_end: bool = True
