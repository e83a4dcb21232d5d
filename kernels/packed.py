"""Frozen matrices in fewer bits than 16, whichever way they are packed."""

import jax
from jaxtyping import Array, Float

from kernels import int8, nf4
from kernels.int8 import Int8Array
from kernels.nf4 import NF4Array

PackedArray = NF4Array | Int8Array


def dense(
    weight: Float[Array, "..."] | PackedArray,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Returns a weight, or a stack of them, as plain numbers.

    Args:
      weight: Packed or dense.
      dtype: Of the result; None keeps that which the weight stands for.
    """
    if isinstance(weight, NF4Array):
        return nf4.dequantize(weight, dtype=dtype)
    if isinstance(weight, Int8Array):
        return int8.dequantize(weight, dtype=dtype)
    return weight if dtype is None else weight.astype(dtype)
