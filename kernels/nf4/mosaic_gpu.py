"""Dequantisation on Hopper at the speed of memory.

A block of one warpgroup decodes a chunk of 8,192 elements. In step j of eight, thread t
reads the word of eight codes number `128 j + t` and writes 16 bytes: both accesses of a
warp are contiguous. The chunk has 128 scales, so each thread computes one, the one of
which its own warp is in need, and shuffles hand them round, as they do the codebook's
sixteen values. Several matrices are one launch.

Bytes an element: 0.5 codes, 0.016 scales, 2 out. Budget: no shared memory, no pipeline
(blocks of the grid overlap one another).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm
from jaxtyping import Array, Float

from kernels.device import require_hopper
from kernels.dispatch import UnsupportedOp
from kernels.joint_launch import Work, joint_launch
from kernels.line import NUMBERS_A_LINE
from kernels.registers import (
    LANES,
    THREADS,
    as_index,
    element,
    fragmented,
    i32,
    int_type,
    lane_index,
    pair_type,
    thread_index,
    vector_of,
)
from kernels.stand_in import stand_in

from . import ptx, rounding
from .array import NF4Array
from .codebooks import CODEBOOKS, DYNAMIC_MAP

KERNEL_NAME = "nf4_dequantize"

_STEPS = 8
_CODES_A_WORD = 8
_CHUNK = THREADS * _STEPS * _CODES_A_WORD
_BLOCK_SIZE = 64
_SCALES = _CHUNK // _BLOCK_SIZE  # one a thread
_CHUNKS_A_NESTED_BLOCK = 2  # 256 scales
_MAX_ELEMENTS = 2**31  # offsets are 32-bit integers

_STEP = _CHUNK // _STEPS
_WARPS = THREADS // LANES
_SCALES_A_STEP = _SCALES // _STEPS // _WARPS  # and warp
_CODES_LAYOUT = plgpu.Layout.WG_STRIDED((_STEP // 2,), 4)
_THREAD_LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), 1)
_OUT_LAYOUT = plgpu.Layout.WG_STRIDED((_STEP,), _CODES_A_WORD)


def dequantize(
    weights: Sequence[NF4Array], beside: Sequence[Work] = ()
) -> tuple[list[Float[Array, "*L I O"]], list[list[Array]]]:
    """Returns the same bits as the reference, and the results of what runs beside.

    Raises:
      UnsupportedOp: Another device, or sizes or dtypes that the kernel lacks.
    """
    require_hopper()
    for w in weights:
        _check(w)
    # The short pieces first, so that none of them is left over at the end.
    works = (*beside, *map(_work, weights))
    results = joint_launch(works, name=KERNEL_NAME)
    matrices = [
        values.reshape(*w.codes.shape[:-1], *w.shape[::-1]).swapaxes(-1, -2)
        for w, (values,) in zip(weights, results[len(beside) :], strict=True)
    ]
    return matrices, results[: len(beside)]


def _work(w: NF4Array) -> Work:
    matrices, chunks = math.prod(w.codes.shape[:-1]), w.size // _CHUNK
    scales = [w.absmax.reshape(-1)]
    if w.nested_absmax is not None and w.nested_offset is not None:
        scales += [w.nested_absmax.reshape(-1), w.nested_offset.reshape(-1)]
        scales += [jnp.asarray(DYNAMIC_MAP)]
    codebook = np.tile(CODEBOOKS[w.code], THREADS // ptx.CODES)
    return Work(
        operands=(w.codes.reshape(-1), jnp.asarray(codebook), *scales),
        results=(jax.ShapeDtypeStruct((matrices * w.size,), w.dtype),),
        blocks=matrices * chunks,
        run=_Decode(dtype=w.dtype, chunks=chunks),
    )


def _check(w: NF4Array) -> None:
    if w.dtype not in ptx.FORMATS:
        raise UnsupportedOp(f"{w.dtype=} must be one of {', '.join(ptx.FORMATS)}")
    if w.block_size != _BLOCK_SIZE:
        raise UnsupportedOp(f"{w.block_size=} must be {_BLOCK_SIZE}")
    if w.is_double_quantized and w.nested_block_size != 256:
        raise UnsupportedOp(f"{w.nested_block_size=} must be 256")
    if w.size % _CHUNK:
        raise UnsupportedOp(f"{w.shape=} must have a multiple of {_CHUNK} elements")
    if 2 * w.codes.size >= _MAX_ELEMENTS:
        raise UnsupportedOp(f"{w.codes.shape=} must hold fewer than 2**31 elements")


@dataclass(frozen=True, kw_only=True)
class _Decode:
    """A block that decodes a chunk.

    Attributes:
      dtype: Of the values.
      chunks: Of a matrix.
    """

    dtype: str
    chunks: int

    def __call__(
        self, chunk, codes_gmem, codebook_gmem, absmax_gmem, *nested_and_out
    ) -> None:
        *nested_gmem, out_gmem = nested_and_out
        codes = [
            plgpu.load(
                codes_gmem.at[
                    pl.ds((chunk * _STEPS + step) * (_STEP // 2), _STEP // 2)
                ],
                layout=_CODES_LAYOUT,
            )
            for step in range(_STEPS)
        ]
        codebook = plgpu.load(codebook_gmem, layout=_THREAD_LAYOUT)
        scales = [absmax_gmem.at[pl.ds(chunk * _SCALES, _SCALES)]]
        if nested_gmem:
            nested_absmax, offset, dynamic_map = nested_gmem
            matrix = lax.div(chunk, jnp.int32(self.chunks))
            chunk_of_matrix = lax.rem(chunk, jnp.int32(self.chunks))
            nested_blocks = -(-self.chunks // _CHUNKS_A_NESTED_BLOCK)
            nested = lax.div(chunk_of_matrix, jnp.int32(_CHUNKS_A_NESTED_BLOCK))
            nested += matrix * nested_blocks
            scales.append(nested_absmax.at[pl.ds(nested, 1)])
            scales += [offset.at[pl.ds(matrix * NUMBERS_A_LINE, 1)], dynamic_map]
        scale = _scales_by_thread(scales)
        for step, own in enumerate(codes):
            values = _decode(own, codebook, scale, step, self.dtype)
            out_gmem[pl.ds((chunk * _STEPS + step) * _STEP, _STEP)] = values


def _scales_by_thread(references) -> Array:
    """Returns the scales of a chunk in `_THREAD_LAYOUT`, as threads compute them.

    Warp w decodes blocks `16 j + 4 w + k` with k < 4 in step j; lane `4 j + k` has it.
    """

    @plgpu.inline_mgpu(
        arg_types=[plgpu.RefType()] * len(references),
        return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, _THREAD_LAYOUT),
    )
    @stand_in(_scales_in_jnp)
    def scales(_, absmax, *nested):
        scale = _scale(_scale_of_thread(), absmax, nested)
        return fragmented([vector_of([scale])], (THREADS,), _THREAD_LAYOUT)

    return scales(*references)


def _scales_in_jnp(absmax: Array, *nested: Array) -> Array:
    scales = absmax
    if nested:
        nested_absmax, offset, dynamic_map = nested
        factor = jnp.broadcast_to(nested_absmax, absmax.shape)
        scales = rounding.product(dynamic_map[absmax], factor) + offset
    by_step = scales.reshape(_STEPS, _WARPS, _SCALES_A_STEP)
    return by_step.swapaxes(0, 1).reshape(THREADS)


def _decode(codes, codebook, scale, step: int, dtype: str) -> Array:
    """Returns the values of a step in `_OUT_LAYOUT`."""

    @plgpu.inline_mgpu(
        arg_types=(_CODES_LAYOUT, _THREAD_LAYOUT, _THREAD_LAYOUT),
        return_type=plgpu.ShapeDtypeStruct((_STEP,), jnp.dtype(dtype), _OUT_LAYOUT),
    )
    @stand_in(functools.partial(_decode_in_jnp, step=step, dtype=dtype))
    def decode(_, *registers):
        return _machine_code(*registers, step=step, dtype=dtype)

    return decode(codes, codebook, scale)


def _decode_in_jnp(
    codes: Array, codebook: Array, scale: Array, *, step: int, dtype: str
) -> Array:
    """What `_machine_code` computes."""
    by_warp = scale.reshape(_WARPS, _STEPS, _SCALES_A_STEP)
    scales = jnp.repeat(by_warp[:, step].reshape(-1), _BLOCK_SIZE)
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    return (codebook[nibbles] * scales).astype(dtype)


def _machine_code(codes, codebook, scale, *, step: int, dtype: str):
    """Emits the decoding of a step."""
    # Eight threads share a block: theirs is number `lane / 8` of the warp's four.
    owner = arith.addi(i32(_SCALES_A_STEP * step), arith.divui(lane_index(), i32(8)))
    shuffled = nvvm.shfl_sync(
        i32(-1),
        element(scale.registers[0], 0),
        owner,
        i32(LANES - 1),
        nvvm.ShflKind.idx,
    )
    word = mgpu.utils.bitcast(codes.registers[0], int_type(32))
    value = element(codebook.registers[0], 0)
    outputs = llvm.inline_asm(
        llvm.StructType.get_literal([int_type(32)] * 4),
        [word, value, shuffled],
        ptx.decode_word(dtype),
        ptx.CONSTRAINTS,
    )
    words = [llvm.extractvalue(int_type(32), outputs, [i]) for i in range(4)]
    pairs = [mgpu.utils.bitcast(word, pair_type(dtype)) for word in words]
    return fragmented([mgpu.utils.vector_concat(pairs)], (_STEP,), _OUT_LAYOUT)


def _scale_of_thread():
    """Returns which of the chunk's scales a thread computes."""
    thread = thread_index()
    lane = arith.remui(thread, i32(LANES))
    warp = arith.divui(thread, i32(LANES))
    step, k = arith.divui(lane, i32(4)), arith.remui(lane, i32(4))
    within_step = arith.addi(arith.muli(warp, i32(4)), k)
    return arith.addi(arith.muli(step, i32(16)), within_step)


def _scale(block, absmax, nested):
    """Loads a block's scale; an 8-bit one is multiplied, then added, each rounded."""
    scale = memref.load(absmax, [as_index(block)])
    if not nested:
        return scale
    nested_absmax, offset, dynamic_map = nested
    code = arith.extui(int_type(32), scale)
    operands = [
        memref.load(dynamic_map, [as_index(code)]),
        memref.load(nested_absmax, [as_index(i32(0))]),
        memref.load(offset, [as_index(i32(0))]),
    ]
    assembly = "{\n.reg .f32 p;\nmul.rn.f32 p, $1, $2;\nadd.rn.f32 $0, p, $3;\n}"
    return llvm.inline_asm(ir.F32Type.get(), operands, assembly, "=f,f,f,f")
