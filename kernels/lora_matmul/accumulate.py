"""Sums of matrix products on Hopper, each sum in one accumulator.

`y[g] = sum over s of lhs[g, s] @ rhs[g, s]`: the low-rank product of an adapter is one
more step of the loop over the contracted axis, and the gradient of an input that
several weights read is one loop over all of them. Nothing is joined or added in memory.

A block is persistent: one warpgroup copies operands into a ring of shared memory, two
multiply and store. Budget at 128 x 256 x 64 with 4 stages: 192 KiB ring, 32 KiB
results; 232 registers a thread that multiplies, of which 128 hold the accumulator.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.dispatch import UnsupportedOp

from .memory import accumulator, swizzled
from .tiles import TileConfig

KERNEL_NAME = "accumulated_products"

_MULTIPLIERS = 2  # warpgroups
_LOADER = _MULTIPLIERS
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 40, 232
_STORED_ROWS, _STORED_COLUMNS = 64, 64
_SLOTS = 2  # stored pieces in flight, for each multiplying warpgroup

Term = tuple[jax.Array, jax.Array]
"""Operands (M, C) and (C, N), or (M, C) and (N, C), which is read transposed."""


@dataclass(frozen=True)
class _Sum:
    """Static facts of one output: its tiles along N, its terms' operands and steps."""

    first: int
    end: int
    operands: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]


def accumulated_products(
    sums: Sequence[Sequence[Term]],
    *,
    is_transposed: bool,
    tiles: TileConfig,
    blocks: int,
) -> list[jax.Array]:
    """Returns a matrix for each of `sums`, accumulated in float32, rounded once.

    Args:
      sums: The terms of each output. All have M rows and the same number of steps along
        the contracted axes; a rest of a step reads zeros.
      is_transposed: Right operands are (N, C) in memory.
      tiles: How to cut.
      blocks: Of the grid; as many as the device has multiprocessors.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles.
    """
    plan, lhs, rhs = _plan(sums, is_transposed, tiles)
    rows = lhs[0].shape[0]
    if rows % tiles.tile_m:
        raise UnsupportedOp(f"{rows} rows are no multiple of {tiles.tile_m}")
    tiles = dataclasses.replace(tiles, stages=min(tiles.stages, sum(plan[0].steps)))
    return _launch(
        lhs, rhs, plan=plan, is_transposed=is_transposed, tiles=tiles, blocks=blocks
    )


