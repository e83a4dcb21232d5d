"""Products of few rows with a 4-bit weight on Hopper, as in decoding.

The weight is read once, as codes, and decoded in registers to the bits that
`nf4.dequantize` gives. It is the left operand of wgmma, whose 64 rows it fills; the
activations, at most 64 rows of them, are the right one. Products do not care for the
order of what they sum up, so each thread takes 64 codes that lie together, a block with
one scale, and `x` is permuted to match (`_thread_order`).

A block of the grid has four multiplying warpgroups with 64 outputs each, which share
the tiles of `x` that a fifth one loads. The contracted axis is split so that blocks
fill the device; the parts, in float32, are added in a fixed order. Codes are in flight
one step ahead. Budget: up to 192 KiB shared memory; 112 registers a thread.
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
from kernels.nf4.codebooks import CODEBOOKS, DYNAMIC_MAP
from kernels.packed import PackedArray
from kernels.stand_in import stand_in
from kernels.wgmma import accumulator, swizzled

KERNEL_NAME = "few_rows_product"
MAX_ROWS = 64

_MULTIPLIERS = 4  # warpgroups
_OUTPUTS = 64  # of a warpgroup
_UNIT = 256  # contracted elements of a step: a block of 64 for each of 4 lanes
_LINE = 64
_BLOCK_SIZE, _NESTED_BLOCK_SIZE = 64, 256
_MAX_STAGES = 6
_RING_BYTES = 192 * 1024
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 32, 112
_THREADS = 128

_WORDS = 8  # of a thread's codes in one row
_FETCHED = plgpu.Layout.WG_STRIDED((_THREADS * 20,), 4)
_TABLES = plgpu.Layout.WG_STRIDED((_THREADS * 16,), 4)
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
    tiles, units = outputs // (_MULTIPLIERS * _OUTPUTS), inputs // _UNIT
    divisors = [d for d in range(1, units + 1) if units % d == 0]
    splits = max(d for d in divisors if d == 1 or tiles * d <= blocks)
    width = -(-rows // 8) * 8
    steps = units // splits
    stages = min(steps, _MAX_STAGES, _RING_BYTES // (2 * width * _UNIT))
    parts = plgpu.kernel(
        functools.partial(
            _body,
            w=w,
            steps=steps,
            width=width,
            stages=stages,
        ),
        out_type=jax.ShapeDtypeStruct((splits, outputs, width), jnp.float32),
        scratch_types={
            "x_smem": plgpu.SMEM(
                (stages, width, _UNIT), x.dtype, transforms=swizzled(_LINE, x.dtype)
            ),
            "full": plgpu.Barrier(num_barriers=stages),
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
    if (w.block_size, w.nested_block_size) != (_BLOCK_SIZE, _NESTED_BLOCK_SIZE):
        raise UnsupportedOp(f"{w.block_size=} and {w.nested_block_size=}")
    if inputs % _UNIT or outputs % (_MULTIPLIERS * _OUTPUTS):
        raise UnsupportedOp(f"{w.shape=} must be multiples of {_UNIT}")
    if x.shape[0] > MAX_ROWS:
        raise UnsupportedOp(f"{x.shape[0]} rows are more than {MAX_ROWS}")


def _thread_order(x: jax.Array) -> jax.Array:
    """Returns `x` with its columns in the order in which the threads decode.

    Lane c of four has the codes `64 c + 4 s + 2 h + v` of a unit. In step s of wgmma,
    which contracts 16, it holds the columns `8 h + 2 c + v`.
    """
    rows, inputs = x.shape
    split = x.reshape(rows, inputs // _UNIT, 4, 16, 2, 2)
    return split.transpose(0, 1, 3, 4, 2, 5).reshape(rows, inputs)


def _body(
    x_gmem,
    codes_gmem,
    absmax_gmem,
    nested_gmem,
    offset_gmem,
    map_gmem,
    out_gmem,
    *,
    x_smem,
    full,
    empty,
    w: NF4Array,
    steps: int,
    width: int,
    stages: int,
) -> None:
    part = lax.axis_index("part")
    warpgroup = lax.axis_index("warpgroup")
    row = (lax.axis_index("tile") * _MULTIPLIERS + warpgroup) * _OUTPUTS
    blocks_of_row = w.shape[0] // _BLOCK_SIZE

    def fetched(step):
        unit = part * steps + jnp.minimum(step, steps - 1)
        rows, units = pl.ds(row, _OUTPUTS), pl.ds(unit * (_UNIT // 2), _UNIT // 2)
        scales = pl.ds(unit * 4, 4)
        first_block = lax.broadcast(row * blocks_of_row + unit * 4, (_THREADS,))
        return _fetch(
            codes_gmem.at[rows, units],
            absmax_gmem.at[rows, scales],
            nested_gmem,
            plgpu.layout_cast(first_block, _SPLAT),
            blocks_of_row,
        )

    def load(step, _):
        slot = lax.rem(step, stages)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        columns = pl.ds((part * steps + step) * _UNIT, _UNIT)
        plgpu.copy_gmem_to_smem(x_gmem.at[:, columns], x_smem.at[slot], full.at[slot])

    def multiply(acc, step, current):
        slot = lax.rem(step, stages)
        following = fetched(step + 1)
        tables = _tables(current, map_gmem, offset_gmem, w)
        plgpu.barrier_wait(full.at[slot])
        for chunk in range(_UNIT // _LINE):
            columns = x_smem.at[slot, :, pl.ds(chunk * _LINE, _LINE)]
            weight = _decode(current, tables, chunk, w)
            plgpu.wgmma(acc, weight, columns.transpose((1, 0)))
            plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[slot])
        return following

    @pl.when(warpgroup == _MULTIPLIERS)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        lax.fori_loop(0, steps, load, None)
        for slot in range(stages):
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(warpgroup < _MULTIPLIERS)
    def _():
        plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")

        @functools.partial(pl.run_scoped, acc=accumulator(_OUTPUTS, width))
        def _(acc):
            one_step = functools.partial(multiply, acc)
            lax.fori_loop(0, steps, lambda k, words: one_step(k, words), fetched(0))
            out_gmem[part, pl.ds(row, _OUTPUTS)] = acc[...]


def _fetch(codes, absmax, nested, first_block, blocks_of_row: int) -> Array:
    """Loads what a thread needs of a unit: codes of two rows, and their scales' parts.

    Rows are `16 warp + lane / 4` and the eighth one after. Each thread has 20 words:
    eight of codes for each row, the two 8-bit scales, the two nested scales.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((_THREADS * 20,), jnp.int32, _FETCHED),
    )
    @stand_in(functools.partial(_fetch_in_jnp, blocks_of_row=blocks_of_row))
    def fetch(_, codes, absmax, nested, first_block):
        i32 = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), i32)
        row, lane = _row_and_lane()
        row_bytes = codes.type.get_strides_and_offset()[0][0]
        scales_of_row = absmax.type.get_strides_and_offset()[0][0]
        [first] = first_block.registers.flat
        registers, scales, factors = [], [], []
        for half in range(2):
            my_row = arith.addi(row, _i32(8 * half))
            start = arith.addi(
                arith.muli(my_row, _i32(row_bytes)), arith.muli(lane, _i32(32))
            )
            for piece in range(2):
                place = arith.addi(start, _i32(16 * piece))
                registers.append(_load(codes, place, four))
            block = arith.addi(arith.muli(my_row, _i32(scales_of_row)), lane)
            code = _load(absmax, block, ir.IntegerType.get_signless(8))
            scales.append(arith.extui(i32, code))
            in_matrix = arith.addi(
                _register_i32(first),
                arith.addi(arith.muli(my_row, _i32(blocks_of_row)), lane),
            )
            nested_block = arith.shrui(in_matrix, _i32(8))
            place = arith.muli(nested_block, _i32(4))
            factors.append(_load(nested, place, i32))
        registers.append(_vector(four, [*scales, *factors]))
        return _fragmented(registers, _FETCHED)

    return fetch(codes, absmax, nested, first_block)


