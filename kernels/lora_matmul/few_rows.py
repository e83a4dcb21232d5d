"""Products of few rows with a 4-bit weight on Hopper, as in decoding.

The weight is read once, as codes. It is the left operand of wgmma, whose 64 rows it
fills; the activations, at most 64 rows of them, are the right one. A byte of two codes
becomes two 16-bit numbers by one look-up in shared memory (`value_words`). Scales are
applied in float32 to what is summed up: before the product with a block of 64 codes,
the accumulator is multiplied by the last block's scale over this one's. So no weight is
rounded; a code's value is, by less than weights would be.

Products do not care for the order of what they sum up: each thread takes sixteen codes
of a block that lie together, and `x` is permuted to match (`in_thread_order`).

A block of the grid has four multiplying warpgroups with 64 outputs each; a fifth one
loads codes and `x`. The contracted axis is split so that blocks fill the device; the
parts, in float32, are added in a fixed order. Budget: 192 KiB shared memory, of which
the table of values, once for each bank, has 64; 112 registers a thread.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.dispatch import UnsupportedOp
from kernels.nf4 import NF4Array, ptx
from kernels.nf4.codebooks import DYNAMIC_MAP
from kernels.packed import PackedArray
from kernels.registers import LANES
from kernels.ring import Ring
from kernels.wgmma import accumulator, swizzled

from .few_rows_registers import (
    BLOCK,
    BLOCKS,
    CODES_LAYOUT,
    NESTED_BLOCK,
    OUTPUTS,
    ROW_LAYOUT,
    UNIT,
    decoded,
    fetched_scales,
    in_thread_order,
    scales_and_inverses,
    value_words,
)

KERNEL_NAME = "few_rows_product"
MAX_ROWS = 64

_MULTIPLIERS = 4  # warpgroups
_TILE = _MULTIPLIERS * OUTPUTS
_OCTETS = UNIT // 2
_STAGES = 2  # more of them take longer: their copies share the memory's rate
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 32, 112


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
    tiles, units = outputs // _TILE, inputs // UNIT
    divisors = [d for d in range(1, units + 1) if units % d == 0]
    splits = max(d for d in divisors if d == 1 or tiles * d <= blocks)
    width = -(-rows // 8) * 8
    steps = units // splits
    stages = min(steps, _STAGES)
    values, factor = value_words(w.code, w.dtype)
    parts = plgpu.kernel(
        functools.partial(_body, w=w, steps=steps, stages=stages, factor=factor),
        out_type=jax.ShapeDtypeStruct((splits, outputs, width), jnp.float32),
        scratch_types={
            "x_smem": plgpu.SMEM(
                (stages, width, UNIT), x.dtype, transforms=swizzled(BLOCK, x.dtype)
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
        in_thread_order(jnp.pad(x, ((0, width - rows), (0, 0)))),
        w.codes.reshape(outputs, -1),
        w.absmax.reshape(outputs, -1),
        w.nested_absmax,
        w.nested_offset,
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
    if (w.block_size, w.nested_block_size) != (BLOCK, NESTED_BLOCK):
        raise UnsupportedOp(f"{w.block_size=} and {w.nested_block_size=}")
    if inputs % UNIT or outputs % _TILE:
        raise UnsupportedOp(f"{w.shape=} must be multiples of {UNIT}")
    if x.shape[0] > MAX_ROWS:
        raise UnsupportedOp(f"{x.shape[0]} rows are more than {MAX_ROWS}")


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
    row = tile * _TILE + warpgroup * OUTPUTS
    blocks_of_row, width = w.shape[0] // BLOCK, x_smem.shape[1]
    own = pl.ds(warpgroup * OUTPUTS, OUTPUTS)

    def fetched(step):
        unit = part * steps + jnp.minimum(step, steps - 1)
        first_block = row * blocks_of_row + unit * BLOCKS
        return fetched_scales(
            absmax_gmem.at[pl.ds(row, OUTPUTS), pl.ds(unit * BLOCKS, BLOCKS)],
            nested_gmem,
            first_block,
            blocks_of_row,
        )

    ring = Ring((codes_smem, x_smem), full, empty)

    def load(step, _):
        unit = part * steps + step
        codes = codes_gmem.at[
            pl.ds(tile * _TILE, _TILE), pl.ds(unit * _OCTETS, _OCTETS)
        ]
        ring.fill(step, codes, x_gmem.at[:, pl.ds(unit * UNIT, UNIT)])

    def fill():
        words = plgpu.load(values_gmem.at[own], layout=ROW_LAYOUT, optimized=False)
        copies = lax.broadcast_in_dim(words, (OUTPUTS, LANES), (0,))
        values_smem.at[own, pl.ds(0, LANES)][...] = copies
        plgpu.barrier_arrive(filled)
        plgpu.barrier_wait(filled)

    def multiply_block(acc, weight, ratio, slot, block):
        plgpu.wgmma_wait(0)  # the last block's product, while this one was decoded
        acc[...] = acc[...] * lax.broadcast_in_dim(ratio, (OUTPUTS, width), (0,))
        contracted = x_smem.at[slot, :, pl.ds(block * BLOCK, BLOCK)]
        plgpu.wgmma(acc, weight, contracted.transpose((1, 0)))

    def multiply(acc, step, carry):
        last_scale, current = carry
        slot = lax.rem(step, stages)
        following = fetched(step + 1)
        scales, inverses = scales_and_inverses(current, map_gmem, offset_gmem, factor)
        ratios = [*map(jnp.multiply, (last_scale, *scales), inverses)]
        plgpu.barrier_wait(full.at[slot])
        codes = plgpu.load(codes_smem.at[slot, own], layout=CODES_LAYOUT)
        for block, ratio in enumerate(ratios):
            weight = decoded(codes, values_smem, block, w.dtype)
            multiply_block(acc, weight, ratio, slot, block)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()  # copies to come do not wait for loads of codes otherwise
        plgpu.barrier_arrive(empty.at[slot])
        return scales[-1], following

    @pl.when(warpgroup == _MULTIPLIERS)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        lax.fori_loop(0, steps, load, None)
        ring.drain(steps)

    @pl.when(warpgroup < _MULTIPLIERS)
    def _():
        plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
        first = fetched(0)
        fill()
        one = plgpu.layout_cast(jnp.ones((OUTPUTS,), jnp.float32), ROW_LAYOUT)

        @functools.partial(pl.run_scoped, acc=accumulator(OUTPUTS, width))
        def _(acc):
            one_step = functools.partial(multiply, acc)
            scale, _ = lax.fori_loop(0, steps, one_step, (one, first))
            scale = lax.broadcast_in_dim(scale, (OUTPUTS, width), (0,))
            out_gmem[part, pl.ds(row, OUTPUTS)] = acc[...] * scale
