"""What the product of few rows does to codes and scales, in each thread's registers.

A warpgroup takes a unit of 64 outputs and 256 contracted elements at a time. Each piece
is written twice: in MLIR, as a thread does it, and in jnp, for the interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array

from kernels.nf4 import ptx, rounding
from kernels.nf4.codebooks import CODEBOOKS, Code
from kernels.registers import (
    LANES,
    THREADS,
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

OUTPUTS = 64  # of a warpgroup
UNIT = 256  # contracted elements of a step
BLOCK = 64  # codes with one scale
BLOCKS = UNIT // BLOCK
NESTED_BLOCK = 256

CODES_LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X  # eight bytes in a row for each thread
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
_SPLAT = plgpu.Layout.WG_STRIDED((THREADS,), 1)
_FETCHED = plgpu.Layout.WG_STRIDED((THREADS * 4,), 4)


@functools.cache
def value_words(code: Code, dtype: str) -> tuple[np.ndarray, float]:
    """Returns a word for each byte of codes, and what its values are multiplied with.

    A word holds both codes' values in 16 bits, the first one's in the low half. The
    common factor, taken out of the scales, is the one of 4,096 for which rounding moves
    the values the least: NF4's by 6e-4 of their size in bfloat16.
    """
    codebook = CODEBOOKS[code].astype(np.float64)

    def rounded(factor: float) -> np.ndarray:
        return (factor * codebook).astype(jnp.dtype(dtype))

    def distance(factor: float) -> float:
        moved = rounded(factor).astype(np.float64) / factor - codebook
        return float(np.sum(moved**2))

    factor = min((1 + np.arange(4096) / 4096).tolist(), key=distance)
    octets = np.arange(256)
    both = rounded(factor)[np.stack([octets >> 4, octets & 15], axis=-1)]
    return both.view(np.int32)[:, 0], factor


def in_thread_order(x: jax.Array) -> jax.Array:
    """Returns `x` with its columns in the order in which the threads decode.

    Lane c of four has the codes `16 c + 4 s + 2 h + v` of a block. In step s of wgmma,
    which contracts 16, it holds the columns `8 h + 2 c + v`.
    """
    columns = np.arange(BLOCK).reshape(4, 4, 2, 2)
    order = columns.transpose(1, 2, 0, 3).reshape(BLOCK)
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    return jnp.take(blocks, order, axis=2).reshape(x.shape)


def fetched_scales(absmax, nested, first_block, blocks_of_row: int) -> Array:
    """Returns a thread's two 8-bit scales of a unit, and the nested ones.

    They are those of the rows `16 warp + lane / 4` and the eighth one after, and of
    one of four blocks.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((THREADS * 4,), jnp.int32, _FETCHED),
    )
    @stand_in(functools.partial(_fetched_in_jnp, blocks_of_row=blocks_of_row))
    def fetch(_, absmax, nested, first_block):
        row, lane = _row_and_lane()
        scales_of_row = absmax.type.get_strides_and_offset()[0][0]
        [first] = first_block.registers.flat
        scales, nested_scales = [], []
        for half in range(2):
            my_row = arith.addi(row, i32(8 * half))
            block = arith.addi(arith.muli(my_row, i32(scales_of_row)), lane)
            code = _load(absmax, block, int_type(8))
            scales.append(arith.extui(int_type(32), code))
            in_matrix = arith.addi(
                mgpu.utils.bitcast(first, int_type(32)),
                arith.addi(arith.muli(my_row, i32(blocks_of_row)), lane),
            )
            nested_block = arith.shrui(in_matrix, i32(8))
            place = arith.muli(nested_block, i32(4))
            nested_scales.append(_load(nested, place, int_type(32)))
        words = vector_of([*scales, *nested_scales])
        return fragmented([words], (THREADS * 4,), _FETCHED, is_signed=True)

    first = plgpu.layout_cast(lax.broadcast(first_block, (THREADS,)), _SPLAT)
    return fetch(absmax, nested, first)


