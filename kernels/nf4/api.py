"""The public way from 4-bit codes to numbers."""

import jax
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.choice import fastest_first

from . import mosaic_gpu, reference, xla
from .array import NF4Array

_IMPLEMENTATIONS = {
    "xla": xla.dequantize,
    "mosaic_gpu": mosaic_gpu.dequantize,
    "reference": reference.dequantize,
}


def dequantize(
    w: NF4Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*L I O"]:
    """Returns the matrix that `w` stands for, bit-equal with bitsandbytes.

    `float32(code) * float32(scale)`, rounded once to `w.dtype`, then cast to `dtype`.

    Args:
      w: One matrix, or a stack of them along leading axes.
      dtype: Of the result; None keeps `w.dtype`.
      implementation: A name runs that one or fails; None takes the fastest able.

    Raises:
      ValueError: The leaves of `w` do not fit its shape.
      UnsupportedOp: The named implementation cannot run this matrix here.
    """
    _check(w)
    best_first = fastest_first("nf4", {"elements": w.size}, _IMPLEMENTATIONS)
    values = dispatch.run("nf4", best_first, implementation, w)
    if dtype is None or values.dtype == dtype:
        return values
    # Without the barrier XLA would skip the rounding to `w.dtype` on the way.
    return jax.lax.optimization_barrier(values).astype(dtype)


def _check(w: NF4Array) -> None:
    blocks = -(-w.size // w.block_size)
    expected = {"codes": -(-w.size // 2), "absmax": blocks}
    if w.is_double_quantized:
        expected["nested_absmax"] = -(-blocks // w.nested_block_size)
    for name, size in expected.items():
        actual = getattr(w, name).shape[-1]
        if actual != size:
            raise ValueError(f"{w.shape=} needs {size} {name}, got {actual}")
