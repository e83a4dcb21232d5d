"""How GGUF stores numbers: plain floats and blocks with a scale."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import ml_dtypes
import numpy as np

from fastjax.errors import EnvironmentFault
from fastjax.requirements import install_command

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """One way to store rows of float32 numbers.

    Attributes:
      type_id: Its number in the table of tensors (`ggml_type`).
      file_type: Its number in `general.file_type` when most tensors have it.
      block_size: Elements that share a scale; 1 for plain floats.
      block_bytes: Bytes of a block.
      encode: Turns float32 rows (M, I) into bytes.
    """

    type_id: int
    file_type: int
    block_size: int
    block_bytes: int
    encode: Callable[[np.ndarray], np.ndarray]

    def row_bytes(self, size: int) -> int:
        """Returns the bytes of a row of `size` elements, whole blocks of them."""
        return size // self.block_size * self.block_bytes

    def fits(self, size: int) -> bool:
        """Whether a row of `size` elements is a whole number of blocks."""
        return size % self.block_size == 0


def _plain(type_id: int, file_type: int, dtype: np.dtype) -> Encoding:
    return Encoding(
        type_id=type_id,
        file_type=file_type,
        block_size=1,
        block_bytes=dtype.itemsize,
        encode=lambda rows: np.ascontiguousarray(rows.astype(dtype)).view(np.uint8),
    )


def _q8_0(rows: np.ndarray) -> np.ndarray:
    """Returns blocks of a float16 scale and 32 signed bytes: scale = max|x| / 127.

    Half a step rounds away from zero, as in C; so the bytes are those of ggml.
    """
    blocks = rows.astype(np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    steps = blocks * inverse
    whole = np.trunc(steps)
    whole += np.trunc(np.float32(2) * (steps - whole))
    scales = scale.astype(np.float16).view(np.uint8)
    return np.concatenate([scales, whole.astype(np.int8).view(np.uint8)], axis=1)


def _by_package(name: str, type_id: int, file_type: int, block_bytes: int) -> Encoding:
    """Returns an encoding whose rounding the `gguf` package does."""

    def encode(rows: np.ndarray) -> np.ndarray:
        package = _gguf_package()
        kind = package.GGMLQuantizationType[name.upper()]
        rows = rows.astype(np.float32)
        # Rounding by addition of large numbers overflows nothing that is kept.
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(package.quantize(rows, kind))

    return Encoding(
        type_id=type_id,
        file_type=file_type,
        block_size=32,
        block_bytes=block_bytes,
        encode=encode,
    )


ENCODINGS: dict[str, Encoding] = {
    "f32": _plain(0, 0, np.dtype(np.float32)),
    "f16": _plain(1, 1, np.dtype(np.float16)),
    "bf16": _plain(30, 32, np.dtype(ml_dtypes.bfloat16)),
    "q8_0": Encoding(
        type_id=8, file_type=7, block_size=32, block_bytes=34, encode=_q8_0
    ),
    "q4_0": _by_package("q4_0", 2, 2, 18),
    "q4_1": _by_package("q4_1", 3, 3, 20),
    "q5_0": _by_package("q5_0", 6, 8, 22),
    "q5_1": _by_package("q5_1", 7, 9, 24),
}


def require_encoder(encoding: str) -> None:
    """Makes sure that an encoding can be written here.

    Raises:
      EnvironmentFault: It needs the `gguf` package, which is not installed.
    """
    if encoding in ("q4_0", "q4_1", "q5_0", "q5_1"):
        _gguf_package()


def _gguf_package():
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentFault(
            "this GGUF type is written by the gguf package, which is not installed",
            fix=f"{install_command('gguf')}, or take f16, bf16, f32 or q8_0",
        ) from error
    return gguf
