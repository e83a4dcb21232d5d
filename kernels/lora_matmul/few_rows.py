"""Products of few rows with a 4-bit weight on Hopper, as in decoding.

The weight is read once, as codes. It is the left operand of wgmma, whose 64 rows it
fills; the activations, at most 64 rows of them, are the right one. A byte of two codes
becomes two 16-bit numbers by one look-up in shared memory (`_values`). Scales are
applied in float32 to what is summed up: before the product with a block of 64 codes,
the accumulator is multiplied by the last block's scale over this one's. So no weight is
rounded; a code's value is, by less than weights would be.

Products do not care for the order of what they sum up: each thread takes sixteen codes
of a block that lie together, and `x` is permuted to match (`_thread_order`).

A block of the grid has four multiplying warpgroups with 64 outputs each; a fifth one
loads codes and `x`. The contracted axis is split so that blocks fill the device; the
parts, in float32, are added in a fixed order. Budget: 192 KiB shared memory, of which
the table of values, once for each bank, has 64; 112 registers a thread.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float32

from kernels.dispatch import UnsupportedOp
from kernels.nf4 import NF4Array, ptx, rounding
from kernels.nf4.codebooks import CODEBOOKS, DYNAMIC_MAP, Code
from kernels.packed import PackedArray
from kernels.stand_in import stand_in
from kernels.wgmma import accumulator, swizzled

KERNEL_NAME = "few_rows_product"
MAX_ROWS = 64

_MULTIPLIERS = 4  # warpgroups
_OUTPUTS = 64  # of a warpgroup
_TILE = _MULTIPLIERS * _OUTPUTS
_UNIT = 256  # contracted elements of a step
_BLOCK = 64  # codes with one scale
_BLOCKS = _UNIT // _BLOCK
_OCTETS = _UNIT // 2
_NESTED_BLOCK = 256
_STAGES = 2  # more of them take longer: their copies share the memory's rate
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 32, 112
_THREADS = 128

_CODES = plgpu.Layout.WGMMA_UPCAST_4X  # eight bytes in a row for each thread
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_FETCHED = plgpu.Layout.WG_STRIDED((_THREADS * 4,), 4)
_SPLAT = plgpu.Layout.WG_STRIDED((_THREADS,), 1)


@functools.partial(jax.jit, static_argnames=("blocks",))
def few_rows_product(
    x: Float[Array, "M I"], w: NF4Array, *, blocks: int
) -> Float32[Array, "M O"]:
    """Returns `x @ w` in float32.

    Raises:
      UnsupportedOp: Sizes or formats that the kernel lacks.
    """
    check_few_rows(x, w)
    assert w.nested_offset is not None
    rows, (inputs, outputs) = x.shape[0], w.shape
    tiles, units = outputs // _TILE, inputs // _UNIT
    divisors = [d for d in range(1, units + 1) if units % d == 0]
    splits = max(d for d in divisors if d == 1 or tiles * d <= blocks)
    width = -(-rows // 8) * 8
    steps = units // splits
    stages = min(steps, _STAGES)
    values, factor = _values(w.code, w.dtype)
    parts = plgpu.kernel(
        functools.partial(_body, w=w, steps=steps, stages=stages, factor=factor),
        out_type=jax.ShapeDtypeStruct((splits, outputs, width), jnp.float32),
        scratch_types={
            "x_smem": plgpu.SMEM(
                (stages, width, _UNIT), x.dtype, transforms=swizzled(_BLOCK, x.dtype)
            ),
            "codes_smem": plgpu.SMEM(
                (stages, _TILE, _OCTETS),
                jnp.uint8,
                transforms=swizzled(_OCTETS, jnp.uint8),
            ),
            "values_smem": plgpu.SMEM((values.size, ptx.ENTRY_WORDS), jnp.int32),
            "filled": plgpu.Barrier(num_arrivals=_MULTIPLIERS),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=stages),
        },
        grid=(tiles, splits),
        grid_names=("tile", "part"),
        num_threads=_MULTIPLIERS + 1,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(),
    )(
        _thread_order(jnp.pad(x, ((0, width - rows), (0, 0)))),
        w.codes.reshape(outputs, -1),
        w.absmax.reshape(outputs, -1),
        w.nested_absmax,
        w.nested_offset.reshape(1),
        jnp.asarray(DYNAMIC_MAP),
        jnp.asarray(values),
    )
    return jnp.sum(parts, axis=0)[:, :rows].T


def check_few_rows(
    x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array | PackedArray
) -> None:
    """Raises `UnsupportedOp` for what the kernel lacks."""
    if not isinstance(w, NF4Array):
        raise UnsupportedOp("few rows need a 4-bit weight")
    inputs, outputs = w.shape
    if x.dtype.name != w.dtype or w.dtype not in ptx.FORMATS:
        raise UnsupportedOp(f"{x.dtype=} and {w.dtype=} must be the same 16 bits")
    if w.codes.ndim != 1 or not w.is_double_quantized:
        raise UnsupportedOp("the weight must be one matrix with 8-bit scales")
    if (w.block_size, w.nested_block_size) != (_BLOCK, _NESTED_BLOCK):
        raise UnsupportedOp(f"{w.block_size=} and {w.nested_block_size=}")
    if inputs % _UNIT or outputs % _TILE:
        raise UnsupportedOp(f"{w.shape=} must be multiples of {_UNIT}")
    if x.shape[0] > MAX_ROWS:
        raise UnsupportedOp(f"{x.shape[0]} rows are more than {MAX_ROWS}")


@functools.cache
def _values(code: Code, dtype: str) -> tuple[np.ndarray, float]:
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


def _thread_order(x: jax.Array) -> jax.Array:
    """Returns `x` with its columns in the order in which the threads decode.

    Lane c of four has the codes `16 c + 4 s + 2 h + v` of a block. In step s of wgmma,
    which contracts 16, it holds the columns `8 h + 2 c + v`.
    """
    columns = np.arange(_BLOCK).reshape(4, 4, 2, 2)
    order = columns.transpose(1, 2, 0, 3).reshape(_BLOCK)
    blocks = x.reshape(x.shape[0], -1, _BLOCK)
    return jnp.take(blocks, order, axis=2).reshape(x.shape)


def _body(
    x_gmem,
    codes_gmem,
    absmax_gmem,
    nested_gmem,
    offset_gmem,
    map_gmem,
    values_gmem,
    out_gmem,
    *,
    x_smem,
    codes_smem,
    values_smem,
    filled,
    full,
    empty,
    w: NF4Array,
    steps: int,
    stages: int,
    factor: float,
) -> None:
    tile, part = lax.axis_index("tile"), lax.axis_index("part")
    warpgroup = lax.axis_index("warpgroup")
    row = tile * _TILE + warpgroup * _OUTPUTS
    blocks_of_row, width = w.shape[0] // _BLOCK, x_smem.shape[1]
    own = pl.ds(warpgroup * _OUTPUTS, _OUTPUTS)

    def fetched(step):
        unit = part * steps + jnp.minimum(step, steps - 1)
        first_block = lax.broadcast(row * blocks_of_row + unit * _BLOCKS, (_THREADS,))
        return _fetch(
            absmax_gmem.at[pl.ds(row, _OUTPUTS), pl.ds(unit * _BLOCKS, _BLOCKS)],
            nested_gmem,
            plgpu.layout_cast(first_block, _SPLAT),
            blocks_of_row,
        )

    def load(step, _):
        slot = lax.rem(step, stages)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        unit = part * steps + step
        codes = codes_gmem.at[
            pl.ds(tile * _TILE, _TILE), pl.ds(unit * _OCTETS, _OCTETS)
        ]
        x = x_gmem.at[:, pl.ds(unit * _UNIT, _UNIT)]
        plgpu.copy_gmem_to_smem(codes, codes_smem.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(x, x_smem.at[slot], full.at[slot])

    def fill():
        words = plgpu.load(values_gmem.at[own], layout=_ROWS, optimized=False)
        copies = lax.broadcast_in_dim(words, (_OUTPUTS, ptx.LANES), (0,))
        values_smem.at[own, pl.ds(0, ptx.LANES)][...] = copies
        plgpu.barrier_arrive(filled)
        plgpu.barrier_wait(filled)

    def multiply_block(acc, weight, ratio, slot, block):
        plgpu.wgmma_wait(0)  # the last block's product, while this one was decoded
        acc[...] = acc[...] * lax.broadcast_in_dim(ratio, (_OUTPUTS, width), (0,))
        contracted = x_smem.at[slot, :, pl.ds(block * _BLOCK, _BLOCK)]
        plgpu.wgmma(acc, weight, contracted.transpose((1, 0)))

    def multiply(acc, step, carry):
        last_scale, current = carry
        slot = lax.rem(step, stages)
        following = fetched(step + 1)
        scales, inverses = _scales(current, map_gmem, offset_gmem, factor)
        ratios = [*map(jnp.multiply, (last_scale, *scales), inverses)]
        plgpu.barrier_wait(full.at[slot])
        codes = plgpu.load(codes_smem.at[slot, own], layout=_CODES)
        for block, ratio in enumerate(ratios):
            weight = _decode(codes, values_smem, block, w)
            multiply_block(acc, weight, ratio, slot, block)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()  # copies to come do not wait for loads of codes otherwise
        plgpu.barrier_arrive(empty.at[slot])
        return scales[-1], following

    @pl.when(warpgroup == _MULTIPLIERS)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        lax.fori_loop(0, steps, load, None)
        for slot in range(stages):
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(warpgroup < _MULTIPLIERS)
    def _():
        plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
        first = fetched(0)
        fill()
        one = plgpu.layout_cast(jnp.ones((_OUTPUTS,), jnp.float32), _ROWS)

        @functools.partial(pl.run_scoped, acc=accumulator(_OUTPUTS, width))
        def _(acc):
            one_step = functools.partial(multiply, acc)
            scale, _ = lax.fori_loop(0, steps, one_step, (one, first))
            scale = lax.broadcast_in_dim(scale, (_OUTPUTS, width), (0,))
            out_gmem[part, pl.ds(row, _OUTPUTS)] = acc[...] * scale


def _fetch(absmax, nested, first_block, blocks_of_row: int) -> Array:
    """Loads a thread's two 8-bit scales of a unit, and the nested ones.

    They are those of the rows `16 warp + lane / 4` and the eighth one after, and of
    one of four blocks.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((_THREADS * 4,), jnp.int32, _FETCHED),
    )
    @stand_in(functools.partial(_fetch_in_jnp, blocks_of_row=blocks_of_row))
    def fetch(_, absmax, nested, first_block):
        i32 = ir.IntegerType.get_signless(32)
        row, lane = _row_and_lane()
        scales_of_row = absmax.type.get_strides_and_offset()[0][0]
        [first] = first_block.registers.flat
        scales, nested_scales = [], []
        for half in range(2):
            my_row = arith.addi(row, _i32(8 * half))
            block = arith.addi(arith.muli(my_row, _i32(scales_of_row)), lane)
            code = _load(absmax, block, ir.IntegerType.get_signless(8))
            scales.append(arith.extui(i32, code))
            in_matrix = arith.addi(
                mgpu.utils.bitcast(first, i32),
                arith.addi(arith.muli(my_row, _i32(blocks_of_row)), lane),
            )
            nested_block = arith.shrui(in_matrix, _i32(8))
            place = arith.muli(nested_block, _i32(4))
            nested_scales.append(_load(nested, place, i32))
        four = ir.VectorType.get((4,), i32)
        words = vector.from_elements(four, [*scales, *nested_scales])
        return _fragmented([words], _FETCHED, (1,), is_signed=True)

    return fetch(absmax, nested, first_block)


