"""Reads plain text for continued pre-training: a file is one text, in pieces."""

from collections.abc import Iterator
from pathlib import Path

from fastjax.data.bad_rows import BadRows
from fastjax.data.opened_file import lines
from fastjax.data.rows import Place, Row

_PIECE_CHARACTERS = 1 << 18


def read_text_rows(path: Path, bad_rows: BadRows, start: Place) -> Iterator[Row]:
    """Yields the pieces of a text file, cut at the ends of lines.

    A piece has about 256 thousand characters, so that no file is too large. What is
    cut there is cut in the middle of a text: no end token is added. The one column is
    called "text".

    Raises:
      DataError: The file is unreadable or not UTF-8, or `bad_rows` is spent.
    """
    piece: list[str] = []
    size, first, place = 0, start.number + 1, start
    for line in lines(path, offset=start.offset, number=start.number):
        where = f"{path}:{line.number}"
        if line.is_too_long:
            bad_rows.refuse("the line is longer than 16 MB", where)
            continue
        if size >= _PIECE_CHARACTERS:
            yield _piece(piece, path, first, start, place)._replace(is_end=False)
            piece, size, first = [], 0, line.number
        piece.append(line.text)
        size += len(line.text)
        place = Place(line.end, line.number)
    if size:
        yield _piece(piece, path, first, start, place)


def _piece(texts: list[str], path: Path, first: int, start: Place, place: Place) -> Row:
    text = "".join(texts).replace("\r\n", "\n")
    where = f"{path}:{first}"
    is_start = first == 1 and start.offset == 0
    return Row({"text": text}, where, is_start=is_start, next_place=place)
