"""Writes GGUF files tensor by tensor, in any order.

Format: github.com/ggml-org/ggml, docs/gguf.md, version 3, little-endian.
"""

import contextlib
import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from conversions.gguf.encodings import ENCODINGS
from fastjax.files import new_file

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32

type Value = bool | str | np.generic | np.ndarray | Sequence[str]
PutRows = Callable[..., None]

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    np.dtype(np.uint8): 0,
    np.dtype(np.int32): 5,
    np.dtype(np.uint32): 4,
    np.dtype(np.float32): 6,
}


@dataclasses.dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
      shape: In NumPy's order, the innermost axis last; the file reverses it.
      encoding: Key of `ENCODINGS`.
    """

    shape: tuple[int, ...]
    encoding: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the innermost axis."""
        return ENCODINGS[self.encoding].row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.row_bytes * math.prod(self.shape[:-1])


@contextlib.contextmanager
def gguf_writer(
    path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, GGUFTensor]
) -> Iterator[PutRows]:
    """Yields `put(name, rows, first_row=0)`, which encodes rows into their place.

    Args:
      path: Final name of the file; it appears when every tensor is written.
      metadata: Keys and values; NumPy scalars and arrays say which type they have.
      tensors: Shape and encoding of each tensor.

    Raises:
      ValueError: Rows do not fit their tensor, or rows were not put.
      StorageError: The file cannot be written.
    """
    header, places = _header(metadata, tensors)
    missing = {name: math.prod(t.shape[:-1]) for name, t in tensors.items()}
    with new_file(path) as file:
        file.write(header)

        def put(name: str, rows: np.ndarray, first_row: int = 0) -> None:
            tensor = tensors[name]
            rows = np.atleast_2d(rows)
            missing[name] -= len(rows)
            if rows.shape[-1] != tensor.shape[-1] or missing[name] < 0:
                raise ValueError(f"rows {rows.shape} of {name} do not fit {tensor}")
            file.seek(places[name] + first_row * tensor.row_bytes)
            file.write(ENCODINGS[tensor.encoding].encode(rows).data)

        yield put
        unwritten = [name for name, rows in missing.items() if rows]
        if unwritten:
            raise ValueError(f"{path.name} lacks rows of {unwritten[:10]}")
        file.seek(0, 2)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _header(
    metadata: Mapping[str, Value], tensors: Mapping[str, GGUFTensor]
) -> tuple[bytes, dict[str, int]]:
    """Returns everything before the data, and the place of each tensor."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, raw = _typed(value)
        parts += [_string(key), struct.pack("<I", kind), raw]
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        sizes = tensor.shape[::-1]
        kind = ENCODINGS[tensor.encoding].type_id
        parts.append(_string(name) + struct.pack("<I", len(sizes)))
        parts.append(struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, end))
        end += tensor.nbytes
        end += -end % ALIGNMENT
    header = b"".join(parts)
    header += b"\0" * (-len(header) % ALIGNMENT)
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _typed(value: Value) -> tuple[int, bytes]:
    """Returns type and bytes of a value of the metadata."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, np.generic):
        return _NUMBERS[value.dtype], value.tobytes()
    if isinstance(value, np.ndarray):
        head = struct.pack("<IQ", _NUMBERS[value.dtype], value.size)
        return _ARRAY, head + value.tobytes()
    head = struct.pack("<IQ", _STRING, len(value))
    return _ARRAY, head + b"".join(map(_string, value))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