def _fetch_in_jnp(
    codes: Array,
    absmax: Array,
    nested: Array,
    first_block: Array,
    *,
    blocks_of_row: int,
) -> Array:
    """What `_fetch` loads."""
    words = lax.bitcast_convert_type(codes.reshape(_OUTPUTS, 4, _WORDS, 4), jnp.int32)
    blocks = first_block[0] + blocks_of_row * jnp.arange(_OUTPUTS)[:, None]
    blocks = blocks + jnp.arange(4)[None]
    factors = lax.bitcast_convert_type(nested[blocks // 256], jnp.int32)
    scales = absmax.astype(jnp.int32)
    by_thread = [_by_thread(half) for half in range(2)]
    own = [words[place].reshape(_THREADS, 2, 4) for place in by_thread]
    last = [part[place] for part in (scales, factors) for place in by_thread]
    registers = jnp.concatenate([*own, jnp.stack(last, axis=-1)[:, None]], axis=1)
    return registers.transpose(1, 0, 2).reshape(-1)


def _by_thread(half: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and lane of four of each thread."""
    thread = np.arange(_THREADS)
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * half, lane % 4


def _tables(fetched: Array, dynamic_map, offset, w: NF4Array) -> Array:
    """Returns the sixteen products of a thread's two blocks, as tables of bytes."""

    @plgpu.inline_mgpu(
        arg_types=(_FETCHED, plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((_THREADS * 16,), jnp.int32, _TABLES),
    )
    @stand_in(functools.partial(_tables_in_jnp, w=w))
    def tables(_, fetched, dynamic_map, offset):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        four = ir.VectorType.get((4,), i32)
        last = fetched.registers[4]
        shift = _load(offset, _i32(0), f32)
        struct = llvm.StructType.get_literal([i32] * 8)
        registers = []
        for half in range(2):
            place = arith.muli(_element(last, half), _i32(4))
            factor = arith.bitcast(f32, _element(last, 2 + half))
            operands = [_load(dynamic_map, place, f32), factor, shift]
            scale = llvm.inline_asm(f32, operands, _SCALE, "=f,f,f,f")
            found = llvm.inline_asm(
                struct, [scale], ptx.products(w.code, w.dtype), ptx.PRODUCTS_CONSTRAINTS
            )
            words = [llvm.extractvalue(i32, found, [i]) for i in range(8)]
            registers += [_vector(four, words[:4]), _vector(four, words[4:])]
        return _fragmented(registers, _TABLES)

    return tables(fetched, dynamic_map, offset)


_SCALE = "{\n.reg .f32 p;\nmul.rn.f32 p, $1, $2;\nadd.rn.f32 $0, p, $3;\n}"


def _tables_in_jnp(
    fetched: Array, dynamic_map: Array, offset: Array, *, w: NF4Array
) -> Array:
    """What `_tables` computes."""
    last = fetched.reshape(5, _THREADS, 4)[4]
    factors = lax.bitcast_convert_type(last[:, 2:], jnp.float32)
    scales = rounding.product(dynamic_map[last[:, :2]], factors) + offset[0]
    codebook = jnp.asarray(CODEBOOKS[w.code])[None, None]
    values = (codebook * scales[..., None]).astype(w.dtype)
    octets = lax.bitcast_convert_type(values, jnp.uint8)  # (threads, 2, 16, 2)
    planes = octets.transpose(0, 1, 3, 2).reshape(_THREADS, 4, 4, 4)
    words = lax.bitcast_convert_type(planes, jnp.int32)
    return words.transpose(1, 0, 2).reshape(-1)


def _decode(fetched: Array, tables: Array, chunk: int, w: NF4Array) -> Array:
    """Returns the 64 x 64 values of four wgmma steps, as its left operand."""

    @plgpu.inline_mgpu(
        arg_types=(_FETCHED, _TABLES),
        return_type=plgpu.ShapeDtypeStruct(
            (_OUTPUTS, _LINE), jnp.dtype(w.dtype), plgpu.Layout.WGMMA
        ),
    )
    @stand_in(functools.partial(_decode_in_jnp, chunk=chunk, w=w))
    def decode(_, fetched, tables):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.Type.parse(_MLIR_NAMES[w.dtype]))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((_OUTPUTS, _LINE))
        assert shape == (1, 8, 1, 1, 2, 1, 1, 1, 1)
        registers = np.empty(shape, dtype=object)
        struct = llvm.StructType.get_literal([i32] * 4)
        for half in range(2):
            table = [
                _element(tables.registers[2 * half + i], j)
                for i in range(2)
                for j in range(4)
            ]
            for word_of_chunk in range(2):
                piece, place = divmod(2 * chunk + word_of_chunk, 4)
                word = _element(fetched.registers[2 * half + piece], place)
                found = llvm.inline_asm(
                    struct, [word, *table], ptx.look_up(), ptx.LOOK_UP_CONSTRAINTS
                )
                for i in range(4):
                    value = llvm.extractvalue(i32, found, [i])
                    column = 4 * word_of_chunk + i  # eight columns each
                    registers[0, column, 0, 0, half, 0, 0, 0, 0] = mgpu.utils.bitcast(
                        value, pair
                    )
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return decode(fetched, tables)


_MLIR_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def _decode_in_jnp(fetched: Array, tables: Array, *, chunk: int, w: NF4Array) -> Array:
    """What `_decode` computes."""
    own = fetched.reshape(5, _THREADS, 4)[:4].transpose(1, 0, 2)
    words = own.reshape(_THREADS, 2, _WORDS)[:, :, 2 * chunk : 2 * chunk + 2]
    octets = lax.bitcast_convert_type(words, jnp.uint8)
    nibbles = jnp.stack([octets >> 4, octets & 15], axis=-1).reshape(_THREADS, 2, 16)
    planes = lax.bitcast_convert_type(
        tables.reshape(4, _THREADS, 4).transpose(1, 0, 2), jnp.uint8
    ).reshape(_THREADS, 2, 2, 16)
    planes = planes.transpose(0, 1, 3, 2)
    products = lax.bitcast_convert_type(planes, jnp.dtype(w.dtype))
    values = jnp.take_along_axis(products, nibbles.astype(jnp.int32), axis=2)
    # Of a thread and row: (step, half of its columns, pair).
    values = values.reshape(_THREADS, 2, 4, 2, 2)
    tile = jnp.zeros((_OUTPUTS, 4, 2, 4, 2), values.dtype)
    for half in range(2):
        row, lane = _by_thread(half)
        tile = tile.at[row, :, :, lane].set(values[:, half])
    return tile.reshape(_OUTPUTS, _LINE)


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


def _vector(result, elements):
    return vector.from_elements(result, elements)


def _element(register, index: int):
    return vector.extract(
        register,
        dynamic_position=[],
        static_position=ir.DenseI64ArrayAttr.get([index]),
    )


def _register_i32(register):
    return mgpu.utils.bitcast(register, ir.IntegerType.get_signless(32))


def _fragmented(registers, layout) -> mgpu.FragmentedArray:
    array = np.empty((len(registers),), dtype=object)
    array[:] = registers
    return mgpu.FragmentedArray(
        _registers=array, _layout=layout.to_mgpu(), _is_signed=True
    )


def _i32(value: int):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))
