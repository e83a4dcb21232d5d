"""The public way from 4-bit codes to numbers."""

import math
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.choice import fastest_first
from kernels.joint_launch import Work, joint_launch
from kernels.line import NUMBERS_A_LINE

from . import mosaic_gpu, reference, xla
from .array import NF4Array

BESIDE_NAME = "beside_nf4"
"""Name of the kernel where another implementation cannot take the work along."""

Dequantized = tuple[list[jax.Array], list[list[jax.Array]]]
"""Matrices, and the results of each work that ran beside."""


def _one_by_one(
    dequantize: Callable[[NF4Array], jax.Array],
) -> Callable[[Sequence[NF4Array], Sequence[Work]], Dequantized]:
    """Returns the implementation for a group from that for one matrix."""

    def run(weights: Sequence[NF4Array], beside: Sequence[Work]) -> Dequantized:
        results = joint_launch(tuple(beside), name=BESIDE_NAME) if beside else []
        return [*map(dequantize, weights)], results

    return run


_IMPLEMENTATIONS = {
    "xla": _one_by_one(xla.dequantize),
    "mosaic_gpu": mosaic_gpu.dequantize,
    "reference": _one_by_one(reference.dequantize),
}


def dequantize(
    w: NF4Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*L I O"]:
    """Returns the matrix that `w` stands for, bit-equal with bitsandbytes.

    `code * scale` in float32, rounded once to `w.dtype`, then cast to `dtype`; a scale
    of 8 bits is `code * nested scale + offset` (arxiv.org/abs/2305.14314, section 3).

    Args:
      w: One matrix, or a stack of them along leading axes.
      dtype: Of the result; None keeps `w.dtype`.
      implementation: A name runs that one or fails; None takes the fastest able.

    Raises:
      ValueError: The leaves of `w` do not fit its shape.
      UnsupportedOp: The named implementation cannot run this matrix here.
    """
    (values,), _ = dequantize_group((w,), dtype=dtype, implementation=implementation)
    return values


def dequantize_group(
    weights: Sequence[NF4Array],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    beside: Sequence[Work] = (),
    implementation: str | None = None,
) -> Dequantized:
    """Returns (what each of `weights` stands for, results beside) of one launch.

    The matrices are those of `dequantize`.

    Args:
      weights: Matrices, or stacks of them.
      dtype: Of the results; None keeps each one's own.
      beside: What other blocks of the launch do; they need Hopper.
      implementation: A name runs that one or fails; None takes the fastest able.

    Raises:
      ValueError: The leaves of a matrix do not fit its shape.
      UnsupportedOp: The named implementation cannot run these matrices here.
    """
    for w in weights:
        _check(w)
    case = {"elements": sum(w.size for w in weights)}
    best_first = fastest_first("nf4", case, _IMPLEMENTATIONS)
    found, results = dispatch.run(
        "nf4", best_first, implementation, tuple(weights), tuple(beside)
    )
    return [_cast(values, dtype) for values in found], results


def _cast(values: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    if dtype is None or values.dtype == dtype:
        return values
    # Without the barrier XLA would skip the rounding to the own dtype on the way.
    return jax.lax.optimization_barrier(values).astype(dtype)


def _check(w: NF4Array) -> None:
    blocks = -(-w.size // w.block_size)
    expected = {"codes": -(-w.size // 2), "absmax": blocks}
    if w.is_double_quantized:
        expected["nested_absmax"] = -(-blocks // w.nested_block_size)
        expected["nested_offset"] = NUMBERS_A_LINE
    for name, size in expected.items():
        actual = math.prod(getattr(w, name).shape[-1:])
        if actual != size:
            raise ValueError(f"{w.shape=} needs {size} {name}, got {actual}")
