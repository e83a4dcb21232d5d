"""Reads plain text for continued pre-training: a file is one text, in pieces."""

from collections.abc import Iterator
from pathlib import Path

from fastjax.data.bad_rows import BadRows
from fastjax.data.opened_file import lines
from fastjax.data.rows import Row

_PIECE_CHARACTERS = 1 << 18


def read_text_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Yields the pieces of a text file, cut at the ends of lines.

    A piece has about 256 thousand characters, so that no file is too large. What is
    cut there is cut in the middle of a text: no end token is added. The one column is
    called "text".

    Raises:
      DataError: The file is unreadable or not UTF-8, or `bad_rows` is spent.
    """
    piece: list[str] = []
    size, first = 0, 1
    for line in lines(path):
        where = f"{path}:{line.number}"
        if line.is_too_long:
            bad_rows.refuse("the line is longer than 16 MB", where)
            continue
        if size >= _PIECE_CHARACTERS:
            yield _piece(piece, path, first)._replace(is_end=False)
            piece, size, first = [], 0, line.number
        piece.append(line.text)
        size += len(line.text)
    if size:
        yield _piece(piece, path, first)


def _piece(texts: list[str], path: Path, first: int) -> Row:
    text = "".join(texts).replace("\r\n", "\n")
    return Row({"text": text}, f"{path}:{first}", is_start=first == 1)