def _fetch_in_jnp(
    absmax: Array, nested: Array, first_block: Array, *, blocks_of_row: int
) -> Array:
    """What `_fetch` loads."""
    blocks = first_block[0] + blocks_of_row * jnp.arange(_OUTPUTS)[:, None]
    blocks = blocks + jnp.arange(_BLOCKS)[None]
    nested_scales = lax.bitcast_convert_type(nested[blocks // _NESTED_BLOCK], jnp.int32)
    by_thread = [_by_thread(half) for half in range(2)]
    parts = (absmax.astype(jnp.int32), nested_scales)
    own = [part[place] for part in parts for place in by_thread]
    return jnp.stack(own, axis=-1).reshape(-1)


def _by_thread(half: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and lane of four of each thread."""
    thread = np.arange(_THREADS)
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * half, lane % 4


def _scales(
    fetched: Array, dynamic_map, offset, factor: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Returns the rows' scales of each block of a unit, and their inverses.

    They lack the values' factor. One that would be zero, without an inverse, is tiny.
    """
    rows = plgpu.ShapeDtypeStruct((_OUTPUTS,), jnp.float32, _ROWS)

    @plgpu.inline_mgpu(
        arg_types=(_FETCHED, plgpu.RefType(), plgpu.RefType()),
        return_type=(rows,) * (2 * _BLOCKS),
    )
    @stand_in(functools.partial(_scales_in_jnp, factor=factor))
    def scales(_, fetched, dynamic_map, offset):
        f32 = ir.F32Type.get()
        one = ir.VectorType.get((1,), f32)
        [words] = fetched.registers.flat
        shift, inverse_factor = (
            _load(offset, _i32(0), f32),
            mgpu.utils.c(1 / factor, f32),
        )
        own = []
        for half in range(2):
            place = arith.muli(_element(words, half), _i32(4))
            nested = arith.bitcast(f32, _element(words, 2 + half))
            operands = [_load(dynamic_map, place, f32), nested, shift, inverse_factor]
            own.append(llvm.inline_asm(f32, operands, _SCALE, "=f,f,f,f,f"))
        asked = [_FROM_LANE.format(block) for block in range(_BLOCKS)]
        of_rows = [
            [llvm.inline_asm(f32, [scale], ask, "=f,f") for scale in own]
            for ask in asked
        ]
        inverses = [
            [llvm.inline_asm(f32, [scale], _INVERSE, "=f,f") for scale in scales]
            for scales in of_rows
        ]
        return tuple(
            _fragmented(
                [vector.broadcast(one, each) for each in pair],
                _ROWS,
                (1, 1, 2, 1, 1),
                is_signed=None,
            )
            for pair in (*of_rows, *inverses)
        )

    found = scales(fetched, dynamic_map, offset)
    return found[:_BLOCKS], found[_BLOCKS:]


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
    """What `_scales` computes."""
    words = fetched.reshape(_THREADS, 2, 2)
    nested = lax.bitcast_convert_type(words[:, 1], jnp.float32)
    own = rounding.product(dynamic_map[words[:, 0]], nested) + offset[0]
    own = own * (1 / factor)
    own = jnp.where(jnp.abs(own) < _TINY, _TINY, own)
    scales = jnp.zeros((_OUTPUTS, _BLOCKS), jnp.float32)
    for half in range(2):
        scales = scales.at[_by_thread(half)].set(own[:, half])
    return (*scales.T, *(1 / scales).T)


def _decode(codes: Array, values, block: int, w: NF4Array) -> Array:
    """Returns the values of a block's codes, as the left operand of wgmma."""

    @plgpu.inline_mgpu(
        arg_types=(_CODES, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(
            (_OUTPUTS, _BLOCK), jnp.dtype(w.dtype), plgpu.Layout.WGMMA
        ),
    )
    @stand_in(functools.partial(_decode_in_jnp, block=block, dtype=w.dtype))
    def decode(_, codes, values):
        i32 = ir.IntegerType.get_signless(32)
        two = ir.VectorType.get((2,), i32)
        pair = ir.VectorType.get((2,), ir.Type.parse(_MLIR_NAMES[w.dtype]))
        table = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(values))
        bank = arith.remui(mgpu.utils.thread_idx(), _i32(ptx.LANES))
        operands = [arith.muli(bank, _i32(4)), table]
        registers = []
        for octet in range(8):  # those of a row make eight columns each
            for half in codes.registers[0, block].flat:
                word = _element(mgpu.utils.bitcast(half, two), octet // 4)
                found = llvm.inline_asm(
                    i32,
                    [word, *operands],
                    ptx.look_up(octet % 4),
                    ptx.LOOK_UP_CONSTRAINTS,
                )
                registers.append(mgpu.utils.bitcast(found, pair))
        shape = (1, 8, 1, 1, 2, 1, 1, 1, 1)
        return _fragmented(registers, plgpu.Layout.WGMMA, shape, is_signed=None)

    return decode(codes, values)


_MLIR_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def _decode_in_jnp(codes: Array, values: Array, *, block: int, dtype: str) -> Array:
    """What `_decode` computes."""
    half = _BLOCK // 2
    codes = codes[:, block * half : (block + 1) * half]
    pairs = lax.bitcast_convert_type(
        values[codes.astype(jnp.int32), 0], jnp.dtype(dtype)
    )
    # Of a row: (lane, step, half of its columns, pair).
    in_order = pairs.reshape(_OUTPUTS, 4, 4, 2, 2).transpose(0, 2, 3, 1, 4)
    return in_order.reshape(_OUTPUTS, _BLOCK)


def _row_and_lane():
    """Returns a thread's first row and its place among the four lanes of a row."""
    thread = arith.remui(mgpu.utils.thread_idx(), _i32(_THREADS))
    warp, lane = arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))
    row = arith.addi(arith.muli(warp, _i32(16)), arith.divui(lane, _i32(4)))
    return row, arith.remui(lane, _i32(4))


def _load(reference, place, result):
    """Loads `result` at a number of bytes from where the reference starts."""
    pointer = mgpu.utils.memref_ptr(reference)
    i8 = ir.IntegerType.get_signless(8)
    return llvm.load(result, mgpu.utils.getelementptr(pointer, [place], i8))


def _element(register, index: int):
    return vector.extract(
        register,
        dynamic_position=[],
        static_position=ir.DenseI64ArrayAttr.get([index]),
    )


def _fragmented(registers, layout, shape, *, is_signed) -> mgpu.FragmentedArray:
    array = np.empty((len(registers),), dtype=object)
    array[:] = registers
    return mgpu.FragmentedArray(
        _registers=array.reshape(shape), _layout=layout.to_mgpu(), _is_signed=is_signed
    )


def _i32(value: int):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))
