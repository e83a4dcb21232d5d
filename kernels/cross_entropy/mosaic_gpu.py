"""The odds of all tokens against a row's own on Hopper: no logits in memory.

One product, hidden states by head, whose epilogue takes `exp(logit - shift)` of the
float32 accumulator, adds it up along the row and stores it in 16 bits for the second
product. A block is persistent: one warpgroup copies operands into a ring of shared
memory, two multiply, each half of the columns, and store. Budget at 128 x 256 x 64 with
4 stages: 192 KiB ring, 32 KiB results; 232 registers a thread that multiplies, of
which 128 hold the accumulator.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.lora_matmul.memory import accumulator, swizzled
from kernels.lora_matmul.tiles import TileConfig

KERNEL_NAME = "cross_entropy_odds"

_MULTIPLIERS = 2  # warpgroups
_LOADER = _MULTIPLIERS
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 40, 232
_PIECE = 64  # rows and columns that are stored at a time
_SLOTS = 2  # pieces on their way, for each multiplying warpgroup
_ROW = plgpu.Layout.WGMMA.reduce(1)
_LOG2_E = math.log2(math.e)


def odds(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    shift: Float32[Array, " M"],
    *,
    tiles: TileConfig,
    blocks: int,
) -> tuple[Float[Array, "M V"], Float32[Array, " M"]]:
    """Returns `exp(logit - shift)` and its sums along the rows, which may overflow.

    Args:
      hidden: 16 bits; M a multiple of `tile_m`, D of `tile_k`.
      head: V a multiple of `tile_n`.
      shift: Natural logarithm of what the exponentials are divided by.
      tiles: How to cut.
      blocks: Of the grid; as many as the device has multiprocessors.
    """
    (rows, features), vocabulary = hidden.shape, head.shape[0]
    dtype = hidden.dtype
    grid = (rows // tiles.tile_m, vocabulary // tiles.tile_n)
    stages = min(tiles.stages, features // tiles.tile_k)
    ring = swizzled(tiles.tile_k, dtype)
    values, sums = plgpu.kernel(
        functools.partial(_body, tiles=tiles, stages=stages, grid=grid),
        out_type=[
            jax.ShapeDtypeStruct((rows, vocabulary), dtype),
            jax.ShapeDtypeStruct((_MULTIPLIERS * grid[1], rows), jnp.float32),
        ],
        scratch_types={
            "a_smem": plgpu.SMEM(
                (stages, tiles.tile_m, tiles.tile_k), dtype, transforms=ring
            ),
            "b_smem": plgpu.SMEM(
                (stages, tiles.tile_n, tiles.tile_k), dtype, transforms=ring
            ),
            "out_smem": plgpu.SMEM(
                (_MULTIPLIERS, _SLOTS, _PIECE, _PIECE),
                dtype,
                transforms=swizzled(_PIECE, dtype),
            ),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=stages),
        },
        grid=(min(blocks, grid[0] * grid[1]),),
        grid_names=("block",),
        num_threads=_MULTIPLIERS + 1,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(hidden, head, shift * _LOG2_E)
    return values, jnp.sum(sums, axis=0)


def _body(
    hidden_gmem,
    head_gmem,
    shift_gmem,
    values_gmem,
    sums_gmem,
    *,
    a_smem,
    b_smem,
    out_smem,
    full,
    empty,
    tiles: TileConfig,
    stages: int,
    grid: tuple[int, int],
) -> None:
    steps = hidden_gmem.shape[1] // tiles.tile_k
    warpgroup = lax.axis_index("warpgroup")
    my_columns = tiles.tile_n // _MULTIPLIERS

    def each_tile(run):
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _(loop):
            (index,) = loop.index
            m, n = plgpu.planar_snake(index, grid, 0, tiles.width)
            run(m, n, loop.local_index * steps)

    def load(m, n, first):
        rows = pl.ds(m * tiles.tile_m, tiles.tile_m)
        columns = pl.ds(n * tiles.tile_n, tiles.tile_n)

        def load_step(k, _):
            slot = lax.rem(first + k, stages)

            @pl.when(first + k >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            at = pl.ds(k * tiles.tile_k, tiles.tile_k)
            a, b = hidden_gmem.at[rows, at], head_gmem.at[columns, at]
            plgpu.copy_gmem_to_smem(a, a_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(b, b_smem.at[slot], full.at[slot])

        lax.fori_loop(0, steps, load_step, None)

    def multiply(m, n, first):
        shifts = [
            plgpu.load(
                shift_gmem.at[pl.ds(m * tiles.tile_m + i, _PIECE)],
                layout=_ROW,
                optimized=False,
            )
            for i in range(0, tiles.tile_m, _PIECE)
        ]

        @functools.partial(pl.run_scoped, acc=accumulator(tiles.tile_m, my_columns))
        def _(acc):
            def multiply_step(k, _):
                slot = lax.rem(first + k, stages)
                plgpu.barrier_wait(full.at[slot])
                b = b_smem.at[slot].transpose((1, 0))
                b = b.at[:, pl.ds(warpgroup * my_columns, my_columns)]
                plgpu.wgmma(acc, a_smem.at[slot], b)
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(first + k - 1, stages)])

            lax.fori_loop(0, steps, multiply_step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[lax.rem(first + steps - 1, stages)])
            store(acc[...], shifts, m, n)

    def store(logits, shifts, m, n):
        row, column = m * tiles.tile_m, n * tiles.tile_n + warpgroup * my_columns
        slot = 0
        for i, shift in zip(range(0, tiles.tile_m, _PIECE), shifts, strict=True):
            terms = []
            for j in range(0, my_columns, _PIECE):
                logit = logits[i : i + _PIECE, j : j + _PIECE]
                shifts_of_row = lax.broadcast_in_dim(shift, logit.shape, (0,))
                value = jnp.exp2(logit * _LOG2_E - shifts_of_row)
                terms.append(value)
                piece_smem = out_smem.at[warpgroup, slot % _SLOTS]
                slot += 1
                plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
                piece_smem[...] = value.astype(out_smem.dtype)
                plgpu.commit_smem()
                at = (pl.ds(row + i, _PIECE), pl.ds(column + j, _PIECE))
                plgpu.copy_smem_to_gmem(piece_smem, values_gmem.at[at])
            sums = sums_gmem.at[n * _MULTIPLIERS + warpgroup, pl.ds(row + i, _PIECE)]
            sums[...] = jnp.sum(functools.reduce(operator.add, terms), axis=1)

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        each_tile(load)
        for slot in range(stages):
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(warpgroup < _LOADER)
    def _():
        plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
        each_tile(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
