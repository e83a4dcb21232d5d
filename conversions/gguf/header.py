"""Reads what a GGUF file says of itself; no weight is read.

Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from conversions.gguf.encodings import ENCODINGS
from conversions.gguf.file import ALIGNMENT, MAGIC
from fastjax.errors import ModelError, printable

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _MOST_AXES, _KNOWN_VERSIONS = 8, 9, 4, (2, 3)
# Name, elements and bytes of a block by `ggml_type`; those of llama-quantize too.
_KINDS: dict[int, tuple[str, int, int]] = {
    encoding.type_id: (name, encoding.block_size, encoding.block_bytes)
    for name, encoding in ENCODINGS.items()
} | {
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    20: ("iq4_nl", 32, 18),
    23: ("iq4_xs", 256, 136),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GGUFHeader:
    """Keys and tensors of a file.

    Attributes:
      values: Single values by key; of an array its length.
      tensors: Shape, innermost axis last, and name of the kind of each tensor.
    """

    values: Mapping[str, str | float | int]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]


def read_header(path: Path) -> GGUFHeader:
    """Returns what a file says of itself.

    Raises:
      ModelError: It is no GGUF file, or ends too early.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise ModelError(
            f"cannot read {path.name}: {error.strerror or error}", where=str(path)
        ) from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._where = file, str(path)
        self._size = path.stat().st_size

    def header(self) -> GGUFHeader:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ModelError("this is no GGUF file", where=self._where)
        (version,) = self._numbers("I")
        if version not in _KNOWN_VERSIONS:
            raise ModelError(f"GGUF of version {version}", where=self._where)
        tensor_count, value_count = self._numbers("QQ")
        values = {}
        for _ in range(value_count):
            key = self._string()
            values[key] = self._value(*self._numbers("I"))
        tensors, end = {}, 0
        for _ in range(tensor_count):
            name = self._string()
            (axes,) = self._numbers("I")
            if axes > _MOST_AXES:
                raise self._broken(f"tensor {printable(name)} has {axes} axes")
            *sizes, kind, offset = self._numbers(f"{axes}QIQ")
            known, block, width = _KINDS.get(kind, (f"type {kind}", 1, 0))
            tensors[name] = tuple(reversed(sizes)), known
            end = max(end, offset + math.prod(sizes) // block * width)
        start = self._file.tell()
        alignment = values.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._broken(f"general.alignment={printable(alignment)}")
        start += -start % alignment
        if start + end > self._size:
            raise self._broken(
                f"it ends at byte {self._size:,}, its tensors at {start + end:,}"
            )
        return GGUFHeader(values=values, tensors=tensors)

    def _value(self, kind: int) -> str | float | int:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise self._broken(f"a value of type {kind}")
        item, count = self._numbers("IQ")
        if item == _STRING:
            for _ in range(count):
                self._skip(*self._numbers("Q"))
        elif item in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[item]))
        else:
            raise self._broken(f"an array of type {item}")
        return count

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", self._bytes(struct.calcsize(f"<{kinds}")))

    def _string(self) -> str:
        return self._bytes(*self._numbers("Q")).decode("utf-8", errors="replace")

    def _skip(self, count: int) -> None:
        self._require(count)
        self._file.seek(count, 1)

    def _bytes(self, count: int) -> bytes:
        self._require(count)
        return self._file.read(count)

    def _require(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise self._broken("it ends within its header")

    def _broken(self, what: str) -> ModelError:
        return ModelError(f"the file is broken: {what}", where=self._where)
