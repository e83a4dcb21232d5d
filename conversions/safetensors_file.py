"""Reads single tensors of a safetensors file through the memory map."""

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conversions.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorSpec,
    parse_header,
)
from fastjax.errors import ModelError

_SNIFFED_BYTES = 512
_AGAIN = "delete it and download it again"


class SafetensorsFile:
    """A checked safetensors file.

    Attributes:
      path: The file.
      tensors: Dtype, shape and place of each tensor by name, in file order.
      metadata: Notes of its writer.
    """

    path: Path
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def __init__(self, path: Path) -> None:
        """Reads and checks the header only.

        Raises:
          ModelError: The file is not a whole and well-formed safetensors file.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(_SNIFFED_BYTES)
                header_bytes = _header_bytes(start, size, str(path))
                file.seek(LENGTH_BYTES)
                raw = file.read(header_bytes)
        except OSError as error:
            raise ModelError(
                f"cannot read {path.name}: {error.strerror or error}", where=str(path)
            ) from error
        self._start = LENGTH_BYTES + header_bytes
        self.tensors, self.metadata = parse_header(
            raw, data_bytes=size - self._start, where=str(path)
        )

    def read(self, name: str) -> np.ndarray:
        """Returns a read-only view of one tensor; its pages begin to come in.

        The map covers this tensor only and goes when the view goes.
        """
        spec = self.tensors[name]
        if not spec.nbytes:
            return np.empty(spec.shape, spec.dtype)
        place = self._start + spec.begin
        skipped = place % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(
                    file.fileno(),
                    spec.nbytes + skipped,
                    access=mmap.ACCESS_READ,
                    offset=place - skipped,
                )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot read tensor {name}: {error}", where=str(self.path)
            ) from error
        mapped.madvise(mmap.MADV_WILLNEED)
        flat = np.frombuffer(mapped, np.uint8, spec.nbytes, skipped)
        return flat.view(spec.dtype).reshape(spec.shape)


def _header_bytes(start: bytes, size: int, where: str) -> int:
    _refuse_other_formats(start, where)
    if size < LENGTH_BYTES:
        raise ModelError(
            f"the file has {size} bytes, too few for a safetensors file",
            where=where,
            fix=_AGAIN,
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed",
            where=where,
            fix=f"this is no safetensors file, or it is damaged; {_AGAIN}",
        )
    if LENGTH_BYTES + length > size:
        raise ModelError(
            f"the file is truncated: the header alone needs {LENGTH_BYTES + length} "
            f"bytes, the file has {size}",
            where=where,
            fix=_AGAIN,
        )
    return length


def _refuse_other_formats(start: bytes, where: str) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            "this is a git-lfs pointer, not the weights",
            where=where,
            fix="run: git lfs pull, or download the model with: hf download NAME",
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(
            "this looks like a web page, not the weights",
            where=where,
            fix="download the file itself, for example with: hf download NAME",
        )
    # The bytes may also be the length of a header, which is an object of JSON then.
    is_header = start[LENGTH_BYTES:].startswith(b"{")
    if not is_header and start.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")):
        raise ModelError(
            "this is a pickle of PyTorch; loading one could run code",
            where=where,
            fix="convert the model to safetensors first",
        )
