"""Opens data files, compressed ones too, and reads them line by line within limits."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastjax.errors import DataError, EnvironmentFault, printable

MAX_VALUE_BYTES = 16 * 2**20
"""Longest line, row or field that is read."""

_MAX_RATIO = 200
_ALWAYS_BYTES = 64 * 2**20
_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class Line(NamedTuple):
    """One line of a file.

    Attributes:
      text: With its end; empty where `is_too_long`.
      number: From 1.
      is_too_long: It has more than `MAX_VALUE_BYTES` and was skipped.
    """

    text: str
    number: int
    is_too_long: bool = False


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Opens a file, decompressed if its name says so.

    Raises:
      DataError: It cannot be read, or is not what its name says.
    """
    suffix = path.suffix.lower()
    try:
        with DECOMPRESSORS.get(suffix, _plain)(path) as stream:
            yield stream
    except _BROKEN as error:
        raise DataError(
            f"the file is not whole {suffix} data: {printable(error)}",
            where=str(path),
            fix="copy or download it again",
            code="FJ-DATA-READ",
        ) from error
    except OSError as error:
        what = f"the file cannot be read: {printable(error.strerror or error)}"
        raise DataError(what, where=str(path), code="FJ-DATA-READ") from error


def lines(path: Path) -> Iterator[Line]:
    """Yields the lines of a UTF-8 file, with or without a byte order mark.

    Raises:
      DataError: The file cannot be read, or is not UTF-8.
    """
    with opened(path) as file:
        position = number = 0
        while raw := file.readline(MAX_VALUE_BYTES + 1):
            start, number = position, number + 1
            position += len(raw)
            is_too_long = len(raw) > MAX_VALUE_BYTES
            while is_too_long and raw and not raw.endswith(b"\n"):
                raw = file.readline(_BLOCK_BYTES)
                position += len(raw)
                require_honest_size(path, position)
            require_honest_size(path, position)
            if start == 0:
                raw = without_mark(raw, path)
            text = "" if is_too_long else decoded(raw, path, offset=start)
            yield Line(text, number, is_too_long)


def whole(path: Path) -> bytes:
    """Returns what is in a file; stops where it swells out of proportion.

    Raises:
      DataError: The file cannot be read, or swells out of proportion.
    """
    read = io.BytesIO()
    with opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            read.write(block)
            require_honest_size(path, read.tell())
    return read.getvalue()


def require_honest_size(path: Path, position: int) -> None:
    """Returns while a compressed file has not swollen out of proportion.

    Raises:
      DataError: It has.
    """
    if position < _ALWAYS_BYTES or path.suffix.lower() not in DECOMPRESSORS:
        return
    if position > _MAX_RATIO * path.stat().st_size:
        raise DataError(
            f"the file swells to more than {_MAX_RATIO} times its size",
            where=str(path),
            fix="decompress it first if it is what it should be",
            code="FJ-DATA-BOMB",
        )


def decoded(raw: bytes, path: Path, *, offset: int) -> str:
    """Returns text of UTF-8 bytes that stand at `offset` in a file.

    Raises:
      DataError: They are not UTF-8; names the byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, "latin-1") from error


def without_mark(raw: bytes, path: Path) -> bytes:
    """Returns the beginning of a file without its byte order mark.

    Raises:
      DataError: The mark, or a zero byte, says that it is not UTF-8.
    """
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in raw[:4]:
        raise _not_utf8(path, 0, "UTF-16 or UTF-32")
    return raw.removeprefix(_BOM)


def _not_utf8(path: Path, offset: int, guess: str) -> DataError:
    return DataError(
        f"the file is not UTF-8 at byte {offset}; it looks like {guess}",
        where=str(path),
        fix="convert it: iconv -f <its encoding> -t UTF-8",
        code="FJ-DATA-ENCODING",
    )


def _plain(path: Path) -> io.BufferedIOBase:
    return path.open("rb")


def _zstandard(path: Path) -> io.BufferedIOBase:
    stream: Any = arrow().CompressedInputStream(str(path), "zstd")
    return io.BufferedReader(stream, _BLOCK_BYTES)


def arrow() -> Any:
    """Returns the module pyarrow.

    Raises:
      EnvironmentFault: It is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise EnvironmentFault(
            "files of the kinds .parquet, .arrow and .zst need pyarrow",
            fix="pip install pyarrow",
        ) from error
    return pyarrow


DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
"""How files of a suffix are opened."""