@functools.partial(
    jax.jit, static_argnames=("plan", "is_transposed", "tiles", "blocks")
)
def _launch(
    lhs: list[jax.Array],
    rhs: list[jax.Array],
    *,
    plan: tuple[_Sum, ...],
    is_transposed: bool,
    tiles: TileConfig,
    blocks: int,
) -> list[jax.Array]:
    """Runs the kernel. Compiled, so that equal calls in a program are lowered once."""
    rows, dtype = lhs[0].shape[0], lhs[0].dtype
    transforms = swizzled(tiles.tile_k, dtype)
    b_tile = (tiles.tile_k, tiles.tile_n)
    scratch = {
        "a_smem": plgpu.SMEM(
            (tiles.stages, tiles.tile_m, tiles.tile_k), dtype, transforms=transforms
        ),
        "b_smem": plgpu.SMEM(
            (tiles.stages, *(b_tile[::-1] if is_transposed else b_tile)),
            dtype,
            transforms=transforms,
        ),
        "out_smem": plgpu.SMEM(
            (_MULTIPLIERS, _SLOTS, _STORED_ROWS, _STORED_COLUMNS),
            dtype,
            transforms=swizzled(_STORED_COLUMNS, dtype),
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "empty": plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=tiles.stages),
    }
    widths = [(part.end - part.first) * tiles.tile_n for part in plan]
    return plgpu.kernel(
        functools.partial(
            _body,
            plan=plan,
            inputs=(len(lhs), len(rhs)),
            tiles=tiles,
            rows=rows,
            is_transposed=is_transposed,
        ),
        out_type=[jax.ShapeDtypeStruct((rows, width), dtype) for width in widths],
        scratch_types=scratch,
        grid=(min(blocks, rows // tiles.tile_m * plan[-1].end),),
        grid_names=("block",),
        num_threads=_MULTIPLIERS + 1,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(),
    )(*lhs, *rhs)


def _plan(sums, is_transposed: bool, tiles: TileConfig):
    """Returns the sums' static facts and the distinct operands."""
    lhs: list[jax.Array] = []
    rhs: list[jax.Array] = []
    plan, first = [], 0
    for terms in sums:
        operands, steps = [], []
        for left, right in terms:
            operands.append((_place(lhs, left), _place(rhs, right)))
            steps.append(-(-left.shape[1] // tiles.tile_k))
        columns = terms[0][1].shape[0 if is_transposed else 1]
        if columns % tiles.tile_n:
            raise UnsupportedOp(f"{columns} columns are no multiple of {tiles.tile_n}")
        end = first + columns // tiles.tile_n
        plan.append(_Sum(first, end, tuple(operands), tuple(steps)))
        first = end
    assert len({sum(s.steps) for s in plan}) == 1
    return tuple(plan), lhs, rhs


def _place(arrays: list[jax.Array], array: jax.Array) -> int:
    """Returns where `array` itself stands in the list, to which it is added once."""
    for index, known in enumerate(arrays):
        if known is array:
            return index
    arrays.append(array)
    return len(arrays) - 1


def _body(
    *refs,
    a_smem,
    b_smem,
    out_smem,
    full,
    empty,
    plan: tuple[_Sum, ...],
    inputs: tuple[int, int],
    tiles: TileConfig,
    rows: int,
    is_transposed: bool,
) -> None:
    lhs, rhs, outs = (
        refs[: inputs[0]],
        refs[inputs[0] : sum(inputs)],
        refs[sum(inputs) :],
    )
    grid = (rows // tiles.tile_m, plan[-1].end)
    steps = sum(plan[0].steps)
    warpgroup = lax.axis_index("warpgroup")
    my_columns = tiles.tile_n // _MULTIPLIERS

    def each_tile(run):
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _(loop):
            (index,) = loop.index
            m, n = plgpu.planar_snake(index, grid, 0, tiles.width)
            run(m, n, loop.local_index * steps)

    def load(m, n, step):
        for part in plan:

            @_when_in(part, n, plan)
            def _(part=part):
                first = step
                for (left, right), count in zip(part.operands, part.steps, strict=True):
                    load_term(lhs[left], rhs[right], m, n - part.first, first, count)
                    first += count

    def load_term(left, right, m, n, first, count):
        def load_step(k, _):
            slot = lax.rem(first + k, tiles.stages)

            @pl.when(first + k >= tiles.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            contracted = pl.ds(k * tiles.tile_k, tiles.tile_k)
            columns = pl.ds(n * tiles.tile_n, tiles.tile_n)
            b = (columns, contracted) if is_transposed else (contracted, columns)
            a = (pl.ds(m * tiles.tile_m, tiles.tile_m), contracted)
            plgpu.copy_gmem_to_smem(left.at[a], a_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(right.at[b], b_smem.at[slot], full.at[slot])

        lax.fori_loop(0, count, load_step, None)

    def multiply(m, n, step):
        @functools.partial(pl.run_scoped, acc=accumulator(tiles.tile_m, my_columns))
        def _(acc):
            def multiply_step(k, _):
                slot = lax.rem(step + k, tiles.stages)
                plgpu.barrier_wait(full.at[slot])
                a, b = a_smem.at[slot], b_smem.at[slot]
                if is_transposed:
                    b = b.transpose((1, 0))
                plgpu.wgmma(acc, a, b.at[:, pl.ds(warpgroup * my_columns, my_columns)])
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, tiles.stages)])

            lax.fori_loop(0, steps, multiply_step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[lax.rem(step + steps - 1, tiles.stages)])
            store(acc[...].astype(a_smem.dtype), m, n)

    def store(values, m, n):
        row, column = m * tiles.tile_m, n * tiles.tile_n + warpgroup * my_columns
        pieces = [
            (i, j)
            for i in range(0, tiles.tile_m, _STORED_ROWS)
            for j in range(0, my_columns, _STORED_COLUMNS)
        ]
        for index, (i, j) in enumerate(pieces):
            piece_smem = out_smem.at[warpgroup, index % _SLOTS]
            plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
            piece_smem[...] = values[i : i + _STORED_ROWS, j : j + _STORED_COLUMNS]
            plgpu.commit_smem()
            store_piece(piece_smem, n, row + i, column + j)

    def store_piece(piece_smem, n, row, column):
        for part, out in zip(plan, outs, strict=True):

            @_when_in(part, n, plan)
            def _(part=part, out=out):
                first_column = column - part.first * tiles.tile_n
                at = (pl.ds(row, _STORED_ROWS), pl.ds(first_column, _STORED_COLUMNS))
                plgpu.copy_smem_to_gmem(piece_smem, out.at[at])

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        each_tile(load)
        for slot in range(tiles.stages):
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(warpgroup < _LOADER)
    def _():
        plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
        each_tile(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _when_in(part: _Sum, n, plan: tuple[_Sum, ...]):
    """Returns `pl.when` of a tile of this output; with one output there is no if."""
    if len(plan) == 1:
        return lambda run: run()
    return pl.when((n >= part.first) & (n < part.end))
