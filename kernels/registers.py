"""Arrays as one thread holds them, for machine code written by `plgpu.inline_mgpu`.

An array is in the registers of a warpgroup: each thread has vectors of a few elements,
which of them its layout says. Machine code takes these apart, computes in MLIR or PTX
what its own thread needs, and puts the results together again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

LANES = 32
"""Threads of a warp."""

THREADS = 128
"""Threads of a warpgroup."""

_MLIR_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def int_type(bits: int) -> ir.Type:
    """Returns the type of integers of so many bits; operations say their sign."""
    return ir.IntegerType.get_signless(bits)


def pair_type(dtype: str) -> ir.Type:
    """Returns the type of two numbers of 16 bits in a register of 32."""
    return ir.VectorType.get((2,), ir.Type.parse(_MLIR_NAMES[dtype]))


def i32(value: int) -> ir.Value:
    """Returns a constant of 32 bits."""
    return mgpu.utils.c(value, int_type(32))


def as_index(value: ir.Value) -> ir.Value:
    """Returns an unsigned integer as a place in a reference."""
    return arith.index_castui(ir.IndexType.get(), value)


def thread_index() -> ir.Value:
    """Returns the thread's place in its warpgroup, 0 .. 127."""
    return arith.remui(mgpu.utils.thread_idx(), i32(THREADS))


def lane_index() -> ir.Value:
    """Returns the thread's place in its warp, 0 .. 31."""
    return arith.remui(mgpu.utils.thread_idx(), i32(LANES))


def element(register: ir.Value, place: int) -> ir.Value:
    """Returns one element of a vector."""
    return vector.extract(register, dynamic_position=[], static_position=[place])


def vector_of(elements: Sequence[ir.Value]) -> ir.Value:
    """Returns a vector of elements of one type."""
    type_ = ir.VectorType.get((len(elements),), elements[0].type)
    return vector.from_elements(type_, elements)


def fragmented(
    registers: Sequence[ir.Value],
    shape: tuple[int, ...],
    layout: Any,
    *,
    is_signed: bool | None = None,
) -> mgpu.FragmentedArray:
    """Returns the array of which a thread holds these vectors.

    Args:
      registers: In the order of the layout.
      shape: Of the whole array.
      layout: Of Pallas.
      is_signed: Of integers; None for floating-point numbers.
    """
    layout = layout.to_mgpu()
    own = np.empty((len(registers),), dtype=object)
    own[:] = registers
    return mgpu.FragmentedArray(
        _registers=own.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=is_signed,
    )
