"""Int8Array: a matrix as signed bytes, and the way there and back.

The numbers are those of LLM.int8 (2208.07339 section 2.1) for weights: a row of Hugging
Face's [O, I] order is divided by its largest magnitude and multiplied by 127.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

# bitsandbytes multiplies by this float32 in the place of a division by 127.
STEP = np.float32(7.874015718698502e-3)
_LARGEST_CODE = 127


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax"],
    meta_fields=["dtype"],
)
@no_type_check  # JAX rebuilds pytrees with leaves that are no arrays
@dataclass(frozen=True, kw_only=True)
class Int8Array:
    """A frozen (I, O) matrix; both leaves may share leading axes, a stack of layers.

    Attributes:
      codes: -127 to 127.
      absmax: Largest magnitude of each output's column.
      dtype: Name of the dtype that dequantised values are rounded to.
    """

    codes: Int8[Array, "*L I O"]
    absmax: Float32[Array, "*L O"]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O) of one matrix."""
        inputs, outputs = self.codes.shape[-2:]
        return inputs, outputs

    @property
    def size(self) -> int:
        """Elements of one matrix."""
        return self.shape[0] * self.shape[1]


def quantize(weight: Float[Array, "I O"]) -> Int8Array:
    """Returns the matrix in 8 bits; a column of zeros stays one."""
    exact = weight.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(exact), axis=0)
    # A quotient and not a product with the inverse, which is infinite for the smallest.
    share = exact / jnp.where(absmax > 0, absmax, 1.0)[None]
    codes = jnp.round(_LARGEST_CODE * share).astype(jnp.int8)
    return Int8Array(codes=codes, absmax=absmax, dtype=weight.dtype.name)


def scaled(
    codes: Int8[Array, "*L _ _"], absmax: Float32[Array, "*L _ _"]
) -> Float32[Array, "*L _ _"]:
    """Returns codes times their scales, in the order of bitsandbytes' products."""
    return codes.astype(jnp.float32) * absmax * STEP


def dequantize(
    w: Int8Array, *, dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*L I O"]:
    """Returns `codes * absmax * STEP`, rounded to `w.dtype`, then cast to `dtype`."""
    values = scaled(w.codes, w.absmax[..., None, :]).astype(w.dtype)
    if dtype is None or values.dtype == dtype:
        return values
    # Without the barrier XLA would skip the rounding to `w.dtype` on the way.
    return jax.lax.optimization_barrier(values).astype(dtype)
