"""Adam with 8-bit states on Hopper, in one pass.

A warp takes a block of 256, eight elements a thread; a block of the grid is a warpgroup
that takes `_ROWS` of them at a time, in turns. Codes become values, and values codes,
by one look-up each in tables in shared memory: registers hold no tables, and warps
shuffle only to find the largest of a block.

Bytes an element: 4 gradient, 2 codes in, 2 codes out, 4 direction, 0.06 scales. Budget:
22 KiB shared memory, 72 registers a thread, no pipeline (the blocks of the grid overlap
one another).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref
from jaxtyping import Array, Float32

from kernels.device import multiprocessors, require_hopper
from kernels.dispatch import UnsupportedOp
from kernels.registers import as_index, element, fragmented, i32, int_type, vector_of
from kernels.stand_in import stand_in

from .blocks import BLOCK_SIZE, LEAST_SCALE, MU_MAP, NU_MAP, Blocks
from .ranks import MU_RANKS, NU_RANKS, Ranks
from .xla import codes_of

KERNEL_NAME = "adam8bit"

_BLOCKS_OF_PROCESSOR = 6
_ROWS = 8
_MAX_ELEMENTS = 2**31  # offsets are 32-bit integers

# A row of 256 is a warp's: 32 lanes of 8 elements; four warps have four rows.
_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((4, BLOCK_SIZE), (8,))),
    warp_dims=(-3,),
    lane_dims=(-2,),
    vector_dim=-1,
)
_ROW = _LAYOUT.reduce(1)


def adam8bit(
    gradient: Float32[Array, "blocks 256"],
    mu: Blocks,
    nu: Blocks,
    corrections: Float32[Array, " 2"],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[Float32[Array, "blocks 256"], Blocks, Blocks]:
    """Returns what the reference does, less a bit of rounding; see `api.adam8bit`.

    Raises:
      UnsupportedOp: Another device, or a size that the kernel lacks.
    """
    require_hopper()
    blocks = gradient.shape[0]
    if blocks % _ROWS or not 0 < gradient.size < _MAX_ELEMENTS:
        raise UnsupportedOp(
            f"{blocks=} of 256 must be a multiple of {_ROWS} and hold fewer than 2**31 "
            "elements, and one"
        )
    grid = min(blocks // _ROWS, multiprocessors() * _BLOCKS_OF_PROCESSOR)
    moment = [
        jax.ShapeDtypeStruct(mu.codes.shape, jnp.uint8),
        jax.ShapeDtypeStruct(mu.absmax.shape, jnp.float32),
    ]
    tables = [MU_MAP, NU_MAP, MU_RANKS.entries, NU_RANKS.entries]
    direction, *moments = plgpu.kernel(
        functools.partial(_body, b1=b1, b2=b2, eps=eps),
        out_type=[jax.ShapeDtypeStruct(gradient.shape, jnp.float32), *moment, *moment],
        scratch_types=[plgpu.SMEM(t.shape, t.dtype) for t in tables],
        grid=(grid,),
        grid_names=("block",),
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        corrections,
        *map(jnp.asarray, tables),
        gradient,
        *(mu.codes, mu.absmax, nu.codes, nu.absmax),
    )
    mu, nu = (Blocks(codes=c, absmax=a) for c, a in (moments[:2], moments[2:]))
    return direction, mu, nu


def _body(corrections_gmem, *refs, b1: float, b2: float, eps: float) -> None:
    tables_gmem, arrays_gmem, tables_smem = refs[:4], refs[4:-4], refs[-4:]
    for table_gmem, table_smem in zip(tables_gmem, tables_smem, strict=True):
        layout = plgpu.Layout.WG_STRIDED(table_gmem.shape, 1)
        table_smem[...] = plgpu.load(table_gmem, layout=layout)
    # c0 mu / (c1 root + eps) with one factor less.
    first = corrections_gmem[0]
    corrections = (corrections_gmem[1] / first, eps / first)
    count = lax.div(arrays_gmem[0].shape[0], _ROWS)
    grid = lax.axis_size("block")
    block = lax.axis_index("block")

    def step(i, _):
        rows = pl.ds((block + i * grid) * _ROWS, _ROWS)
        views = [array.at[rows] for array in arrays_gmem]
        _update(corrections, views, tables_smem, b1=b1, b2=b2)

    turns = lax.div(count - block + (grid - 1), jnp.int32(grid))
    lax.fori_loop(0, turns, step, None)


def _update(corrections, views, tables_smem, *, b1: float, b2: float) -> None:
    """Reads and writes `_ROWS` blocks."""
    gradient_gmem, *moments_gmem = views
    mu_codes, mu_absmax, nu_codes, nu_absmax = moments_gmem[:4]
    direction_gmem, *new_moments_gmem = moments_gmem[4:]
    mu_values, nu_values, mu_ranks, nu_ranks = tables_smem
    gradient = plgpu.load(gradient_gmem, layout=_LAYOUT, optimized=False)
    mu = _decode(mu_codes, mu_absmax, mu_values, b1) + (1 - b1) * gradient
    nu = _decode(nu_codes, nu_absmax, nu_values, b2) + (1 - b2) * gradient * gradient
    root_factor, small = corrections
    denominator = root_factor * _fast("sqrt", nu) + small
    direction_gmem[...] = mu * _fast("rcp", denominator)
    _encode(mu, MU_RANKS, mu_ranks, *new_moments_gmem[:2])
    _encode(nu, NU_RANKS, nu_ranks, *new_moments_gmem[2:])


def _decode(codes_gmem, absmax_gmem, values_smem, decay: float) -> Array:
    """Returns what the codes stand for, times `decay`."""
    codes = plgpu.load(codes_gmem, layout=_LAYOUT, optimized=False)
    scale = decay * plgpu.load(absmax_gmem, layout=_ROW, optimized=False)
    return _values(codes, values_smem) * lax.broadcast_in_dim(scale, codes.shape, (0,))


def _encode(x, ranks: Ranks, ranks_smem, codes_gmem, absmax_gmem) -> None:
    """Writes codes and scales."""
    absmax = jnp.max(jnp.abs(x), axis=1)
    absmax = jnp.where(absmax < LEAST_SCALE, 1.0, absmax)
    absmax_gmem[...] = absmax
    scale = lax.broadcast_in_dim(1.0 / absmax, x.shape, (0,))
    codes_gmem[...] = _codes(x * scale, ranks, ranks_smem)


def _fast(name: str, x) -> Array:
    """Returns the root ("sqrt") or the reciprocal ("rcp"), exact to about 1 ulp."""
    in_jnp = {"sqrt": jnp.sqrt, "rcp": jnp.reciprocal}[name]

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, _LAYOUT),
    )
    @stand_in(in_jnp)
    def apply(_, x):
        assembly = f"{name}.approx.ftz.f32 $0, $1;"

        def value(number):
            return llvm.inline_asm(ir.F32Type.get(), [number], assembly, "=f,f")

        return _elementwise(value, x)

    return apply(x)


def _values(codes, values_smem) -> Array:
    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.float32, _LAYOUT),
    )
    @stand_in(lambda codes, values: values[codes])
    def look_up(_, codes, values):
        def value(code):
            return memref.load(values, [as_index(code)])

        return _elementwise(value, codes)

    return look_up(codes, values_smem)


def _codes(x, ranks: Ranks, ranks_smem) -> Array:
    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.uint8, _LAYOUT),
    )
    @stand_in(lambda x, _: codes_of(x, ranks))
    def look_up(_, x, entries):
        def code(value):
            return _code(value, ranks, entries)

        return _elementwise(code, x, is_signed=False)

    return look_up(x, ranks_smem)


def _code(value, ranks: Ranks, entries):
    """Emits `xla.codes_of` of one element."""
    signed_bits = arith.bitcast(int_type(32), value)
    bits = arith.andi(signed_bits, i32(0x7FFFFFFF))
    # NaN lands in the last cell: nobody uses the result, but it must be in bounds.
    cell = arith.minui(
        arith.shrui(bits, i32(ranks.shift)),
        i32(ranks.first + ranks.entries.size - 1),
    )
    cell = arith.subi(arith.maxui(cell, i32(ranks.first)), i32(ranks.first))
    entry = memref.load(entries, [as_index(cell)])
    rank = arith.addi(entry, arith.andi(bits, i32(ranks.trailing)))
    rank = arith.shrui(rank, i32(ranks.shift))
    if zero := ranks.zero_code:
        below = arith.subi(i32(zero), arith.minui(rank, i32(zero)))
        is_below = arith.cmpi(arith.CmpIPredicate.slt, signed_bits, i32(0))
        rank = arith.select(is_below, below, arith.addi(rank, i32(zero)))
    return arith.trunci(int_type(8), rank)


def _elementwise(function, x, *, is_signed: bool | None = None):
    """Applies a function of one element to each."""
    results = []
    for register in x.registers.flat:
        (length,) = ir.VectorType(register.type).shape
        elements = [function(element(register, i)) for i in range(length)]
        results.append(vector_of(elements))
    return fragmented(results, x.shape, _LAYOUT, is_signed=is_signed)
