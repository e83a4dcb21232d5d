"""What every reader of files gives: rows of columns, and where they come from."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where in a file a row begins, so that reading can go on there.

    Attributes:
      offset: Byte of the decompressed file; 0 where rows are counted alone.
      number: Lines before that byte, or rows before the place.
    """

    offset: int = 0
    number: int = 0


START = Place()


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
      where: File and line, or number, for messages.
      is_start: Nothing of the same text comes before it.
      is_end: Nothing of the same text comes after it.
      next_place: Where the row after it begins.
    """

    columns: dict[str, object]
    where: str
    is_start: bool = True
    is_end: bool = True
    next_place: Place = START
