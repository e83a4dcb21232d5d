"""NF4Array: a matrix in 4 bits an element, as a pytree."""

import functools
from dataclasses import dataclass
from typing import Literal, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8

from .codebooks import Code


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "nested_offset"],
    meta_fields=[
        *("shape", "dtype", "code", "block_size", "nested_block_size", "layout"),
    ],
)
@no_type_check  # JAX rebuilds pytrees with leaves that are no arrays
@dataclass(frozen=True, kw_only=True)
class NF4Array:
    """A frozen (I, O) matrix as 4-bit codes with a scale for each block.

    The codes run over the matrix in Hugging Face's order, row-major [O, I], and blocks
    cross rows, as in bitsandbytes. All leaves may share leading axes (a stack of
    layers); `shape` is that of one matrix.

    Attributes:
      codes: Two codes a byte, the first in the high nibble; an odd end is filled up
        with the code of zero.
      absmax: Scale of each block: float32, or 8-bit codes of `DYNAMIC_MAP`.
      nested_absmax: Scale of each block of 8-bit codes; None with float32 scales.
      nested_offset: Added to the 8-bit scales, a line of the same number; None with
        float32 scales.
      shape: (I, O).
      dtype: Name of the dtype that dequantised values are rounded to.
      code: Which codebook.
      block_size: Elements that share a scale.
      nested_block_size: Scales that share a nested scale.
      layout: Order in memory.
    """

    codes: UInt8[Array, "*L bytes"]
    absmax: UInt8[Array, "*L blocks"] | Float32[Array, "*L blocks"]
    nested_absmax: Float32[Array, "*L nested_blocks"] | None = None
    nested_offset: Float32[Array, "*L line"] | None = None
    shape: tuple[int, int]
    dtype: str
    code: Code = "nf4"
    block_size: int = 64
    nested_block_size: int = 256
    layout: Literal["row_major"] = "row_major"

    @property
    def size(self) -> int:
        """Elements of one matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that all leaves hold, leading axes included."""
        return sum(
            leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self)
        )

    @property
    def is_double_quantized(self) -> bool:
        """Whether the scales themselves are 8-bit codes."""
        return self.nested_absmax is not None