def _fetched_in_jnp(
    absmax: Array, nested: Array, first_block: Array, *, blocks_of_row: int
) -> Array:
    """What `fetched_scales` loads."""
    blocks = first_block[0] + blocks_of_row * jnp.arange(OUTPUTS)[:, None]
    blocks = blocks + jnp.arange(BLOCKS)[None]
    nested_scales = lax.bitcast_convert_type(nested[blocks // NESTED_BLOCK], jnp.int32)
    by_thread = [_by_thread(half) for half in range(2)]
    parts = (absmax.astype(jnp.int32), nested_scales)
    own = [part[place] for part in parts for place in by_thread]
    return jnp.stack(own, axis=-1).reshape(-1)


def _by_thread(half: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and lane of four of each thread."""
    thread = np.arange(THREADS)
    warp, lane = thread // LANES, thread % LANES
    return 16 * warp + lane // 4 + 8 * half, lane % 4


def scales_and_inverses(
    fetched: Array, dynamic_map, offset, factor: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Returns the rows' scales of each block of a unit, and their inverses.

    They lack the values' factor. One that would be zero, without an inverse, is tiny.
    """
    rows = plgpu.ShapeDtypeStruct((OUTPUTS,), jnp.float32, ROW_LAYOUT)

    @plgpu.inline_mgpu(
        arg_types=(_FETCHED, plgpu.RefType(), plgpu.RefType()),
        return_type=(rows,) * (2 * BLOCKS),
    )
    @stand_in(functools.partial(_scales_in_jnp, factor=factor))
    def scales(_, fetched, dynamic_map, offset):
        f32 = ir.F32Type.get()
        [words] = fetched.registers.flat
        shift, inverse_factor = (
            _load(offset, i32(0), f32),
            mgpu.utils.c(1 / factor, f32),
        )
        own = []
        for half in range(2):
            place = arith.muli(element(words, half), i32(4))
            nested = arith.bitcast(f32, element(words, 2 + half))
            operands = [_load(dynamic_map, place, f32), nested, shift, inverse_factor]
            own.append(llvm.inline_asm(f32, operands, _SCALE, "=f,f,f,f,f"))
        asked = [_FROM_LANE.format(block) for block in range(BLOCKS)]
        of_rows = [
            [llvm.inline_asm(f32, [scale], ask, "=f,f") for scale in own]
            for ask in asked
        ]
        inverses = [
            [llvm.inline_asm(f32, [scale], _INVERSE, "=f,f") for scale in scales]
            for scales in of_rows
        ]
        return tuple(
            fragmented([vector_of([own]) for own in both], (OUTPUTS,), ROW_LAYOUT)
            for both in (*of_rows, *inverses)
        )

    found = scales(fetched, dynamic_map, offset)
    return found[:BLOCKS], found[BLOCKS:]


_TINY = 2.0**-64
_SCALE = """{
.reg .f32 scale, size;
.reg .pred is_tiny;
mul.rn.f32 scale, $1, $2;
add.rn.f32 scale, scale, $3;
mul.rn.f32 scale, scale, $4;
abs.f32 size, scale;
setp.lt.f32 is_tiny, size, 0f1F800000;
selp.f32 $0, 0f1F800000, scale, is_tiny;
}"""
_INVERSE = "rcp.approx.ftz.f32 $0, $1;"
_FROM_LANE = "shfl.sync.idx.b32 $0, $1, {}, 0x1c1f, 0xffffffff;"  # of each four


def _scales_in_jnp(
    fetched: Array, dynamic_map: Array, offset: Array, *, factor: float
) -> tuple[Array, ...]:
    """What `scales_and_inverses` computes."""
    words = fetched.reshape(THREADS, 2, 2)
    nested = lax.bitcast_convert_type(words[:, 1], jnp.float32)
    own = rounding.product(dynamic_map[words[:, 0]], nested) + offset[0]
    own = own * (1 / factor)
    own = jnp.where(jnp.abs(own) < _TINY, _TINY, own)
    scales = jnp.zeros((OUTPUTS, BLOCKS), jnp.float32)
    for half in range(2):
        scales = scales.at[_by_thread(half)].set(own[:, half])
    return (*scales.T, *(1 / scales).T)


def decoded(codes: Array, values, block: int, dtype: str) -> Array:
    """Returns the values of a block's codes, as the left operand of wgmma."""

    @plgpu.inline_mgpu(
        arg_types=(CODES_LAYOUT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(
            (OUTPUTS, BLOCK), jnp.dtype(dtype), plgpu.Layout.WGMMA
        ),
    )
    @stand_in(functools.partial(_decoded_in_jnp, block=block, dtype=dtype))
    def decode(_, codes, values):
        two = ir.VectorType.get((2,), int_type(32))
        table = llvm.ptrtoint(int_type(32), mgpu.utils.memref_ptr(values))
        operands = [arith.muli(lane_index(), i32(4)), table]
        pairs = []
        for octet in range(8):  # those of a row make eight columns each
            for half in codes.registers[0, block].flat:
                word = element(mgpu.utils.bitcast(half, two), octet // 4)
                found = llvm.inline_asm(
                    int_type(32),
                    [word, *operands],
                    ptx.look_up(octet % 4),
                    ptx.LOOK_UP_CONSTRAINTS,
                )
                pairs.append(mgpu.utils.bitcast(found, pair_type(dtype)))
        return fragmented(pairs, (OUTPUTS, BLOCK), plgpu.Layout.WGMMA)

    return decode(codes, values)


def _decoded_in_jnp(codes: Array, values: Array, *, block: int, dtype: str) -> Array:
    """What `decoded` computes."""
    half = BLOCK // 2
    codes = codes[:, block * half : (block + 1) * half]
    pairs = lax.bitcast_convert_type(
        values[codes.astype(jnp.int32), 0], jnp.dtype(dtype)
    )
    # Of a row: (lane, step, half of its columns, pair).
    in_order = pairs.reshape(OUTPUTS, 4, 4, 2, 2).transpose(0, 2, 3, 1, 4)
    return in_order.reshape(OUTPUTS, BLOCK)


def _row_and_lane():
    """Returns a thread's first row and its place among the four lanes of a row."""
    thread = thread_index()
    warp, lane = arith.divui(thread, i32(LANES)), arith.remui(thread, i32(LANES))
    row = arith.addi(arith.muli(warp, i32(16)), arith.divui(lane, i32(4)))
    return row, arith.remui(lane, i32(4))


def _load(reference, place, result):
    """Loads `result` at a number of bytes from where the reference starts."""
    pointer = mgpu.utils.memref_ptr(reference)
    return llvm.load(result, mgpu.utils.getelementptr(pointer, [place], int_type(8)))
