"""Dequantisation on Hopper at the speed of memory.

A block of one warpgroup decodes a chunk of 8,192 elements. In step j of eight, thread t
reads the word of eight codes number `128 j + t` and writes 16 bytes: both accesses of a
warp are contiguous. The chunk has 128 scales, so each thread computes one, the one of
which its own warp is in need, and shuffles hand them round.

Bytes an element: 0.5 codes, 0.016 scales, 2 out. Budget: 2 KiB shared memory for the
codebook, no pipeline (blocks of the grid overlap one another).
"""

import functools
import math

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
from kernels.stand_in import stand_in

from . import ptx, rounding
from .array import NF4Array
from .codebooks import CODEBOOKS, DYNAMIC_MAP

KERNEL_NAME = "nf4_dequantize"

_LANES, _THREADS, _STEPS = ptx.LANES, 128, 8
_CODES_A_WORD = 8
_CHUNK = _THREADS * _STEPS * _CODES_A_WORD
_BLOCK_SIZE = 64
_SCALES = _CHUNK // _BLOCK_SIZE  # one a thread
_CHUNKS_A_NESTED_BLOCK = 2  # 256 scales
_MAX_ELEMENTS = 2**31  # offsets are 32-bit integers

_CODES_LAYOUT = plgpu.Layout.WG_STRIDED((_CHUNK // 2,), 4)
_TABLE_LAYOUT = plgpu.Layout.WG_STRIDED((16 * ptx.LANES,), 4)
_OUT_LAYOUT = plgpu.Layout.WG_STRIDED((_CHUNK,), _CODES_A_WORD)


def dequantize(w: NF4Array) -> Float[Array, "*L I O"]:
    """Returns the same bits as the reference.

    Raises:
      UnsupportedOp: Another device, or sizes or dtypes that the kernel lacks.
    """
    require_hopper()
    _check(w)
    return _launch(w)


@jax.jit
def _launch(w: NF4Array) -> jax.Array:
    """Runs the kernel. Compiled, so that equal calls in a program are lowered once."""
    lead = w.codes.shape[:-1]
    matrices, chunks = math.prod(lead), w.size // _CHUNK
    scales = [w.absmax.reshape(-1)]
    if w.nested_absmax is not None and w.nested_offset is not None:
        scales += [w.nested_absmax.reshape(-1), w.nested_offset.reshape(-1)]
        scales += [jnp.asarray(DYNAMIC_MAP)]
    table = np.repeat(CODEBOOKS[w.code], ptx.LANES)
    values = plgpu.kernel(
        functools.partial(_body, w=w, chunks=chunks),
        out_type=jax.ShapeDtypeStruct((matrices * w.size,), w.dtype),
        grid=(matrices * chunks,),
        grid_names=("chunk",),
        kernel_name=KERNEL_NAME,
        scratch_types={"table_smem": plgpu.SMEM((table.size,), jnp.float32)},
        compiler_params=plgpu.CompilerParams(),
    )(w.codes.reshape(-1), jnp.asarray(table), *scales)
    return values.reshape(*lead, *w.shape[::-1]).swapaxes(-1, -2)


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


def _body(
    codes_gmem,
    table_gmem,
    absmax_gmem,
    *rest,
    table_smem,
    w: NF4Array,
    chunks: int,
) -> None:
    *nested_gmem, out_gmem = rest
    chunk = lax.axis_index("chunk")
    codes = plgpu.load(
        codes_gmem.at[pl.ds(chunk * (_CHUNK // 2), _CHUNK // 2)], layout=_CODES_LAYOUT
    )
    table_smem[...] = plgpu.load(table_gmem, layout=_TABLE_LAYOUT)
    plgpu.commit_smem()
    scales = [absmax_gmem.at[pl.ds(chunk * _SCALES, _SCALES)]]
    if nested_gmem:
        nested_absmax, offset, dynamic_map = nested_gmem
        matrix = lax.div(chunk, jnp.int32(chunks))
        chunk_of_matrix = lax.rem(chunk, jnp.int32(chunks))
        nested_blocks = -(-chunks // _CHUNKS_A_NESTED_BLOCK)
        nested = lax.div(chunk_of_matrix, jnp.int32(_CHUNKS_A_NESTED_BLOCK))
        nested += matrix * nested_blocks
        scales += [nested_absmax.at[pl.ds(nested, 1)], offset.at[pl.ds(matrix, 1)]]
        scales += [dynamic_map]
    out_gmem[pl.ds(chunk * _CHUNK, _CHUNK)] = _decode(codes, table_smem, scales, w)


def _decode(codes, table, scales, w: NF4Array) -> Array:
    """Returns a chunk's values in `_OUT_LAYOUT` from its codes and references."""

    @plgpu.inline_mgpu(
        arg_types=(_CODES_LAYOUT, *[plgpu.RefType()] * (1 + len(scales))),
        return_type=plgpu.ShapeDtypeStruct((_CHUNK,), jnp.dtype(w.dtype), _OUT_LAYOUT),
    )
    @stand_in(functools.partial(_decode_in_jnp, w=w))
    def decode(_, codes, *references):
        return _machine_code(codes, *references, w=w)

    return decode(codes, table, *scales)


def _decode_in_jnp(
    codes: Array, table: Array, absmax: Array, *nested: Array, w: NF4Array
) -> Array:
    """What `_machine_code` computes."""
    scales = absmax
    if nested:
        nested_absmax, offset, dynamic_map = nested
        factor = jnp.broadcast_to(nested_absmax, absmax.shape)
        scales = rounding.product(dynamic_map[absmax], factor) + offset
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    values = table.reshape(-1, ptx.LANES)[:, 0][nibbles]
    return (values * jnp.repeat(scales, _BLOCK_SIZE)).astype(w.dtype)


def _machine_code(codes, table, absmax, *nested, w: NF4Array) -> mgpu.FragmentedArray:
    """Emits the decoding of a chunk; `codes` has one register a step."""
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.Type.parse(_MLIR_NAMES[w.dtype]))
    thread = arith.remui(mgpu.utils.thread_idx(), _i32(_THREADS))
    lane = arith.remui(thread, _i32(_LANES))
    scale = _scale(_scale_of_thread(thread), absmax, nested)
    column = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(table))
    column = arith.addi(column, arith.muli(lane, _i32(4)))
    assembly = ptx.decode_word(w.dtype)
    struct = llvm.StructType.get_literal([i32] * 4)
    registers = np.empty((_STEPS,), dtype=object)
    for step in range(_STEPS):
        # Eight threads share a block: theirs is number `lane / 8` of the warp's four.
        owner = arith.addi(_i32(4 * step), arith.divui(lane, _i32(8)))
        shuffled = nvvm.shfl_sync(
            _i32(-1), scale, owner, _i32(_LANES - 1), nvvm.ShflKind.idx
        )
        word = mgpu.utils.bitcast(codes.registers[step], i32)
        outputs = llvm.inline_asm(
            struct, [word, column, shuffled], assembly, ptx.CONSTRAINTS
        )
        registers[step] = mgpu.utils.vector_concat(
            [
                mgpu.utils.bitcast(llvm.extractvalue(i32, outputs, [i]), pair)
                for i in range(4)
            ]
        )
    return mgpu.FragmentedArray(
        _registers=registers, _layout=_OUT_LAYOUT.to_mgpu(), _is_signed=None
    )


_MLIR_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def _scale_of_thread(thread):
    """Returns which of the chunk's scales a thread computes.

    Warp w decodes blocks `16 j + 4 w + k` with k < 4 in step j; lane `4 j + k` has it.
    """
    lane = arith.remui(thread, _i32(_LANES))
    warp = arith.divui(thread, _i32(_LANES))
    step, k = arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))
    within_step = arith.addi(arith.muli(warp, _i32(4)), k)
    return arith.addi(arith.muli(step, _i32(16)), within_step)


def _scale(block, absmax, nested):
    """Loads a block's scale; an 8-bit one is multiplied, then added, each rounded."""
    scale = memref.load(absmax, [_index(block)])
    if not nested:
        return scale
    nested_absmax, offset, dynamic_map = nested
    code = arith.extui(ir.IntegerType.get_signless(32), scale)
    operands = [
        memref.load(dynamic_map, [_index(code)]),
        memref.load(nested_absmax, [_index(_i32(0))]),
        memref.load(offset, [_index(_i32(0))]),
    ]
    assembly = "{\n.reg .f32 p;\nmul.rn.f32 p, $1, $2;\nadd.rn.f32 $0, p, $3;\n}"
    return llvm.inline_asm(ir.F32Type.get(), operands, assembly, "=f,f,f,f")


def _index(value):
    return arith.index_castui(ir.IndexType.get(), value)


def _i32(value: int):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))
