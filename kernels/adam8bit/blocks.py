"""How a moment is kept in 8 bits."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from kernels.dynamic_map import dynamic_map

BLOCK_SIZE = 256

LEAST_SCALE = np.finfo(np.float32).tiny
"""A block whose values are all below this, 1.2e-38, is one of zeros; the reciprocal of
what is smaller may be infinite."""

MU_MAP, NU_MAP = dynamic_map(is_signed=True), dynamic_map(is_signed=False)
"""What the codes of the first and second moment stand for, times a scale."""


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds pytrees with leaves that are no arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """An array in row-major order, cut into blocks of 256 elements; 1.016 bytes each.

    Attributes:
      codes: Indices into a dynamic map; the last block is filled up with zeros.
      absmax: What the values of a block's codes are multiplied by.
    """

    codes: UInt8[Array, "blocks 256"]
    absmax: Float32[Array, " blocks"]

    @classmethod
    def zeros(cls, size: int) -> "Blocks":
        """Returns an array of zeros, whatever the map."""
        blocks = -(-size // BLOCK_SIZE)
        return cls(
            codes=jnp.zeros((blocks, BLOCK_SIZE), jnp.uint8),
            absmax=jnp.zeros((blocks,), jnp.float32),
        )


def in_blocks(x: Float32[Array, "*S"]) -> Float32[Array, "blocks 256"]:
    """Returns an array in blocks, the last one filled up with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)


def out_of_blocks(
    blocks: Float32[Array, "blocks 256"], shape: tuple[int, ...]
) -> Float32[Array, "*S"]:
    """Returns the array of `shape` that `in_blocks` cut."""
    size = jax.ShapeDtypeStruct(shape, jnp.float32).size
    return blocks.reshape(-1)[:size].reshape(shape)
